// The CPU kernels, as every instruction set implements them and as the bindings call them.
//
// Letters: B rows of features, C classes, D dimensions. All matrices are row-major float32. `scratch` is
// working memory of at least <op>_scratch(...) floats. `threads` bounds the OpenMP team; results do not
// depend on it. Null output pointers mean "not wanted" where a comment says so.
#pragma once

#include <cstdint>

namespace ulfine {

struct ProtoLogits {
  const float *features, *prototypes;  // [B, D], [C, D]
  float* logits;                       // [B, C]
  float* scratch;
  int64_t b, c, d;
  float scale;
  int threads;
};

struct ProtoLogitsBackward {
  const float *grad, *features, *prototypes;  // [B, C], [B, D], [C, D]
  float *d_features, *d_prototypes;           // either may be null
  float* scratch;
  int64_t b, c, d;
  float scale;
  int threads;
};

// A packed bank. pseudo_label() can leave the fold of both branches to dual_cross_entropy() on fused logits.
struct PackedBank {
  float *transposed, *packed;  // see pack_bank()
};

struct PseudoLabel {
  const float *features, *linear, *prototypes;  // [B, D], [C, D], [C, D]
  const float* threshold;                       // [1] or [C]
  int64_t thresholds;                           // 1 or C
  const float* adjustment;                      // [C] or null
  int64_t* label;                               // [B]
  float* confidence;                            // [B]
  bool* keep;                                   // [B]
  int64_t *histogram, *kept_histogram;          // [C]
  float* branch_scale;                          // [2]
  float* scratch;
  int64_t b, c, d;
  double eta;
  float align, linear_scale, proto_scale, temperature;
  bool normalize_linear;
  int64_t scale_rows;  // <= B
  int threads;
  const PackedBank* bank;  // where to leave the packed fold, or null
};

struct DualCrossEntropy {
  const float* features;             // [B, D]
  const int64_t* targets;            // [B]
  const float *linear, *prototypes;  // [C, D]
  const float* weights;              // [B]
  const float* adjustment;           // [G, C] or null
  int64_t groups;
  const int64_t* group;          // [B] or null: group 0 for all
  float* loss;                   // []
  float *d_features, *d_linear;  // [B, D], [C, D]; either may be null
  float* scratch;
  int64_t b, c, d;
  double eta;
  float align, linear_scale, proto_scale;
  bool fused, normalize_linear;
  int threads;
  const PackedBank* bank;  // the packed fold if it is there already, or null
};

// Labelled rows, then `views` strong views of the weak rows, with the pseudo-labels of the weak rows.
struct HeadLoss {
  PseudoLabel weak;
  DualCrossEntropy rows;  // targets of the labelled rows only; null weights, group and adjustment
  int64_t labelled;
  const float *adjustment, *strong_adjustment;  // [C] of labelled and of strong rows; either may be null
  float unlabelled_weight;
  float* d_prototypes;  // [C, D] or null
  float orthogonality_weight;
};

struct ProtoFit {
  const float* features;    // [B, D]
  const int64_t* targets;   // [B]
  const float* histogram;   // [C]
  float *textual, *visual;  // [C, D], read and written
  bool* seen;               // [C], read and written
  float* distribution;      // [C], read and written
  float* scratch;
  int64_t b, c, d;
  float mu;
  double beta, gamma;
  int threads;
};

struct Orthogonality {
  const float* prototypes;  // [C, D]
  float *value, *gradient;  // [], [C, D]; the gradient is that of weight * value
  float weight;
  float* scratch;
  int64_t c, d;
  int threads;
};

// One instruction set's kernels. Sizes of scratch depend on its vector width, so they belong to it.
struct Kernels {
  void (*proto_logits)(const ProtoLogits&);
  int64_t (*proto_logits_scratch)(int64_t b, int64_t c, int64_t d, int threads);
  void (*proto_logits_backward)(const ProtoLogitsBackward&);
  int64_t (*proto_logits_backward_scratch)(int64_t b, int64_t c, int64_t d, int threads);
  void (*pseudo_label)(const PseudoLabel&);
  int64_t (*pseudo_label_scratch)(int64_t b, int64_t c, int64_t d, int64_t scale_rows, int threads);
  void (*dual_cross_entropy)(const DualCrossEntropy&);
  int64_t (*dual_cross_entropy_scratch)(int64_t b, int64_t c, int64_t d, int64_t groups, bool fused,
                                        bool need_features, bool need_linear, int threads);
  void (*proto_fit)(const ProtoFit&);
  int64_t (*proto_fit_scratch)(int64_t b, int64_t c, int64_t d, int threads);
  void (*orthogonality)(const Orthogonality&);
  int64_t (*orthogonality_scratch)(int64_t c, int64_t d, int threads);
  void (*head_loss)(const HeadLoss&, float* scratch);
  int64_t (*head_loss_scratch)(const HeadLoss&);
};

struct Selected {
  const char* isa;
  Kernels kernels;
};

// The best set that this processor runs. The environment variable ULFINE_ISA (baseline, avx2, avx512) lowers
// it, for tests and for comparisons; a set that the processor lacks is not taken.
const Selected& selected();

}  // namespace ulfine
