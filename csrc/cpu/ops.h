// The kernels of the instruction set ULFINE_ISA. Included once per set where they are chosen, so without a
// guard.
#include "kernels.h"

namespace ulfine::ULFINE_ISA {

void proto_logits(const ProtoLogits&);
int64_t proto_logits_scratch(int64_t b, int64_t c, int64_t d, int threads);
void proto_logits_backward(const ProtoLogitsBackward&);
int64_t proto_logits_backward_scratch(int64_t b, int64_t c, int64_t d, int threads);
void pseudo_label(const PseudoLabel&);
int64_t pseudo_label_scratch(int64_t b, int64_t c, int64_t d, int64_t scale_rows, int threads);
void dual_cross_entropy(const DualCrossEntropy&);
int64_t dual_cross_entropy_scratch(int64_t b, int64_t c, int64_t d, int64_t groups, bool fused,
                                   bool need_features, bool need_linear, int threads);
void proto_fit(const ProtoFit&);
int64_t proto_fit_scratch(int64_t b, int64_t c, int64_t d, int threads);
void orthogonality(const Orthogonality&);
int64_t orthogonality_scratch(int64_t c, int64_t d, int threads);
void head_loss(const HeadLoss&, float* scratch);
int64_t head_loss_scratch(const HeadLoss&);

}  // namespace ulfine::ULFINE_ISA
