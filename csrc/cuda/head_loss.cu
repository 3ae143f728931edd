// All rows of one step: a team has a labelled row, or a weak row and after it the strong views of its image.
#include "softmax.h"

namespace ulfine::cuda {

namespace {

// Three blocks at a time: left to itself, the compiler aims at four and spills.
template <int kTeam, class Number>
__global__ void __launch_bounds__(kBlock, 3) head_loss_kernel(HeadLoss a) {
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
  for (; row < end; row += a.weak.u > 0 ? a.weak.u : 1)
    loss_row<kTeam, Number>(a.rows, row, target, weight, shift);
}

}  // namespace

const char* head_loss(const HeadLoss& a, void* stream) {
  const auto launch_with = [&](auto by_warps, auto by_blocks) {
    return launch_rows(by_warps, by_blocks, a.rows.c, a.weak.u + a.labelled, a, stream);
  };
  return a.rows.dz != nullptr
             ? launch_with(head_loss_kernel<kWarp, uint16_t>, head_loss_kernel<kBlock, uint16_t>)
             : launch_with(head_loss_kernel<kWarp, float>, head_loss_kernel<kBlock, float>);
}

}  // namespace ulfine::cuda
