// The CUDA launchers, free of torch: addresses on the device, sizes, a stream. Each returns null, or the text
// of the error that its launch met. None allocates, synchronises or uses the default stream by itself.
//
// Matrix products lie between them and belong to the caller, see ulfine_fast/_cuda.py.
//
// Letters: B rows of features, U weak rows, C classes, D dimensions. All matrices are row-major, contiguous
// and, unless they say otherwise, float32. A null pointer means "not there" or "not wanted" where a comment
// says so.
#pragma once

#include <cstdint>

namespace pybind11 {
class module_;
}

namespace ulfine::cuda {

// A matrix that products read, as float32 or as the bits of float16; both null: not there.
struct Operand {
  float* full;
  uint16_t* half;
};

// What every product starts from: unit rows of the features, and of the banks or of their fold.
struct UnitRows {
  const float *weak, *features;      // [U, D], [B, D]
  const float *linear, *prototypes;  // [C, D]; linear may be null
  Operand x;                         // [U + B, D] unit rows, weak first
  float* x_inverse;                  // [U + B] their inverse norms
  Operand bank;                      // [2C, D] or null: unit rows of linear, if it is there, then prototypes
  float* bank_inverse;               // [2C]
  Operand fold;                      // [C, D] or null: the bank whose logits are the fused ones
  float* fold_unit;                  // [] or null: what the fold is divided by, that float16 holds it
  float* text;                       // [C, D] or null: unit rows of the prototypes once more
  const float* align;                // [] of the fold
  int64_t *histogram, *kept_histogram;  // [C] or null: set to zero
  int64_t u, b, c, d;
  double eta;
  float linear_scale, proto_scale;
  bool normalize_linear;
};

const char* unit_rows(const UnitRows&, void* stream);

// Gradient through y = x / |x| of `count` rows, in place of the gradient in y.
struct UnitGradient {
  float* gradient;       // [count, D] or null
  const float* rows;     // [count, D] x
  const float* inverse;  // [count]
  const bool* used;      // [count] or null; a row that is not used gets exactly 0
  int64_t count;
  const float* unit;  // [] or null: one more factor
  float factor;
  bool normalized;  // false: the rows were used as they are
};

// Sums over rows, each in double and in a fixed order.
struct Sums {
  const float* row_loss;  // [B]
  int64_t b;
  const float* spread;  // [scale_rows, 2]
  int64_t scale_rows;
  const double* squares;  // [count] parts of the squared Gram matrix
  int64_t count, c;
  float orthogonality_weight;
  float* loss;          // [] or null: of the rows, and weight * value of the orthogonality
  float* branch_scale;  // [2] or null
  float* value;         // [] or null: orthogonality alone
};

// What every op ends with.
struct Finish {
  UnitGradient features, linear, prototypes;
  Sums sums;
  int64_t d;
};

const char* finish(const Finish&, void* stream);

// Weak rows. Their fused logits are there, or come from the cosines with both banks.
struct WeakRows {
  const float* fused;                   // [U, C] or null
  const float* fold_unit;               // [] or null: a factor on them
  const float* cosines;                 // [scale_rows, 2C], or [U, 2C] where `fused` is null
  const float* threshold;               // [1] or [C]
  int64_t thresholds;                   // 1 or C
  const float* adjustment;              // [C] or null
  const float* align;                   // []
  int64_t* label;                       // [U]
  float* confidence;                    // [U]
  bool* keep;                           // [U]
  int64_t *histogram, *kept_histogram;  // [C], zeros before
  float* spread;                        // [scale_rows, 2] standard deviations over classes of both branches
  int64_t u, c, scale_rows;
  double eta;
  float linear_scale, proto_scale, temperature;
};

const char* pseudo_label(const WeakRows&, void* stream);

// Rows of the loss. Logits are fused, or cosines with both banks.
struct LossRows {
  float* z;                // [B, C] fused logits, or [B, 2C] cosines
  const float* fold_unit;  // [] or null: a factor on fused logits
  uint16_t* dz;  // their gradients times `on_gradient` as float16; null: as float32 in the place of z
  Operand x;     // [B, D] unit rows; those without a part in the loss become 0
  float* loss;   // [B]
  bool* used;    // [B] whether a row has a part in the loss
  int64_t b, c, d;
  float linear_scale, proto_scale, on_gradient;  // the last is 0 where no gradient is wanted
  bool fused;
};

struct DualCrossEntropy {
  LossRows rows;
  const int64_t* targets;   // [B]
  const float* weights;     // [B]
  const float* adjustment;  // [G, C] or null
  int64_t groups;
  const int64_t* group;  // [B] or null: group 0 for all
};

const char* dual_cross_entropy(const DualCrossEntropy&, void* stream);

// Labelled rows, then strong views of the weak rows, with the pseudo-labels of the weak rows.
struct HeadLoss {
  WeakRows weak;
  LossRows rows;
  const int64_t* targets;                       // [labelled]
  const float *adjustment, *strong_adjustment;  // [C] of labelled and of strong rows; either may be null
  int64_t labelled;
  float labelled_weight, strong_weight;
};

const char* head_loss(const HeadLoss&, void* stream);

struct ProtoFit {
  const float* features;     // [B, D]
  const int64_t* targets;    // [B]
  const int64_t* counts;     // [C] or null: the histogram, as counts
  const float* mass;         // [C] or null: the histogram, as float32
  float *textual, *visual;   // [C, D], read and written
  bool* seen;                // [C], read and written
  float* distribution;       // [C], read and written
  float *inverse, *largest;  // [B], []: working memory
  int64_t b, c, d;
  float mu;
  double beta, gamma;
};

const char* proto_fit(const ProtoFit&, void* stream);

// What the textual prototypes as posterior means need beside the visual ones.
struct Posterior {
  const float* weak;         // [U, D]
  const int64_t* labelled;   // [C] labelled examples of the training set
  const float* text;         // [C, D]
  float* kept_sum;           // [C, D], read and written; null: prototypes are no posterior means
  float* kept_count;         // [C], read and written
  float *inverse, *along;    // [U], [C]: working memory
  float *unlabelled, *pull;  // [], []: working memory
  float strength, unlabelled_mass;
};

// All that the head carries to the next step. The distribution that `fit` moves is that of the rows counted.
struct StateUpdate {
  ProtoFit fit;
  Posterior posterior;
  const bool* finite;                       // [] false: everything stays
  const int64_t* label;                     // [U]
  const bool *keep, *copies;                // [U], [U] or null: rows that do not count
  int64_t* counted;                         // [C] or null: the counts of `fit`, to be filled
  const int64_t* kept_counts;               // [C]
  const float* measured_scale;              // [2], zeros for none
  float *kept_distribution, *branch_scale;  // [C], [2], read and written
  bool* measured;                           // [], read and written
  int64_t u;
  double scale_decay;
  bool normalize;  // the textual prototypes, first
};

const char* state_update(const StateUpdate&, void* stream);

// The Gram matrix of unit rows, from the C x C side if C <= D, else from the D x D side.
struct Gram {
  float* gram;        // [side, side]; the diagonal of the C x C side becomes 0
  const float* unit;  // [C, D]
  double* squares;    // [C], or [D + C] from the other side; their sum is that of the squared cosines
  int64_t c, d;
};

const char* orthogonality(const Gram&, void* stream);

// Adds the launchers to a module of Python.
void bind(pybind11::module_& m);

}  // namespace ulfine::cuda
