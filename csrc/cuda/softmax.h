// What happens to one row of logits: prediction, spread, cross-entropy with its gradient. A row is read
// twice, once for its largest logit and the sum of exponentials together, once for what depends on them.
//
// Letters: see kernels.h; z: a row of logits or cosines.
#pragma once

#include "kernels.h"
#include "operand.h"
#include "team.h"

namespace ulfine::cuda {

// Of some logits: the largest, the lowest class that has it, and the sum of exponentials below it.
struct Softmax {
  float top, total;
  int label;
};

// Of both; `factor` is on the logits in the exponent. A logit that is not finite makes the sum NaN.
__device__ inline Softmax merge(Softmax a, Softmax b, float factor) {
  const bool second = b.top > a.top || (b.top == a.top && b.label < a.label);
  const float top = second ? b.top : a.top;
  return {top, a.total * expf((a.top - top) * factor) + b.total * expf((b.top - top) * factor),
          second ? b.label : a.label};
}

template <int kTeam, class Logit>
__device__ inline Softmax softmax_over(int64_t c, float factor, const Logit& logit) {
  Softmax own{kPadLogit, 0.0f, static_cast<int>(c)};
  for (int64_t k = lane<kTeam>(); k < c; k += kTeam)
    own = merge(own, {logit(k), 1.0f, static_cast<int>(k)}, factor);
  return reduce<kTeam>(own, [=](const Softmax& a, const Softmax& b) { return merge(a, b, factor); });
}

__device__ inline float shift_of(const float* shift, int64_t k) { return shift != nullptr ? shift[k] : 0.0f; }

// Standard deviation over the classes of scale * z.
template <int kTeam>
__device__ inline float spread_of(const float* z, int64_t c, float scale) {
  const float mean =
      sum_over<kTeam, float>(c, [=](int64_t k) { return scale * z[k]; }) / static_cast<float>(c);
  const float squares = sum_over<kTeam, float>(c, [=](int64_t k) {
    const float off = scale * z[k] - mean;
    return off * off;
  });
  return sqrtf(squares / static_cast<float>(c));
}

// Pseudo-label of weak row i, written and counted; every thread of the team gets it.
template <int kTeam>
__device__ inline int64_t predict(const WeakRows& a, int64_t i, bool* kept) {
  const Factors on = fused_factors(a.eta, *a.align, a.linear_scale, a.proto_scale);
  const float *z = a.fused + i * a.c, *cosines = a.cosines + i * 2 * a.c;
  const float unit = factor_at(a.fold_unit);
  const Softmax s = softmax_over<kTeam>(a.c, 1.0f / a.temperature, [&](int64_t k) {
    const float fused =
        a.fused != nullptr ? unit * z[k] : on.linear * cosines[k] + on.proto * cosines[a.c + k];
    return fused + shift_of(a.adjustment, k);
  });
  const Prediction p = prediction(s.top, s.label, s.total, a.c);
  *kept = is_kept(p, a.threshold, a.thresholds);
  if (i < a.scale_rows) {
    const float linear = spread_of<kTeam>(cosines, a.c, a.linear_scale);
    const float proto = spread_of<kTeam>(cosines + a.c, a.c, a.proto_scale);
    if (lane<kTeam>() == 0) {
      a.spread[2 * i] = linear;
      a.spread[2 * i + 1] = proto;
    }
  }
  if (lane<kTeam>() == 0) {
    a.label[i] = p.label;
    a.confidence[i] = p.confidence;
    a.keep[i] = *kept;
    // Integers: their sum does not depend on the order.
    using Count = unsigned long long;
    if (p.label >= 0) atomicAdd(reinterpret_cast<Count*>(a.histogram + p.label), Count{1});
    if (*kept) atomicAdd(reinterpret_cast<Count*>(a.kept_histogram + p.label), Count{1});
  }
  return p.label;
}

// weight * CE(scale * z + shift) on the lane that has the target; dz, which may be z, becomes the gradient in
// the logits times `slope`.
template <int kTeam, class Number>
__device__ inline float cross_entropy(const LossRows& a, const float* z, Number* dz, float scale, float slope,
                                      const float* shift, int64_t target, float weight) {
  const auto logit = [=](int64_t k) { return scale * z[k] + shift_of(shift, k); };
  const bool own = lane<kTeam>() == target % kTeam;
  const float z_target = own ? logit(target) : 0.0f;
  const Softmax s = softmax_over<kTeam>(a.c, 1.0f, logit);
  const float on = slope * weight * a.on_gradient;
  if (a.on_gradient != 0.0f)
    for (int64_t k = lane<kTeam>(); k < a.c; k += kTeam)
      put(dz + k, expf(logit(k) - s.top) * (on / s.total) - (k == target ? on : 0.0f));
  return own ? row_loss(s.top, s.total, z_target, weight) : 0.0f;
}

// Loss and gradient of row i. One without a part in the loss leaves zeros, whatever it held, where the
// gradient of the linear bank would meet it. The operands are of Number.
template <int kTeam, class Number>
__device__ inline void loss_row(const LossRows& a, int64_t i, int64_t target, float weight,
                                const float* shift) {
  const int64_t width = a.fused ? a.c : 2 * a.c;
  const float* z = a.z + i * width;
  Number* dz = numbers<Number>({a.z, a.dz}) + i * width;
  const bool used = takes_part(target, weight, a.c);
  if (lane<kTeam>() == 0) a.used[i] = used;
  if (!used) {
    for (int64_t k = lane<kTeam>(); k < a.c; k += kTeam) put(dz + k, 0.0f);
    for (int64_t k = lane<kTeam>(); k < a.d; k += kTeam) put(numbers<Number>(a.x) + i * a.d + k, 0.0f);
    if (lane<kTeam>() == 0) a.loss[i] = 0.0f;
    return;
  }
  float loss = 0.0f;
  for (int64_t branch = 0; branch < width; branch += a.c) {
    const float on_branch = branch == 0 ? a.linear_scale : a.proto_scale;
    const float scale = a.fused ? factor_at(a.fold_unit) : on_branch, slope = a.fused ? 1.0f : on_branch;
    loss += cross_entropy<kTeam>(a, z + branch, dz + branch, scale, slope, shift, target, weight);
  }
  if (lane<kTeam>() == target % kTeam) a.loss[i] = loss;
}

}  // namespace ulfine::cuda
