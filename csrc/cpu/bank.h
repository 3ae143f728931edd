// A bank is a matrix of class rows [C, D]: the linear probe, the prototypes, or their fold. Features meet it
// in blocks of rows.
#pragma once

#include "matrix.h"
#include "parallel.h"
#include "rows.h"

namespace ulfine::ULFINE_ISA {

// Rows per task: whole tiles for every width, and few enough for a block of logits to stay in the
// second-level cache.
constexpr int64_t kBlock = 48;
// Rows between two updates of a bank's gradient.
constexpr int64_t kChunk = 5 * kBlock;
// Padded rows of staging memory per thread that pack_bank() needs: a panel and one to blend from.
constexpr int64_t kStagingRows = kPanel + 1;

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
  parallel(ceil_div(c, kBlock), threads, [&](int64_t task, int) {
    const int64_t k = task * kBlock;
    multiply_transposed(min(kBlock, c - k), d, m, z + k, ldz, x_packed, to + k * ld, ld, accumulate);
  });
}

}  // namespace ulfine::ULFINE_ISA
