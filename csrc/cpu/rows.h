// What happens to one row: its direction, its softmax, its gradient. Rows are padded to whole vectors.
#pragma once

#include "simd.h"

namespace ulfine::ULFINE_ISA {

// Copies n floats and pads with zeros; `from` may have any alignment and no padding.
static inline void copy_padded(const float* from, int64_t n, float* to) {
  // Rows without dimensions may have no address, which memcpy takes for no size.
  if (n > 0) memcpy(to, from, n * sizeof(float));
  memset(to + n, 0, (padded(n) - n) * sizeof(float));
}

static inline float dot(const float* a, const float* b, int64_t n_padded) {
  Vec even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * kWidth <= n_padded; i += 2 * kWidth) {
    even += load(a + i) * load(b + i);
    odd += load(a + i + kWidth) * load(b + i + kWidth);
  }
  if (i < n_padded) even += load(a + i) * load(b + i);
  return sum(even + odd);
}

static inline void scale_row(float* row, float factor, int64_t n_padded) {
  for (int64_t i = 0; i < n_padded; i += kWidth) store(row + i, load(row + i) * splat(factor));
}

// y += factor * x
static inline void add_scaled(float* y, const float* x, float factor, int64_t n_padded) {
  for (int64_t i = 0; i < n_padded; i += kWidth) store(y + i, load(y + i) + load(x + i) * splat(factor));
}

// to = unit(from), padded; returns the inverse norm of `from`. The squares are summed in the pass that
// copies.
static inline float unit_row(const float* from, int64_t n, float* to) {
  const int64_t whole = n / (2 * kWidth) * (2 * kWidth);
  Vec even{}, odd{};
  for (int64_t i = 0; i < whole; i += 2 * kWidth) {
    const Vec a = load(from + i), b = load(from + i + kWidth);
    store(to + i, a);
    store(to + i + kWidth, b);
    even += a * a;
    odd += b * b;
  }
  copy_padded(from + whole, n - whole, to + whole);
  const float rest = dot(to + whole, to + whole, padded(n - whole));
  const float inverse = inverse_norm(sum(even + odd) + rest);
  scale_row(to, inverse, padded(n));
  return inverse;
}

// Gradient through y = x / |x|, without the padding. A row without direction gets none, whatever came back to
// it; an infinite one, whose inverse norm is 0 as well and whose y is NaN, gets NaN.
static inline void unit_row_backward(const float* d, const float* y, float inverse, int64_t n, float* to) {
  if (inverse == 0.0f && dot(y, y, padded(n)) == 0.0f) {
    if (n > 0) memset(to, 0, n * sizeof(float));
    return;
  }
  const float radial = dot(d, y, padded(n));
  for (int64_t i = 0; i < n; ++i) to[i] = unit_backward(d[i], radial, y[i], inverse);
}

// Softmax of factor * z in place, left unnormalised: z becomes exp(factor * (z - max)). Returns max and the
// sum.
struct Softmax {
  float top, total;
};

static inline Softmax exponentiate(float* z, const float* shift, int64_t n_padded, float factor = 1.0f) {
  Vec best = splat(kPadLogit);
  for (int64_t i = 0; i < n_padded; i += kWidth) {
    const Vec x = load(z + i) + load(shift + i);
    store(z + i, x);
    best = max(x, best);
  }
  const float top = max(best);
  Vec total{};
  for (int64_t i = 0; i < n_padded; i += kWidth) {
    const Vec e = exp((load(z + i) - splat(top)) * splat(factor));
    store(z + i, e);
    total += e;
  }
  return {top, sum(total)};
}

// Cross-entropy of one row; z becomes weight * (softmax - onehot). `shift` holds kPadLogit in the padding.
static inline float cross_entropy_row(float* z, const float* shift, int64_t target, float weight,
                                      int64_t n_padded) {
  const float z_target = z[target] + shift[target];
  const Softmax softmax = exponentiate(z, shift, n_padded);
  const float total = softmax_total(softmax.top, softmax.total);
  scale_row(z, weight / total, n_padded);
  z[target] -= weight;
  return row_loss(softmax.top, total, z_target, weight);
}

// Lowest index of the largest logit and its share of the softmax.
static inline Prediction predict_row(float* z, const float* shift, float inverse_temperature, int64_t n,
                                     int64_t n_padded) {
  Vec best = splat(kPadLogit);
  IntVec where{}, here;
  for (int64_t i = 0; i < kWidth; ++i) here[i] = static_cast<int32_t>(i);
  const int32_t width = static_cast<int32_t>(kWidth);
  for (int64_t i = 0; i < n_padded; i += kWidth) {
    const Vec x = load(z + i) + load(shift + i);
    const IntVec larger = x > best;
    best = larger ? x : best;
    where = larger ? here : where;
    here += width;
  }
  const float top = max(best);
  int64_t label = n;
  for (int64_t i = 0; i < kWidth; ++i)
    if (best[i] == top) label = min(label, where[i]);
  const Softmax softmax = exponentiate(z, shift, n_padded, inverse_temperature);
  return prediction(top, label, softmax.total, n);
}

}  // namespace ulfine::ULFINE_ISA
