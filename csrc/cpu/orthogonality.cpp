// Mean squared off-diagonal cosine of the rows and its gradient, from the C x C or the D x D Gram matrix.
//
// With unit rows u the value is (sum_ij <u_i, u_j>^2 - sum_i |u_i|^4) / (C (C - 1)) and its gradient in u_i
// is 4 (sum_j <u_i, u_j> u_j - radial part) / (C (C - 1)); both Gram matrices give the same sums.
#include "bank.h"
#include "ops.h"

namespace ulfine::ULFINE_ISA {

namespace {

struct Memory {
  // `packed` is the right-hand side of the gradient's product: the unit rows, or the D x D Gram matrix.
  float *inverse, *transposed, *packed, *columns, *gram, *product, *staging;
  double *partial, *fourth;  // of the rows of the Gram matrix: squares; of the unit rows: |u|^4
};

Memory layout(Scratch& scratch, int64_t c, int64_t d, int threads) {
  const int64_t ld = padded(d), side = min(c, d);
  Memory m{};
  m.inverse = scratch.take(c);
  m.gram = scratch.take(side * padded(side));
  m.partial = reinterpret_cast<double*>(scratch.take_indices(side));
  m.fourth = reinterpret_cast<double*>(scratch.take_indices(c));
  m.product = scratch.take(threads * kBankRows * ld);
  m.packed = scratch.take(packed_size(c, d));
  m.staging = scratch.take(threads * kStagingRows * ld);
  if (c <= d)
    m.transposed = scratch.take(packed_size(d, c));
  else
    m.columns = scratch.take(threads * round_up(kPanel, kRows) * c);
  return m;
}

// Lower triangle of unit unit', [C, padded C], and the unit rows, packed.
void gram_of_rows(const Orthogonality& a, const Memory& m) {
  const int64_t ldg = padded(a.c);
  pack_bank(a.c, a.d, a.threads, m.staging, m.transposed, m.packed,
            [&](int64_t k, float* to, float*) { m.inverse[k] = unit_row(a.prototypes + k * a.d, a.d, to); });
  parallel(ceil_div(a.c, kBankRows), a.threads, [&](int64_t task, int) {
    const int64_t first = task * kBankRows, rows = min(kBankRows, a.c - first);
    // Whole panels up to the diagonal: a cut one would be read with the wrong width.
    const int64_t columns = min(round_up(first + rows, kPanel), a.c);
    float* gram = m.gram + first * ldg;
    multiply(rows, columns, a.d, row_major(a.prototypes + first * a.d, a.d), m.transposed, gram, ldg, false);
    for (int64_t i = 0; i < rows; ++i) scale_row(gram + i * ldg, m.inverse[first + i], padded(columns));
  });
}

// Lower triangle of unit' unit, [D, padded D].
void gram_of_columns(const Orthogonality& a, const Memory& m) {
  const int64_t ld = padded(a.d);
  parallel(a.c, a.threads, [&](int64_t k, int worker) {
    float* row = m.staging + worker * kStagingRows * ld;
    m.inverse[k] = unit_row(a.prototypes + k * a.d, a.d, row);
    const double squared = sum_of_squares(row, a.d);
    m.fourth[k] = squared * squared;
    pack_row(row, a.d, a.c, k, m.packed);
  });
  parallel(ceil_div(a.d, kPanel), a.threads, [&](int64_t task, int worker) {
    const int64_t first = task * kPanel, rows = min(kPanel, a.d - first);
    float* own = m.columns + worker * round_up(kPanel, kRows) * a.c;
    const Operand left = gather_columns(m.packed + a.c * first, min(kPanel, ld - first), rows, a.c, own);
    multiply(rows, first + rows, a.c, left, m.packed, m.gram + first * ld, ld, false);
  });
}

}  // namespace

int64_t orthogonality_scratch(int64_t c, int64_t d, int threads) {
  Scratch scratch(nullptr);
  layout(scratch, c, d, threads);
  return scratch.used();
}

void orthogonality(const Orthogonality& a) {
  if (a.c == 1) {
    *a.value = 0.0f;
    memset(a.gradient, 0, a.d * sizeof(float));
    return;
  }
  Scratch scratch(a.scratch);
  const Memory m = layout(scratch, a.c, a.d, a.threads);
  const bool of_rows = a.c <= a.d;
  const int64_t ld = padded(a.d), side = of_rows ? a.c : a.d, ldg = padded(side);
  if (of_rows)
    gram_of_rows(a, m);
  else
    gram_of_columns(a, m);

  // The upper triangle is a copy. Off the diagonal every product counts twice.
  parallel(ceil_div(side, kWidth), a.threads, [&](int64_t task, int) {
    const int64_t first = task * kWidth, last = min(first + kWidth, side);
    for (int64_t i = first; i < last; ++i) {
      const double g = m.gram[i * ldg + i];
      m.partial[i] = 2.0 * sum_of_squares(m.gram + i * ldg, i) + (of_rows ? 0.0 : g * g);
      // A row's product with itself is radial: dropping it here keeps it out of a sum it would dominate.
      if (of_rows) m.gram[i * ldg + i] = 0.0f;
      for (int64_t j = side; j < ldg; ++j) m.gram[i * ldg + j] = 0.0f;
    }
    for (int64_t i = first; i < last; ++i)
      for (int64_t j = first; j < i; ++j) m.gram[j * ldg + i] = m.gram[i * ldg + j];
    if (last < first + kWidth) {
      for (int64_t i = first; i < last; ++i) {
        for (int64_t j = 0; j < first; ++j) m.gram[j * ldg + i] = m.gram[i * ldg + j];
      }
    } else {
      for (int64_t j = 0; j < first; j += kWidth)
        transpose_square(m.gram + first * ldg + j, ldg, m.gram + j * ldg + first, ldg);
    }
  });
  double total = 0.0;
  for (int64_t i = 0; i < side; ++i) total += m.partial[i];
  if (!of_rows)
    for (int64_t k = 0; k < a.c; ++k) total -= m.fourth[k];
  *a.value = mean_squared_cosine(total, a.c);

  const float factor = static_cast<float>(4.0 * a.weight / ordered_pairs(a.c));
  if (!of_rows)
    parallel(side, a.threads, [&](int64_t i, int) { pack_row(m.gram + i * ldg, a.d, a.d, i, m.packed); });
  parallel(ceil_div(a.c, kBankRows), a.threads, [&](int64_t task, int worker) {
    const int64_t first = task * kBankRows, rows = min(kBankRows, a.c - first);
    float *product = m.product + worker * kBankRows * ld, *unit = m.staging + worker * kStagingRows * ld;
    const Operand left =
        of_rows ? row_major(m.gram + first * ldg, ldg) : row_major(a.prototypes + first * a.d, a.d);
    multiply(rows, a.d, side, left, m.packed, product, ld, false);
    for (int64_t i = 0; i < rows; ++i) {
      const float inverse = m.inverse[first + i];
      const float* row = a.prototypes + (first + i) * a.d;
      if (!of_rows) scale_row(product + i * ld, inverse, ld);
      copy_padded(row, a.d, unit);
      scale_row(unit, inverse, ld);
      unit_row_backward(product + i * ld, unit, factor * inverse, a.d, a.gradient + (first + i) * a.d);
    }
  });
}

}  // namespace ulfine::ULFINE_ISA
