// Vectors of the instruction set that this translation unit is compiled for, through the compiler's own
// vector types: the source is one, the width differs.
//
// Everything here lives in a namespace named after the instruction set. Two sets must never share a symbol:
// the linker would keep one, and AVX-512 code would run on a processor without it. For the same reason the
// kernels use no code of the standard library.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#include "../row_math.h"
#include "kernels.h"

namespace ulfine::ULFINE_ISA {

#if defined(__AVX512F__)
constexpr int64_t kWidth = 16;
#elif defined(__AVX2__)
constexpr int64_t kWidth = 8;
#else
constexpr int64_t kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));

static inline Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

static inline Vec splat(float x) { return x - Vec{}; }

static inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Length of a row that is padded to whole vectors.
static inline int64_t padded(int64_t n) { return round_up(n, kWidth); }

// The lanes are added in one fixed order, so a sum has the same bits wherever it is computed.
static inline float sum(Vec v) {
  float total = 0.0f;
  for (int64_t i = 0; i < kWidth; ++i) total += v[i];
  return total;
}

static inline float max(Vec v) {
  float best = v[0];
  for (int64_t i = 1; i < kWidth; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// exp(x) for x <= 0 to about 2 ulp: x = n log 2 + r, a polynomial in r, then n added to the exponent bits.
// Below -87.3 the result is 0; NaN stays NaN.
static inline Vec exp(Vec x) {
  const Vec floor = splat(-87.33f);
  const IntVec tiny = x < floor;
  x = tiny ? floor : x;
  // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
  const Vec magic = splat(12582912.0f);
  const Vec n = (x * splat(1.44269504088896341f) + magic) - magic;
  Vec r = x - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + (r + splat(1.0f));
  const IntVec shifted = __builtin_convertvector(n, IntVec) << 23;
  IntVec bits;
  memcpy(&bits, &p, sizeof bits);
  bits += shifted;
  memcpy(&p, &bits, sizeof p);
  return tiny ? Vec{} : p;
}

// Sum of squares in double: one running sum per lane, so that it vectorises in a fixed order.
static inline double sum_of_squares(const float* p, int64_t n) {
  double lanes[kWidth] = {};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth)
    for (int64_t l = 0; l < kWidth; ++l) lanes[l] += static_cast<double>(p[i + l]) * p[i + l];
  double total = 0.0;
  for (int64_t l = 0; l < kWidth; ++l) total += lanes[l];
  for (; i < n; ++i) total += static_cast<double>(p[i]) * p[i];
  return total;
}

// One step of a transpose: lanes whose index has the bit `Step` change places between two rows.
template <int Step, int... Lane>
static inline void exchange(Vec& a, Vec& b, std::integer_sequence<int, Lane...>) {
  constexpr int width = static_cast<int>(kWidth);
  const Vec low = __builtin_shufflevector(a, b, ((Lane & Step) ? width + Lane - Step : Lane)...);
  b = __builtin_shufflevector(a, b, ((Lane & Step) ? width + Lane : Lane + Step)...);
  a = low;
}

template <int Step>
static inline void exchange_all(Vec* rows) {
  constexpr int width = static_cast<int>(kWidth);
#pragma GCC unroll 16
  for (int i = 0; i < width; ++i)
    if ((i & Step) == 0) exchange<Step>(rows[i], rows[i + Step], std::make_integer_sequence<int, width>{});
  if constexpr (2 * Step < width) exchange_all<2 * Step>(rows);
}

// to[j][i] = from[i][j] for a square of kWidth x kWidth.
static inline void transpose_square(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  Vec rows[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) rows[i] = load(from + i * ld_from);
  exchange_all<1>(rows);
  for (int64_t i = 0; i < kWidth; ++i) store(to + i * ld_to, rows[i]);
}

}  // namespace ulfine::ULFINE_ISA
