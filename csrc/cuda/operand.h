// Writing what products read.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "kernels.h"

namespace ulfine::cuda {

__device__ inline bool is_there(const Operand& a) { return a.full != nullptr || a.half != nullptr; }

// The numbers as T, which is float or uint16_t.
template <class T>
__device__ inline T* numbers(const Operand& a) {
  if constexpr (std::is_same_v<T, float>)
    return a.full;
  else
    return a.half;
}

__device__ inline void put(float* to, float x) { *to = x; }

__device__ inline void put(uint16_t* to, float x) { *to = __half_as_ushort(__float2half_rn(x)); }

__device__ inline void put(const Operand& to, int64_t at, float x) {
  if (to.half != nullptr)
    put(to.half + at, x);
  else
    put(to.full + at, x);
}

// The number at an address that may be null.
__device__ inline float factor_at(const float* address) { return address != nullptr ? *address : 1.0f; }

}  // namespace ulfine::cuda
