// Before the products, unit rows; after them, the gradient through the norms and the sums over rows.
//
// Letters: see kernels.h; w, t: rows of linear and prototypes; a warp has a row, here always.
#include "kernels.h"
#include "operand.h"
#include "team.h"

namespace ulfine::cuda {

namespace {

__host__ __device__ int64_t rows_of(const UnitGradient& a) { return a.gradient != nullptr ? a.count : 0; }

__device__ float inverse_norm_of(const float* row, int64_t d) {
  return inverse_norm(sum_over<kWarp, float>(d, [=](int64_t i) { return row[i] * row[i]; }));
}

__device__ void unit_row(const UnitRows& a, const float* row, int64_t n) {
  const float own = inverse_norm_of(row, a.d);
  if (lane<kWarp>() == 0) a.x_inverse[n] = own;
  for (int64_t i = lane<kWarp>(); i < a.d; i += kWarp) put(a.x, n * a.d + i, row[i] * own);
}

// Largest factor on unit rows whose fold float16 holds, rounded to a power of two.
constexpr int kLargestExponent = 15;

__device__ float unit_of_fold(const Factors& on) {
  const float largest = fabsf(on.linear) + fabsf(on.proto);
  const bool fits = largest <= static_cast<float>(1 << kLargestExponent) || !is_finite(largest);
  return fits ? 1.0f : ldexpf(1.0f, ilogbf(largest) + 1 - kLargestExponent);
}

__device__ void bank_rows(const UnitRows& a, int64_t k) {
  const int64_t second = a.linear != nullptr ? a.c : 0;
  const float *w = a.linear + k * a.d, *t = a.prototypes + k * a.d;
  const float on_w = a.linear != nullptr && a.normalize_linear ? inverse_norm_of(w, a.d) : 1.0f;
  const float on_t = inverse_norm_of(t, a.d);
  if (lane<kWarp>() == 0) {
    if (a.linear != nullptr) a.bank_inverse[k] = on_w;
    a.bank_inverse[second + k] = on_t;
    if (a.histogram != nullptr) a.histogram[k] = a.kept_histogram[k] = 0;
  }
  if (is_there(a.bank))
    for (int64_t i = lane<kWarp>(); i < a.d; i += kWarp) {
      if (a.linear != nullptr) put(a.bank, k * a.d + i, w[i] * on_w);
      put(a.bank, (second + k) * a.d + i, t[i] * on_t);
    }
  if (a.text != nullptr)
    for (int64_t i = lane<kWarp>(); i < a.d; i += kWarp) a.text[k * a.d + i] = t[i] * on_t;
  if (!is_there(a.fold)) return;
  Factors on = fused_factors(a.eta, *a.align, a.linear_scale, a.proto_scale);
  if (a.fold_unit != nullptr) {
    const float unit = unit_of_fold(on);
    on = {on.linear / unit, on.proto / unit};
    if (k == 0 && lane<kWarp>() == 0) *a.fold_unit = unit;
  }
  for (int64_t i = lane<kWarp>(); i < a.d; i += kWarp)
    put(a.fold, k * a.d + i, on.linear * (w[i] * on_w) + on.proto * (t[i] * on_t));
}

__global__ void __launch_bounds__(kBlock) unit_rows_kernel(UnitRows a) {
  const int64_t row = team<kWarp>(), x_rows = a.u + a.b;
  if (row < x_rows)
    unit_row(a, row < a.u ? a.weak + row * a.d : a.features + (row - a.u) * a.d, row);
  else if (row < x_rows + a.c)
    bank_rows(a, row - x_rows);
}

// Handles `row` if it is one of these; returns what it is counted from their end.
__device__ int64_t backward_row(const UnitGradient& a, int64_t row, int64_t d) {
  const int64_t count = rows_of(a);
  if (row < 0 || row >= count) return row - count;
  float* g = a.gradient + row * d;
  const float* x = a.rows + row * d;
  const float inverse = a.normalized ? a.inverse[row] : 1.0f, factor = a.factor * factor_at(a.unit);
  // A row without direction gets no gradient, whatever came back to it; an infinite one, whose inverse norm
  // is 0 as well, gets NaN.
  const bool empty =
      inverse == 0.0f && sum_over<kWarp, float>(d, [=](int64_t i) { return x[i] * inverse; }) == 0.0f;
  const bool used = !empty && (a.used == nullptr || a.used[row]);
  const float radial = used && a.normalized
                           ? sum_over<kWarp, float>(d, [=](int64_t i) { return g[i] * (x[i] * inverse); })
                           : 0.0f;
  for (int64_t i = lane<kWarp>(); i < d; i += kWarp)
    g[i] = used ? unit_backward(g[i], radial, x[i] * inverse, factor * inverse) : 0.0f;
  return row - count;
}

__device__ void add_up(const Sums& a) {
  const double squares = sum_over<kBlock, double>(a.count, [=](int64_t i) { return a.squares[i]; });
  const float value = a.count > 0 ? mean_squared_cosine(squares, a.c) : 0.0f;
  const double loss =
      sum_over<kBlock, double>(a.b, [=](int64_t i) { return static_cast<double>(a.row_loss[i]); });
  const auto counted = [=](int64_t i) {
    return is_finite(a.spread[2 * i]) && is_finite(a.spread[2 * i + 1]);
  };
  const auto spread = [=](int64_t i, int branch) {
    return counted(i) ? static_cast<double>(a.spread[2 * i + branch]) : 0.0;
  };
  const double rows =
      sum_over<kBlock, double>(a.scale_rows, [=](int64_t i) { return counted(i) ? 1.0 : 0.0; });
  const double linear = sum_over<kBlock, double>(a.scale_rows, [=](int64_t i) { return spread(i, 0); });
  const double proto = sum_over<kBlock, double>(a.scale_rows, [=](int64_t i) { return spread(i, 1); });
  if (threadIdx.x != 0) return;
  if (a.value != nullptr) *a.value = value;
  if (a.loss != nullptr) *a.loss = static_cast<float>(loss) + a.orthogonality_weight * value;
  if (a.branch_scale == nullptr) return;
  a.branch_scale[0] = rows > 0.0 ? static_cast<float>(linear / rows) : 0.0f;
  a.branch_scale[1] = rows > 0.0 ? static_cast<float>(proto / rows) : 0.0f;
}

// The first block adds up, which takes longest.
__global__ void __launch_bounds__(kBlock) finish_kernel(Finish a) {
  if (blockIdx.x == 0) return add_up(a.sums);
  int64_t row = team<kWarp>() - kBlock / kWarp;
  row = backward_row(a.features, row, a.d);
  row = backward_row(a.linear, row, a.d);
  backward_row(a.prototypes, row, a.d);
}

constexpr int64_t blocks_of_warps(int64_t rows) { return (rows + kBlock / kWarp - 1) / (kBlock / kWarp); }

}  // namespace

const char* unit_rows(const UnitRows& a, void* stream) {
  return launch(unit_rows_kernel, blocks_of_warps(a.u + a.b + a.c), a, stream);
}

const char* finish(const Finish& a, void* stream) {
  const int64_t rows = rows_of(a.features) + rows_of(a.linear) + rows_of(a.prototypes);
  return launch(finish_kernel, 1 + blocks_of_warps(rows), a, stream);
}

}  // namespace ulfine::cuda
