// A bank is a matrix of class rows [C, D]: the linear probe, the prototypes, or their fold. Features meet it
// in blocks of rows.
#pragma once

#include "matrix.h"
#include "parallel.h"
#include "rows.h"

namespace ulfine::ULFINE_ISA {

// Most rows of a task: its features, logits and gradients then stay in the second-level cache.
constexpr int64_t kLargestBlock = 48;
// Rows between two updates of a bank's gradient.
constexpr int64_t kChunk = 8 * kLargestBlock;

// Rows per task, whole tiles and at most kLargestBlock, so that the threads get equal shares. No result
// depends on it: a row is computed alone, and sums over rows keep their order.
static inline int64_t block_rows(int64_t rows, int threads) {
  const int64_t tasks = round_up(max(ceil_div(rows, kLargestBlock), 1), threads);
  return max(round_up(ceil_div(rows, tasks), kRows), kRows);
}

// Padded rows of staging memory per thread that pack_bank() needs: a panel and one to blend from.
constexpr int64_t kStagingRows = kPanel + 1;

// to = row k of the linear probe, padded, and of unit norm if `normalize`. Returns the inverse norm, or 1.
static inline float linear_row(const float* linear, int64_t k, int64_t d, bool normalize, float* to) {
  if (normalize) return unit_row(linear + k * d, d, to);
  copy_padded(linear + k * d, d, to);
  return 1.0f;
}

// Packs a bank whose padded row k `make_row(k, to, spare)` writes; `spare` is a row it may use up.
//   transposed: for products that sum over D (logits), packed_size(d, c);
//   packed:     for products that sum over C (gradients of features), packed_size(c, d), or null.
template <class MakeRow>
static void pack_bank(int64_t c, int64_t d, int threads, float* staging, float* transposed, float* packed,
                      const MakeRow& make_row) {
  const int64_t ld = padded(d);
  parallel(ceil_div(c, kPanel), threads, [&](int64_t task, int worker) {
    const int64_t j = task * kPanel;
    float* rows = staging + worker * kStagingRows * ld;
    for (int64_t k = j; k < min(j + kPanel, c); ++k) {
      float* row = rows + (k - j) * ld;
      make_row(k, row, rows + kPanel * ld);
      if (packed != nullptr) pack_row(row, d, c, k, packed);
    }
    // pack_transposed() counts rows from the bank's first.
    pack_transposed(rows - j * ld, ld, c, d, j, transposed);
  });
}

// Class rows per task of a bank's gradient: three cache lines of a row of Z, whole tiles.
constexpr int64_t kBankRows = 48;
static_assert(kBankRows % kRows == 0);

// The gradient Z' X of a bank, added up over chunks of at most kChunk rows.
struct BankGradient {
  float *columns, *sums;  // per thread a task's part of Z; sums over the chunks so far
};

static inline BankGradient bank_gradient_layout(Scratch& scratch, int64_t c, int64_t d, int threads) {
  return {scratch.take(threads * kBankRows * kChunk), scratch.take(max(c, threads * kBankRows) * padded(d))};
}

// Adds a chunk of m rows: Z[m, C] row-major, X packed. With the last chunk, `finish(k, row, worker)` gets the
// padded row k of the gradient while it lies in the cache; it may use the row up.
template <class Finish>
static void bank_gradient(const BankGradient& memory, int64_t m, int64_t c, int64_t d, const float* z,
                          int64_t ldz, const float* x_packed, bool first, bool last, int threads,
                          const Finish& finish) {
  const int64_t ld = padded(d);
  parallel(ceil_div(c, kBankRows), threads, [&](int64_t task, int worker) {
    const int64_t k = task * kBankRows, rows = min(kBankRows, c - k);
    // What no later chunk adds to need not be kept.
    float* sums = memory.sums + (first && last ? worker * kBankRows : k) * ld;
    const Operand left = gather_columns(z + k, ldz, rows, m, memory.columns + worker * kBankRows * kChunk);
    multiply(rows, d, m, left, x_packed, sums, ld, !first);
    if (!last) return;
    for (int64_t i = 0; i < rows; ++i) finish(k + i, sums + i * ld, worker);
  });
}

}  // namespace ulfine::ULFINE_ISA
