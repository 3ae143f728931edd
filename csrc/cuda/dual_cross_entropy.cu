// Cross-entropy of rows over both branches, with its gradient in place of the logits: a team has a row.
#include "softmax.h"

namespace ulfine::cuda {

namespace {

template <int kTeam>
__global__ void __launch_bounds__(kBlock) dual_cross_entropy_kernel(DualCrossEntropy a) {
  const int64_t i = team<kTeam>();
  if (i >= a.rows.b) return;
  const int64_t g = a.group != nullptr ? a.group[i] : 0;
  const float* shift = g >= 0 && g < a.groups ? a.adjustment + g * a.rows.c : nullptr;
  loss_row<kTeam, float>(a.rows, i, a.targets[i], a.weights[i], shift);
}

}  // namespace

const char* dual_cross_entropy(const DualCrossEntropy& a, void* stream) {
  return launch_rows(dual_cross_entropy_kernel<kWarp>, dual_cross_entropy_kernel<kBlock>, a.rows.c, a.rows.b,
                     a, stream);
}

}  // namespace ulfine::cuda
