// The formulas of one row or one element, for the CPU kernels of each instruction set and for the CUDA
// kernels: a formula that both compute stands here, so that they cannot disagree.
//
// ULFINE_ISA names the namespace of whoever includes this: avx512, cuda, ... Two of them never share a
// symbol.
#pragma once

#include <math.h>
#include <stdint.h>

#ifndef ULFINE_ISA
#error "ULFINE_ISA must name who includes this: baseline, avx2, avx512 or cuda"
#endif

#ifdef __CUDACC__
#define ULFINE_FORMULA __host__ __device__ static inline
#else
#define ULFINE_FORMULA static inline
#endif

namespace ulfine::ULFINE_ISA {

// Squared norm at or below which a row has no direction.
constexpr float kZeroNormSquared = 1e-12f;
// Norm of a blended prototype below which the old one stays.
constexpr float kSmallestBlend = 1e-6f;
// Stands for minus infinity where a row has no logit: exp() of it is 0, and unlike infinity it stays finite
// when a row maximum is subtracted.
constexpr float kPadLogit = -3.0e38f;

ULFINE_FORMULA bool is_finite(float x) { return x - x == 0.0f; }

// Inverse norm from a squared one: 0 for a row without direction, NaN for a row with a NaN.
ULFINE_FORMULA float inverse_norm(float squared) {
  return squared <= kZeroNormSquared ? 0.0f : 1.0f / sqrtf(squared);
}

// Gradient through y = x / |x| of one element, from the gradient d in y and radial = <d, y>.
ULFINE_FORMULA float unit_backward(float d, float radial, float y, float inverse) {
  return (d - radial * y) * inverse;
}

// What a share in [0, 1] leaves. The share is a double: near 1, a float one leaves hardly a correct digit.
ULFINE_FORMULA float rest_of(double share) { return static_cast<float>(1.0 - share); }

// Factors on the cosines of both branches in the fused logits.
struct Factors {
  float linear, proto;
};

ULFINE_FORMULA Factors fused_factors(double eta, float align, float linear_scale, float proto_scale) {
  return {static_cast<float>(eta) * linear_scale, rest_of(eta) * align * proto_scale};
}

// Label of a row and its share of the softmax; label -1 if that share is not finite.
struct Prediction {
  int64_t label;
  float confidence;
};

// From the largest logit, its class and the sum of exponentials below it; a label of `classes` is none.
ULFINE_FORMULA Prediction prediction(float top, int64_t label, float total, int64_t classes) {
  if (!(top > kPadLogit) || !is_finite(total) || label >= classes) return {-1, 0.0f};
  return {label, 1.0f / total};
}

ULFINE_FORMULA bool is_kept(Prediction p, const float* threshold, int64_t thresholds) {
  return p.label >= 0 && p.confidence >= threshold[thresholds > 1 ? p.label : 0];
}

// Whether a row has a part in the loss.
ULFINE_FORMULA bool takes_part(int64_t target, float weight, int64_t classes) {
  return target >= 0 && target < classes && weight != 0.0f;
}

// The sum of exponentials below the largest logit; NaN where all are minus infinity, or the padding would
// count.
ULFINE_FORMULA float softmax_total(float top, float total) { return top > kPadLogit ? total : NAN; }

// weight * cross-entropy as log(total) + (top - z_target): the other order loses every digit when the
// target's share is near 1.
ULFINE_FORMULA float row_loss(float top, float total, float z_target, float weight) {
  return weight * (logf(total) + (top - z_target));
}

// The larger one; NaN as soon as one is.
ULFINE_FORMULA float larger(float a, float b) { return b > a || b != b ? b : a; }

ULFINE_FORMULA float running_share(float share, float mass, float total, double gamma) {
  return static_cast<float>(gamma) * share + rest_of(gamma) * (mass / total);
}

// Running class mean of one dimension, from the sum of `count` new rows; the first rows set it.
ULFINE_FORMULA float running_mean(float visual, bool seen, float sum, float count, double beta) {
  const float share = 1.0f / count;
  return seen ? static_cast<float>(beta) * visual + rest_of(beta) * share * sum : share * sum;
}

// Step of a textual prototype towards its visual one.
ULFINE_FORMULA float step_size(float share, float largest, float mu) {
  return largest > 0.0f ? mu * (share / largest) : 0.0f;
}

ULFINE_FORMULA bool replaces(float blend_norm) {
  return blend_norm >= kSmallestBlend && is_finite(blend_norm);
}

// At least 1: the sums over the pairs of one class are 0.
ULFINE_FORMULA double ordered_pairs(int64_t classes) {
  return classes > 1 ? static_cast<double>(classes) * static_cast<double>(classes - 1) : 1.0;
}

// Mean squared cosine from its sum over all ordered pairs, which rounding may leave just outside of its
// range; NaN passes.
ULFINE_FORMULA float mean_squared_cosine(double total, int64_t classes) {
  const double mean = total / ordered_pairs(classes);
  return static_cast<float>(mean < 0.0 ? 0.0 : mean > 1.0 ? 1.0 : mean);
}

}  // namespace ulfine::ULFINE_ISA
