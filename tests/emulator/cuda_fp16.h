// The part of CUDA's half type that the kernels use, for g++; see cuda_runtime.h.
#pragma once

#include <string.h>

using __half = _Float16;

inline __half __float2half_rn(float x) { return static_cast<__half>(x); }

inline unsigned short __half_as_ushort(__half x) {
  unsigned short bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
