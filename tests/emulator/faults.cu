// Kernels with one fault each, which the emulator has to notice, and one without.
#include "cuda/team.h"

namespace ulfine::cuda {

namespace {

struct Fault {
  float* out;  // [256]
};

// Two sums over the block, the second in the shared memory of the first.
__global__ void no_fault(Fault a) {
  const float once = sum<kBlock>(static_cast<float>(threadIdx.x));
  const float thrice = sum<kBlock>(3.0f * static_cast<float>(threadIdx.x));
  a.out[threadIdx.x] = thrice - 2.0f * once;
}

__global__ void barrier_for_some(Fault a) {
  if (threadIdx.x < 100) return;
  a.out[threadIdx.x] = sum<kBlock>(1.0f);
}

__global__ void shuffle_for_some(Fault a) {
  if (threadIdx.x % kWarp != 7) a.out[threadIdx.x] = sum<kWarp>(1.0f);
}

__global__ void unwritten_shared_memory(Fault a) {
  __shared__ float place;
  a.out[threadIdx.x] = place;
}

// Every thread reads what another wrote, without a barrier between.
__global__ void race(Fault a) { a.out[threadIdx.x] += a.out[threadIdx.x ^ 1]; }

}  // namespace

}  // namespace ulfine::cuda

extern "C" __attribute__((visibility("default"))) const char* run(int fault, float* out) {
  using namespace ulfine::cuda;
  void (*const kernels[])(Fault) = {no_fault, barrier_for_some, shuffle_for_some, unwritten_shared_memory,
                                    race};
  return launch(kernels[fault], 1, Fault{out}, nullptr);
}
