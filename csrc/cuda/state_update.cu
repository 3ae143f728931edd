// All that the head carries to the next step, in the launches that wait for each other: one block has what is
// of size C, then a block has a class. Posterior means wait twice more: one block adds up over the classes.
//
// Letters: see kernels.h; k: a class, v, t: its visual and textual prototype, n: its labelled examples, s:
// the sum of its kept weak rows.
#include "prototypes.h"

namespace ulfine::cuda {

namespace {

// Count and norm at or below which a mean and a direction are as good as 0.
constexpr float kSmallestCount = 1e-6f;
constexpr float kSmallestNorm = 1e-12f;

// NaN passes.
__device__ float at_least(float x, float low) { return x < low ? low : x; }

__device__ void count_rows(const StateUpdate& a) {
  for (int64_t k = threadIdx.x; k < a.fit.c; k += kBlock) a.counted[k] = 0;
  __syncthreads();
  using Count = unsigned long long;
  for (int64_t i = threadIdx.x; i < a.u; i += kBlock)
    if (a.label[i] >= 0 && a.label[i] < a.fit.c && !a.copies[i])
      atomicAdd(reinterpret_cast<Count*>(a.counted + a.label[i]), Count{1});
  __syncthreads();
}

__device__ void move_scales(const StateUpdate& a) {
  const float *scale = a.measured_scale, kept = static_cast<float>(a.scale_decay);
  if (scale[0] == 0.0f && scale[1] == 0.0f) return;
  for (int branch = 0; branch < 2; ++branch)
    a.branch_scale[branch] =
        *a.measured ? kept * a.branch_scale[branch] + rest_of(a.scale_decay) * scale[branch] : scale[branch];
  *a.measured = true;
}

__global__ void __launch_bounds__(kBlock) distributions_kernel(StateUpdate a) {
  if (!*a.finite) return;
  if (a.counted != nullptr) count_rows(a);
  move_distribution(a.fit);
  const int64_t kept = sum_over<kBlock, int64_t>(a.fit.c, [=](int64_t k) { return a.kept_counts[k]; });
  for (int64_t k = threadIdx.x; kept > 0 && k < a.fit.c; k += kBlock)
    a.kept_distribution[k] = running_share(a.kept_distribution[k], static_cast<float>(a.kept_counts[k]),
                                           static_cast<float>(kept), a.fit.gamma);
  if (threadIdx.x == 0) move_scales(a);
  if (a.posterior.kept_sum == nullptr) return;
  const int64_t labelled =
      sum_over<kBlock, int64_t>(a.fit.c, [=](int64_t k) { return a.posterior.labelled[k]; });
  if (threadIdx.x == 0) *a.posterior.unlabelled = a.posterior.unlabelled_mass * static_cast<float>(labelled);
}

__device__ float labelled_rows(const StateUpdate& a, int64_t k) {
  return a.fit.seen[k] ? static_cast<float>(a.posterior.labelled[k]) : 0.0f;
}

// One dimension of what the rows of a class say of its prototype, those with a label and those without.
struct Evidence {
  const float *v, *s;
  float n, unlabelled, count;

  __device__ float operator()(int64_t j) const { return n * v[j] + unlabelled * (s[j] / count); }
};

__device__ Evidence evidence_of(const StateUpdate& a, int64_t k) {
  return {a.fit.visual + k * a.fit.d, a.posterior.kept_sum + k * a.fit.d, labelled_rows(a, k),
          *a.posterior.unlabelled * a.kept_distribution[k],
          at_least(a.posterior.kept_count[k], kSmallestCount)};
}

__device__ void divide_by_norm(float* row, int64_t d) {
  const float squared = sum_over<kBlock, float>(d, [=](int64_t j) { return row[j] * row[j]; });
  const float norm = at_least(sqrtf(squared), kSmallestNorm);
  for (int64_t j = threadIdx.x; j < d; j += kBlock) row[j] /= norm;
}

// The kept weak rows of the class join its sum, in their order.
__device__ void add_kept_rows(const StateUpdate& a, int64_t k) {
  const Posterior& p = a.posterior;
  const int64_t d = a.fit.d;
  const float gamma = static_cast<float>(a.fit.gamma);
  for (int64_t i = threadIdx.x / kWarp; i < a.u; i += kBlock / kWarp) {
    if (!a.keep[i] || a.label[i] != k) continue;
    const float* x = p.weak + i * d;
    const float squared = sum_over<kWarp, float>(d, [=](int64_t j) { return x[j] * x[j]; });
    if (lane<kWarp>() == 0) p.inverse[i] = inverse_norm(squared);
  }
  __syncthreads();
  for (int64_t j = threadIdx.x; j < d; j += kBlock) {
    float total = 0.0f;
    for (int64_t i = 0; i < a.u; ++i)
      if (a.keep[i] && a.label[i] == k) total += p.weak[i * d + j] * p.inverse[i];
    p.kept_sum[k * d + j] = gamma * p.kept_sum[k * d + j] + total;
  }
  if (threadIdx.x == 0) p.kept_count[k] = gamma * p.kept_count[k] + static_cast<float>(a.kept_counts[k]);
}

__global__ void __launch_bounds__(kBlock) classes_kernel(StateUpdate a) {
  if (!*a.finite) return;
  const int64_t k = blockIdx.x, d = a.fit.d;
  if (a.normalize) divide_by_norm(a.fit.textual + k * d, d);
  int64_t first = a.fit.b;
  for (int64_t i = threadIdx.x; i < first; i += kBlock)
    if (a.fit.targets[i] == k) first = i;
  first = reduce<kBlock>(first, [](int64_t x, int64_t y) { return x < y ? x : y; });
  if (first < a.fit.b) fit_class(a.fit, k, first);
  if (a.posterior.kept_sum == nullptr) return;

  add_kept_rows(a, k);
  // Every thread reads what one of them wrote: the count, and whether the class was seen.
  __syncthreads();
  const Evidence evidence = evidence_of(a, k);
  const float* text = a.posterior.text + k * d;
  const float along = sum_over<kBlock, float>(d, [=](int64_t j) { return evidence.v[j] * text[j]; });
  const int wrong = sum_over<kBlock, int>(d, [=](int64_t j) { return is_finite(evidence(j)) ? 0 : 1; });
  // A class that is not finite stops all: NaN goes through the sum over classes.
  if (threadIdx.x == 0) a.posterior.along[k] = wrong > 0 ? NAN : evidence.n * along;
}

// The factor on the text, strength times the length of the text along the class means; 0 changes nothing.
__global__ void __launch_bounds__(kBlock) pull_kernel(StateUpdate a) {
  const double along =
      sum_over<kBlock, double>(a.fit.c, [=](int64_t k) { return static_cast<double>(a.posterior.along[k]); });
  const double labelled =
      sum_over<kBlock, double>(a.fit.c, [=](int64_t k) { return static_cast<double>(labelled_rows(a, k)); });
  // Without a labelled example it is NaN.
  const float pull = a.posterior.strength * static_cast<float>(along / labelled);
  if (threadIdx.x == 0) *a.posterior.pull = *a.finite && is_finite(pull) ? pull : 0.0f;
}

__global__ void __launch_bounds__(kBlock) posterior_kernel(StateUpdate a) {
  if (*a.posterior.pull == 0.0f) return;
  const int64_t k = blockIdx.x, d = a.fit.d;
  const Evidence evidence = evidence_of(a, k);
  float* t = a.fit.textual + k * d;
  for (int64_t j = threadIdx.x; j < d; j += kBlock)
    t[j] = evidence(j) + *a.posterior.pull * a.posterior.text[k * d + j];
  divide_by_norm(t, d);
}

}  // namespace

const char* state_update(const StateUpdate& a, void* stream) {
  const bool posterior = a.posterior.kept_sum != nullptr, classes = a.fit.b > 0 || a.normalize || posterior;
  const char* error = launch(distributions_kernel, 1, a, stream);
  if (error == nullptr && classes) error = launch(classes_kernel, a.fit.c, a, stream);
  if (error == nullptr && posterior) error = launch(pull_kernel, 1, a, stream);
  if (error == nullptr && posterior) error = launch(posterior_kernel, a.fit.c, a, stream);
  return error;
}

}  // namespace ulfine::cuda
