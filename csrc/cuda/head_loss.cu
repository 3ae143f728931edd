// All rows of one step: a team has a labelled row, or a weak row and after it the strong views of its image.
#include "softmax.h"

namespace ulfine::cuda {

namespace {

template <int kTeam>
__global__ void __launch_bounds__(kBlock) head_loss_kernel(HeadLoss a) {
  // Weak rows come first: they take longest.
  const int64_t i = team<kTeam>();
  if (i >= a.weak.u + a.labelled) return;
  int64_t row = i - a.weak.u, end = row + 1, target;
  float weight = a.labelled_weight;
  const float* shift = a.adjustment;
  if (row < 0) {
    bool kept;
    target = predict<kTeam>(a.weak, i, &kept);
    weight = kept ? a.strong_weight : 0.0f;
    shift = a.strong_adjustment;
    row = a.labelled + i;
    end = a.rows.b;
  } else {
    target = a.targets[row];
  }
  for (; row < end; row += a.weak.u > 0 ? a.weak.u : 1) loss_row<kTeam>(a.rows, row, target, weight, shift);
}

}  // namespace

const char* head_loss(const HeadLoss& a, void* stream) {
  return launch_rows(head_loss_kernel<kWarp>, head_loss_kernel<kBlock>, a.rows.c, a.weak.u + a.labelled, a,
                     stream);
}

}  // namespace ulfine::cuda
