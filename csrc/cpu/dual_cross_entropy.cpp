// Cross-entropy of labelled and strong rows over both branches, with its gradients in the same pass.
//
// "fused" folds both branches into one bank (one product each for logits and feature gradient); "branches"
// keeps two. Rows without weight or target are dropped before anything is computed for them. Logits exist for
// a chunk of rows at a time, where the gradient overwrites them.
#include "bank.h"
#include "ops.h"

namespace ulfine::ULFINE_ISA {

namespace {

struct Memory {
  int64_t chunk;  // rows whose logits exist at a time
  PackedBank bank[2];
  int64_t* row;
  float *staging, *shift, *loss, *x, *x_packed, *z, *d_x;
  BankGradient d_linear;
};

Memory layout(Scratch& scratch, int64_t b, int64_t c, int64_t d, int64_t groups, bool fused,
              bool need_features, bool need_linear, int threads) {
  const int64_t ldx = padded(d), ldz = padded(c);
  Memory m{};
  m.chunk = min(kChunk, round_up(max(b, 1), kRows));
  const int64_t block = min(m.chunk, kLargestBlock);
  for (int i = 0; i < (fused ? 1 : 2); ++i) {
    m.bank[i].transposed = scratch.take(packed_size(d, c));
    if (need_features) m.bank[i].packed = scratch.take(packed_size(c, d));
  }
  m.row = scratch.take_indices(b);
  m.staging = scratch.take(threads * kStagingRows * ldx);
  m.shift = scratch.take((groups + 1) * ldz);
  m.loss = scratch.take(b);
  m.x = scratch.take(threads * block * ldx);
  m.z = scratch.take((fused ? 1 : 2) * m.chunk * ldz);
  if (need_features) m.d_x = scratch.take(threads * block * ldx);
  if (need_linear) {
    m.x_packed = scratch.take(packed_size(m.chunk, d));
    m.d_linear = bank_gradient_layout(scratch, c, d, threads);
  }
  return m;
}

}  // namespace

int64_t dual_cross_entropy_scratch(int64_t b, int64_t c, int64_t d, int64_t groups, bool fused,
                                   bool need_features, bool need_linear, int threads) {
  Scratch scratch(nullptr);
  layout(scratch, b, c, d, groups, fused, need_features, need_linear, threads);
  return scratch.used();
}

void dual_cross_entropy(const DualCrossEntropy& a) {
  const bool need_features = a.d_features != nullptr, need_linear = a.d_linear != nullptr;
  Scratch scratch(a.scratch);
  Memory m = layout(scratch, a.b, a.c, a.d, a.groups, a.fused, need_features, need_linear, a.threads);
  const int64_t ldx = padded(a.d), ldz = padded(a.c);
  const int banks = a.fused ? 1 : 2;

  // Group g has its shift in row g + 1; row 0 is "no adjustment".
  memset(m.shift, 0, a.c * sizeof(float));
  for (int64_t g = 0; g < a.groups; ++g)
    memcpy(m.shift + (g + 1) * ldz, a.adjustment + g * a.c, a.c * sizeof(float));
  for (int64_t g = 0; g <= a.groups; ++g)
    for (int64_t k = a.c; k < ldz; ++k) m.shift[g * ldz + k] = kPadLogit;

  int64_t used = 0;
  for (int64_t i = 0; i < a.b; ++i) {
    if (takes_part(a.targets[i], a.weights[i], a.c))
      m.row[used++] = i;
    else if (need_features)
      memset(a.d_features + i * a.d, 0, a.d * sizeof(float));
  }

  const Factors on = a.fused ? fused_factors(a.eta, a.align, a.linear_scale, a.proto_scale)
                             : Factors{a.linear_scale, a.proto_scale};
  if (a.bank != nullptr)
    m.bank[0] = {a.bank->transposed, a.bank->packed};
  else
    pack_bank(a.c, a.d, a.threads, m.staging, m.bank[0].transposed, m.bank[0].packed,
              [&](int64_t k, float* to, float* text) {
                linear_row(a.linear, k, a.d, a.normalize_linear, to);
                scale_row(to, on.linear, ldx);
                if (!a.fused) return;
                unit_row(a.prototypes + k * a.d, a.d, text);
                add_scaled(to, text, on.proto, ldx);
              });
  if (!a.fused)
    pack_bank(a.c, a.d, a.threads, m.staging, m.bank[1].transposed, m.bank[1].packed,
              [&](int64_t k, float* to, float*) {
                unit_row(a.prototypes + k * a.d, a.d, to);
                scale_row(to, on.proto, ldx);
              });

  // Without a row there is one empty chunk, which makes the gradient of the linear bank zero.
  for (int64_t chunk = 0; chunk == 0 || chunk < used; chunk += m.chunk) {
    const int64_t chunk_rows = min(m.chunk, used - chunk);
    const int64_t block = block_rows(chunk_rows, a.threads), largest = min(m.chunk, kLargestBlock);
    parallel(ceil_div(chunk_rows, block), a.threads, [&](int64_t task, int worker) {
      const int64_t first = task * block, rows = min(block, chunk_rows - first);
      const int64_t* row = m.row + chunk + first;
      float *x = m.x + worker * largest * ldx, *loss = m.loss + chunk + first;
      float inverse[kLargestBlock];
      for (int64_t i = 0; i < rows; ++i) {
        inverse[i] = unit_row(a.features + row[i] * a.d, a.d, x + i * ldx);
        if (need_linear) pack_row(x + i * ldx, a.d, chunk_rows, first + i, m.x_packed);
        loss[i] = 0.0f;
      }
      for (int bank = 0; bank < banks; ++bank) {
        float* z = m.z + (bank * m.chunk + first) * ldz;
        multiply(rows, a.c, a.d, row_major(x, ldx), m.bank[bank].transposed, z, ldz, false);
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t g = a.group != nullptr ? a.group[row[i]] : 0;
          const float* shift = m.shift + (g < 0 || g >= a.groups ? 0 : g + 1) * ldz;
          loss[i] += cross_entropy_row(z + i * ldz, shift, a.targets[row[i]], a.weights[row[i]], ldz);
        }
      }
      if (!need_features) return;
      float* d_x = m.d_x + worker * largest * ldx;
      for (int bank = 0; bank < banks; ++bank)
        multiply(rows, a.d, a.c, row_major(m.z + (bank * m.chunk + first) * ldz, ldz), m.bank[bank].packed,
                 d_x, ldx, bank > 0);
      for (int64_t i = 0; i < rows; ++i)
        unit_row_backward(d_x + i * ldx, x + i * ldx, inverse[i], a.d, a.d_features + row[i] * a.d);
    });
    if (!need_linear) continue;
    bank_gradient(m.d_linear, chunk_rows, a.c, a.d, m.z, ldz, m.x_packed, chunk == 0,
                  chunk + chunk_rows == used, a.threads, [&](int64_t k, float* row, int worker) {
                    float *w = m.staging + worker * kStagingRows * ldx, *to = a.d_linear + k * a.d;
                    const float inverse = linear_row(a.linear, k, a.d, a.normalize_linear, w);
                    if (a.normalize_linear) return unit_row_backward(row, w, on.linear * inverse, a.d, to);
                    scale_row(row, on.linear, ldx);
                    memcpy(to, row, a.d * sizeof(float));
                  });
  }

  double loss = 0.0;
  for (int64_t i = 0; i < used; ++i) loss += m.loss[i];
  *a.loss = static_cast<float>(loss);
}

}  // namespace ulfine::ULFINE_ISA
