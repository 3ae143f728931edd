// Distribution of the pseudo-labels, class means of the labelled rows, and the step of the textual
// prototypes.
//
// One block has the distribution. After it, the first row of each class in the batch has a block.
#include "prototypes.h"

namespace ulfine::cuda {

namespace {

__global__ void __launch_bounds__(kBlock) distribution_kernel(ProtoFit a) { move_distribution(a); }

__global__ void __launch_bounds__(kBlock) proto_fit_kernel(ProtoFit a) {
  const int64_t first = blockIdx.x, k = a.targets[first];
  if (k < 0 || k >= a.c) return;
  if (sum_over<kBlock, int>(first, [=](int64_t i) { return a.targets[i] == k ? 1 : 0; }) > 0) return;
  fit_class(a, k, first);
}

}  // namespace

const char* proto_fit(const ProtoFit& a, void* stream) {
  const char* error = launch(distribution_kernel, 1, a, stream);
  return error != nullptr ? error : launch(proto_fit_kernel, a.b, a, stream);
}

}  // namespace ulfine::cuda
