// logits = scale * unit(features) unit(prototypes)': one product in tiles; the norms come from the same
// loads.
#include "kernels.h"

namespace ulfine::cuda {

namespace {

// A block of 16 x 16 threads owns a 16 x 16 tile of logits and walks over D in steps of 16.
constexpr int kTile = 16;
// Squared norm at or below which a row has no direction and gives logits of 0.
constexpr float kZeroNormSquared = 1e-12f;

__device__ float inverse_norm(float squared) { return squared <= kZeroNormSquared ? 0.0f : rsqrtf(squared); }

__global__ void proto_logits_kernel(const float* __restrict__ features, const float* __restrict__ prototypes,
                                    float* __restrict__ logits, int64_t b, int64_t c, int64_t d,
                                    float scale) {
  // One column more than the tile: neighbouring threads then read different banks of shared memory.
  __shared__ float x[kTile][kTile + 1], p[kTile][kTile + 1];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.y;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kTile + threadIdx.x;
  const int64_t loaded = static_cast<int64_t>(blockIdx.y) * kTile + threadIdx.y;
  float product = 0.0f, x_squared = 0.0f, p_squared = 0.0f;
  for (int64_t k0 = 0; k0 < d; k0 += kTile) {
    const int64_t k = k0 + threadIdx.x;
    x[threadIdx.y][threadIdx.x] = row < b && k < d ? features[row * d + k] : 0.0f;
    p[threadIdx.y][threadIdx.x] = loaded < c && k < d ? prototypes[loaded * d + k] : 0.0f;
    __syncthreads();
    for (int i = 0; i < kTile; ++i) {
      const float u = x[threadIdx.y][i], v = p[threadIdx.x][i];
      product += u * v;
      x_squared += u * u;
      p_squared += v * v;
    }
    __syncthreads();
  }
  if (row < b && column < c)
    logits[row * c + column] = scale * ((product * inverse_norm(x_squared)) * inverse_norm(p_squared));
}

}  // namespace

const char* proto_logits(const float* features, const float* prototypes, float* logits, int64_t b, int64_t c,
                         int64_t d, float scale, void* stream) {
  if (b == 0) return nullptr;
  const dim3 threads(kTile, kTile);
  const dim3 blocks(static_cast<unsigned>((b + kTile - 1) / kTile),
                    static_cast<unsigned>((c + kTile - 1) / kTile));
  proto_logits_kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(features, prototypes, logits,
                                                                                 b, c, d, scale);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace ulfine::cuda
