// What a batch does to the distribution and to the prototypes of one class: a block has either.
//
// Letters: see kernels.h; k: a class, v, t: its visual and textual prototype.
#pragma once

#include "kernels.h"
#include "team.h"

namespace ulfine::cuda {

// The distribution and its largest share.
__device__ inline void move_distribution(const ProtoFit& a) {
  const auto mass = [=](int64_t k) {
    return a.counts != nullptr ? static_cast<float>(a.counts[k]) : a.mass[k];
  };
  const double total = sum_over<kBlock, double>(a.c, [=](int64_t k) { return static_cast<double>(mass(k)); });
  float largest = 0.0f;
  for (int64_t k = lane<kBlock>(); k < a.c; k += kBlock) {
    float share = a.distribution[k];
    if (total > 0.0)
      a.distribution[k] = share = running_share(share, mass(k), static_cast<float>(total), a.gamma);
    largest = larger(largest, share);
  }
  largest = reduce<kBlock>(largest, [](float x, float y) { return larger(x, y); });
  if (threadIdx.x == 0) *a.largest = largest;
}

// Class k, whose first row in the batch is `first`; the rows count in their order.
__device__ inline void fit_class(const ProtoFit& a, int64_t k, int64_t first) {
  int count = 0;
  for (int64_t i = first + threadIdx.x / kWarp; i < a.b; i += kBlock / kWarp) {
    if (a.targets[i] != k) continue;
    const float* x = a.features + i * a.d;
    const float squared = sum_over<kWarp, float>(a.d, [=](int64_t j) { return x[j] * x[j]; });
    if (lane<kWarp>() != 0) continue;
    a.inverse[i] = inverse_norm(squared);
    ++count;
  }
  // Its barriers also let every warp see the inverse norms of the others.
  const float rows = static_cast<float>(sum<kBlock>(count));

  float *v = a.visual + k * a.d, *t = a.textual + k * a.d;
  const bool seen = a.seen[k];
  for (int64_t j = threadIdx.x; j < a.d; j += kBlock) {
    float total = 0.0f;
    for (int64_t i = first; i < a.b; ++i)
      if (a.targets[i] == k) total += a.features[i * a.d + j] * a.inverse[i];
    v[j] = running_mean(v[j], seen, total, rows, a.beta);
  }
  const float on_v = inverse_norm(sum_over<kBlock, float>(a.d, [=](int64_t j) { return v[j] * v[j]; }));
  const float on_t = inverse_norm(sum_over<kBlock, float>(a.d, [=](int64_t j) { return t[j] * t[j]; }));
  if (threadIdx.x == 0) a.seen[k] = true;
  if (on_v == 0.0f) return;

  const float step = step_size(a.distribution[k], *a.largest, a.mu);
  const auto blend = [=](int64_t j) { return (1.0f - step) * (t[j] * on_t) + step * (v[j] * on_v); };
  const float norm = sqrtf(sum_over<kBlock, float>(a.d, [=](int64_t j) { return blend(j) * blend(j); }));
  if (!replaces(norm)) return;
  for (int64_t j = threadIdx.x; j < a.d; j += kBlock) t[j] = blend(j) / norm;
}

}  // namespace ulfine::cuda
