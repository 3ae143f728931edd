// A bank is a matrix of class rows [C, D]: the linear probe, the prototypes, or their fold. Features meet it
// in blocks of rows.
#pragma once

#include "matrix.h"
#include "parallel.h"
#include "rows.h"

namespace ulfine::ULFINE_ISA {

// Most rows of a task: a bank that does not fit the second-level cache is read once for each.
constexpr int64_t kLargestBlock = 192;
// Rows between two updates of a bank's gradient.
constexpr int64_t kChunk = 2 * kLargestBlock;

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
//   packed:     for products that sum over C (gradients of features), packed_size(c, d), or null;
//   rows:       keeps the rows, [C, padded D], or is null.
template <class MakeRow>
static void pack_bank(int64_t c, int64_t d, int threads, float* staging, float* transposed, float* packed,
                      float* rows, const MakeRow& make_row) {
  const int64_t ld = padded(d);
  parallel(ceil_div(c, kPanel), threads, [&](int64_t task, int worker) {
    const int64_t j = task * kPanel;
    float* own = staging + worker * kStagingRows * ld;
    float* panel_rows = rows != nullptr ? rows + j * ld : own;
    for (int64_t k = j; k < min(j + kPanel, c); ++k) {
      float* row = panel_rows + (k - j) * ld;
      make_row(k, row, own + kPanel * ld);
      if (packed != nullptr) pack_row(row, d, c, k, packed);
    }
    // pack_transposed() counts rows from the bank's first.
    pack_transposed(panel_rows - j * ld, ld, c, d, j, transposed);
  });
}

// to[C, padded D] (+)= Z' X over m rows, the gradient of a bank: Z[m, C] row-major, X packed.
static inline void bank_gradient(int64_t m, int64_t c, int64_t d, const float* z, int64_t ldz,
                                 const float* x_packed, float* to, bool accumulate, int threads) {
  const int64_t ld = padded(d);
  const int64_t block = block_rows(c, threads);
  parallel(ceil_div(c, block), threads, [&](int64_t task, int) {
    const int64_t k = task * block;
    multiply(min(block, c - k), d, m, {z + k, 1, ldz}, x_packed, to + k * ld, ld, accumulate);
  });
}

}  // namespace ulfine::ULFINE_ISA
