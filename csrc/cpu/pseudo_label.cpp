// Pseudo-labels of weak rows. Both branches are folded into one bank,
//   eta * linear_scale * unit(w) + (1 - eta) * align * proto_scale * unit(t),
// so a row costs one product, not two; only the rows that the branch scales are measured on meet both banks.
#include "bank.h"
#include "ops.h"

namespace ulfine::ULFINE_ISA {

namespace {

struct Memory {
  int64_t block;  // rows per task
  float *fused, *staging, *shift, *x, *z;
  // Of the branch scales: factor of each class row, a panel of transposed rows, its logits, the deviations.
  float *factor[2], *panel, *spread;
};

Memory layout(Scratch& scratch, int64_t b, int64_t c, int64_t d, int64_t scale_rows, int threads) {
  Memory m{};
  m.fused = scratch.take(packed_size(d, c));
  m.staging = scratch.take(threads * kStagingRows * padded(d));
  m.shift = scratch.take(padded(c));
  m.block = block_rows(b, threads);
  m.x = scratch.take(threads * m.block * padded(d));
  m.z = scratch.take(threads * max(m.block * padded(c), c * kPanel));
  m.factor[0] = scratch.take(c);
  m.factor[1] = scratch.take(c);
  m.panel = scratch.take(threads * d * kPanel);
  m.spread = scratch.take(2 * round_up(min(b, scale_rows), kPanel));
  return m;
}

// Standard deviations over the classes of the kPanel columns of z[C, kPanel], after row k is multiplied by
// factor[k]. One row of features is one lane, so nothing is summed across lanes.
void spread_of_columns(float* z, const float* factor, int64_t c, float* spread) {
  for (int64_t v = 0; v < kPanel; v += kWidth) {
    Vec mean{}, variance{};
    for (int64_t k = 0; k < c; ++k) {
      float* logit = z + k * kPanel + v;
      store(logit, load(logit) * splat(factor[k]));
      mean += load(logit);
    }
    mean /= splat(static_cast<float>(c));
    for (int64_t k = 0; k < c; ++k) {
      const Vec off = load(z + k * kPanel + v) - mean;
      variance += off * off;
    }
    for (int64_t i = 0; i < kWidth; ++i) spread[v + i] = sqrtf(variance[i] / static_cast<float>(c));
  }
}

// Standard deviations of both branches for the first scale_rows rows, spread[branch * rounded rows + row].
// Class rows are read where they lie: with this few rows, packing a bank would cost more than its product.
void measure_scales(const PseudoLabel& a, const Memory& m, int64_t rounded) {
  const int64_t ldx = padded(a.d);
  parallel(rounded / kPanel, a.threads, [&](int64_t task, int worker) {
    const int64_t first = task * kPanel, rows = min(kPanel, a.scale_rows - first);
    float* own = m.staging + worker * kStagingRows * ldx;
    for (int64_t i = 0; i < kPanel; ++i) {
      if (i < rows)
        unit_row(a.features + (first + i) * a.d, a.d, own + i * ldx);
      else
        memset(own + i * ldx, 0, ldx * sizeof(float));
    }
    float *panel = m.panel + worker * a.d * kPanel,
          *z = m.z + worker * max(m.block * padded(a.c), a.c * kPanel);
    pack_transposed(own, ldx, kPanel, a.d, 0, panel);
    for (int branch = 0; branch < 2; ++branch) {
      multiply(a.c, kPanel, a.d, row_major(branch == 0 ? a.linear : a.prototypes, a.d), panel, z, kPanel,
               false);
      spread_of_columns(z, m.factor[branch], a.c, m.spread + branch * rounded + first);
    }
  });
}

}  // namespace

int64_t pseudo_label_scratch(int64_t b, int64_t c, int64_t d, int64_t scale_rows, int threads) {
  Scratch scratch(nullptr);
  layout(scratch, b, c, d, scale_rows, threads);
  return scratch.used();
}

void pseudo_label(const PseudoLabel& a) {
  Scratch scratch(a.scratch);
  const Memory m = layout(scratch, a.b, a.c, a.d, a.scale_rows, a.threads);
  const int64_t ldx = padded(a.d), ldz = padded(a.c);
  memset(a.histogram, 0, a.c * sizeof(int64_t));
  memset(a.kept_histogram, 0, a.c * sizeof(int64_t));
  a.branch_scale[0] = a.branch_scale[1] = 0.0f;
  if (a.b == 0 && a.bank == nullptr) return;

  const float inverse_temperature = 1.0f / a.temperature;
  const Factors on = fused_factors(a.eta, a.align, a.linear_scale, a.proto_scale);
  float* bank = a.bank != nullptr ? a.bank->transposed : m.fused;
  pack_bank(a.c, a.d, a.threads, m.staging, bank, a.bank != nullptr ? a.bank->packed : nullptr,
            [&](int64_t k, float* to, float* text) {
              m.factor[0][k] = a.linear_scale * linear_row(a.linear, k, a.d, a.normalize_linear, to);
              scale_row(to, on.linear, ldx);
              m.factor[1][k] = a.proto_scale * unit_row(a.prototypes + k * a.d, a.d, text);
              add_scaled(to, text, on.proto, ldx);
            });
  const int64_t rounded = round_up(a.scale_rows, kPanel);
  measure_scales(a, m, rounded);
  if (a.adjustment != nullptr)
    memcpy(m.shift, a.adjustment, a.c * sizeof(float));
  else
    memset(m.shift, 0, a.c * sizeof(float));
  for (int64_t k = a.c; k < ldz; ++k) m.shift[k] = kPadLogit;

  parallel(ceil_div(a.b, m.block), a.threads, [&](int64_t task, int worker) {
    const int64_t first = task * m.block, rows = min(m.block, a.b - first);
    float *x = m.x + worker * m.block * ldx, *z = m.z + worker * max(m.block * ldz, a.c * kPanel);
    for (int64_t i = 0; i < rows; ++i) unit_row(a.features + (first + i) * a.d, a.d, x + i * ldx);

    multiply(rows, a.c, a.d, row_major(x, ldx), bank, z, ldz, false);
    for (int64_t i = 0; i < rows; ++i) {
      const Prediction p = predict_row(z + i * ldz, m.shift, inverse_temperature, a.c, ldz);
      a.label[first + i] = p.label;
      a.confidence[first + i] = p.confidence;
      a.keep[first + i] = is_kept(p, a.threshold, a.thresholds);
    }
  });

  for (int64_t i = 0; i < a.b; ++i) {
    if (a.label[i] < 0) continue;
    ++a.histogram[a.label[i]];
    a.kept_histogram[a.label[i]] += a.keep[i];
  }
  double total[2] = {0.0, 0.0};
  int64_t counted = 0;
  for (int64_t i = 0; i < a.scale_rows; ++i) {
    const float linear = m.spread[i], proto = m.spread[rounded + i];
    if (!is_finite(linear) || !is_finite(proto)) continue;
    total[0] += linear;
    total[1] += proto;
    ++counted;
  }
  if (counted == 0) return;
  for (int branch = 0; branch < 2; ++branch)
    a.branch_scale[branch] = static_cast<float>(total[branch] / counted);
}

}  // namespace ulfine::ULFINE_ISA
