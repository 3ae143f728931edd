// logits = scale * unit(features) unit(prototypes)', and its gradient.
#include "bank.h"
#include "ops.h"

namespace ulfine::ULFINE_ISA {

namespace {

struct Memory {
  float *packed, *staging, *x, *last;  // `last`: logits of the last panel
};

Memory layout(Scratch& scratch, int64_t b, int64_t c, int64_t d, int threads) {
  const int64_t block = block_rows(b, threads);
  return {scratch.take(packed_size(d, c)), scratch.take(threads * kStagingRows * padded(d)),
          scratch.take(threads * block * padded(d)), scratch.take(threads * block * kPanel)};
}

struct BackwardMemory {
  float *packed, *staging, *x, *x_packed, *d_x;
  BankGradient d_prototypes;
};

BackwardMemory backward_layout(Scratch& scratch, int64_t c, int64_t d, int threads) {
  const int64_t ld = padded(d);
  return {scratch.take(packed_size(c, d)),
          scratch.take(threads * ld),
          scratch.take(threads * kLargestBlock * ld),
          scratch.take(packed_size(kChunk, d)),
          scratch.take(threads * kLargestBlock * ld),
          bank_gradient_layout(scratch, c, d, threads)};
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
  const int64_t ldx = padded(a.d);
  // Panels that are full go straight to the logits, the last one by way of a buffer with room for its
  // padding.
  const int64_t whole = a.c / kPanel * kPanel, rest = a.c - whole;
  pack_bank(a.c, a.d, a.threads, m.staging, m.packed, nullptr, [&](int64_t k, float* to, float*) {
    unit_row(a.prototypes + k * a.d, a.d, to);
    scale_row(to, a.scale, ldx);
  });
  parallel(ceil_div(a.b, block), a.threads, [&](int64_t task, int worker) {
    const int64_t first = task * block, rows = min(block, a.b - first);
    float *x = m.x + worker * block * ldx, *last = m.last + worker * block * kPanel;
    float* logits = a.logits + first * a.c;
    for (int64_t i = 0; i < rows; ++i) unit_row(a.features + (first + i) * a.d, a.d, x + i * ldx);
    multiply(rows, whole, a.d, row_major(x, ldx), m.packed, logits, a.c, false);
    multiply(rows, rest, a.d, row_major(x, ldx), m.packed + a.d * whole, last, kPanel, false);
    for (int64_t i = 0; i < rows; ++i)
      memcpy(logits + i * a.c + whole, last + i * kPanel, rest * sizeof(float));
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
  if (a.d_features != nullptr) {
    parallel(a.c, a.threads, [&](int64_t k, int worker) {
      float* row = m.staging + worker * ld;
      unit_row(a.prototypes + k * a.d, a.d, row);
      pack_row(row, a.d, a.c, k, m.packed);
    });
  }
  // Without a row there is one empty chunk, which makes the gradient of the prototypes zero.
  for (int64_t chunk = 0; chunk == 0 || chunk < a.b; chunk += kChunk) {
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
      multiply(rows, a.d, a.c, row_major(grad + first * a.c, a.c), m.packed, d_x, ld, false);
      for (int64_t i = 0; i < rows; ++i)
        unit_row_backward(d_x + i * ld, x + i * ld, a.scale * inverse[i], a.d,
                          a.d_features + (chunk + first + i) * a.d);
    });
    if (a.d_prototypes == nullptr) continue;
    bank_gradient(m.d_prototypes, chunk_rows, a.c, a.d, grad, a.c, m.x_packed, chunk == 0,
                  chunk + chunk_rows == a.b, a.threads, [&](int64_t k, float* row, int worker) {
                    float* unit = m.staging + worker * ld;
                    const float inverse = unit_row(a.prototypes + k * a.d, a.d, unit);
                    unit_row_backward(row, unit, a.scale * inverse, a.d, a.d_prototypes + k * a.d);
                  });
  }
}

}  // namespace ulfine::ULFINE_ISA
