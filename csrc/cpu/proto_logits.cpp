// logits = scale * unit(features) unit(prototypes)', and its gradient.
#include "bank.h"
#include "ops.h"

namespace ulfine::ULFINE_ISA {

namespace {

struct Memory {
  float *packed, *staging, *x, *z;
};

Memory layout(Scratch& scratch, int64_t b, int64_t c, int64_t d, int threads) {
  const int64_t block = block_rows(b, threads);
  return {scratch.take(packed_size(d, c)), scratch.take(threads * kStagingRows * padded(d)),
          scratch.take(threads * block * padded(d)), scratch.take(threads * block * padded(c))};
}

struct BackwardMemory {
  float *prototypes, *inverse, *packed, *x, *x_packed, *d_x, *d_prototypes;
};

BackwardMemory backward_layout(Scratch& scratch, int64_t c, int64_t d, int threads) {
  const int64_t ld = padded(d);
  return {scratch.take(c * ld),
          scratch.take(c),
          scratch.take(packed_size(c, d)),
          scratch.take(threads * kLargestBlock * ld),
          scratch.take(packed_size(kChunk, d)),
          scratch.take(threads * kLargestBlock * ld),
          scratch.take(c * ld)};
}

}  // namespace

int64_t proto_logits_scratch(int64_t b, int64_t c, int64_t d, int threads) {
  Scratch scratch(nullptr);
  layout(scratch, b, c, d, threads);
  return scratch.used();
}

void proto_logits(const ProtoLogits& a) {
  Scratch scratch(a.scratch);
  const Memory m = layout(scratch, a.b, a.c, a.d, a.threads);
  const int64_t block = block_rows(a.b, a.threads);
  const int64_t ldx = padded(a.d), ldz = padded(a.c);
  pack_bank(a.c, a.d, a.threads, m.staging, m.packed, nullptr, nullptr, [&](int64_t k, float* to, float*) {
    unit_row(a.prototypes + k * a.d, a.d, to);
    scale_row(to, a.scale, ldx);
  });
  parallel(ceil_div(a.b, block), a.threads, [&](int64_t task, int worker) {
    const int64_t first = task * block, rows = min(block, a.b - first);
    float *x = m.x + worker * block * ldx, *z = m.z + worker * block * ldz;
    for (int64_t i = 0; i < rows; ++i) unit_row(a.features + (first + i) * a.d, a.d, x + i * ldx);
    multiply(rows, a.c, a.d, {x, ldx, 1}, m.packed, z, ldz, false);
    for (int64_t i = 0; i < rows; ++i) memcpy(a.logits + (first + i) * a.c, z + i * ldz, a.c * sizeof(float));
  });
}

int64_t proto_logits_backward_scratch(int64_t, int64_t c, int64_t d, int threads) {
  Scratch scratch(nullptr);
  backward_layout(scratch, c, d, threads);
  return scratch.used();
}

void proto_logits_backward(const ProtoLogitsBackward& a) {
  Scratch scratch(a.scratch);
  const BackwardMemory m = backward_layout(scratch, a.c, a.d, a.threads);
  const int64_t ld = padded(a.d);
  parallel(a.c, a.threads, [&](int64_t k, int) {
    float* row = m.prototypes + k * ld;
    m.inverse[k] = unit_row(a.prototypes + k * a.d, a.d, row);
    if (a.d_features != nullptr) pack_row(row, a.d, a.c, k, m.packed);
  });
  if (a.b == 0) memset(m.d_prototypes, 0, a.c * ld * sizeof(float));
  for (int64_t chunk = 0; chunk < a.b; chunk += kChunk) {
    const int64_t chunk_rows = min(kChunk, a.b - chunk);
    const float* grad = a.grad + chunk * a.c;
    const int64_t block = block_rows(chunk_rows, a.threads);
    parallel(ceil_div(chunk_rows, block), a.threads, [&](int64_t task, int worker) {
      const int64_t first = task * block, rows = min(block, chunk_rows - first);
      float *x = m.x + worker * kLargestBlock * ld, *d_x = m.d_x + worker * kLargestBlock * ld;
      float inverse[kLargestBlock];
      for (int64_t i = 0; i < rows; ++i) {
        inverse[i] = unit_row(a.features + (chunk + first + i) * a.d, a.d, x + i * ld);
        if (a.d_prototypes != nullptr) pack_row(x + i * ld, a.d, chunk_rows, first + i, m.x_packed);
      }
      if (a.d_features == nullptr) return;
      multiply(rows, a.d, a.c, {grad + first * a.c, a.c, 1}, m.packed, d_x, ld, false);
      for (int64_t i = 0; i < rows; ++i)
        unit_row_backward(d_x + i * ld, x + i * ld, a.scale * inverse[i], a.d,
                          a.d_features + (chunk + first + i) * a.d);
    });
    if (a.d_prototypes != nullptr)
      bank_gradient(chunk_rows, a.c, a.d, grad, a.c, m.x_packed, m.d_prototypes, chunk > 0, a.threads);
  }
  if (a.d_prototypes == nullptr) return;
  parallel(a.c, a.threads, [&](int64_t k, int) {
    unit_row_backward(m.d_prototypes + k * ld, m.prototypes + k * ld, a.scale * m.inverse[k], a.d,
                      a.d_prototypes + k * a.d);
  });
}

}  // namespace ulfine::ULFINE_ISA
