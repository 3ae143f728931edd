// Matrix products over packed operands: C[m, n] (+)= A[m, k] B[k, n].
//
// B is packed into panels of kPanel columns, row k of a panel contiguous, the last panel padded with zeros to
// whole vectors: panel j starts at packed + depth * j * kPanel. A is read one scalar at a time, in place or
// from columns that were gathered. Each element of C is summed over k in ascending order, in blocks whose
// sums are added, so its bits depend neither on tiling nor on threads.
#pragma once

#include "simd.h"

namespace ulfine::ULFINE_ISA {

// A tile of kRows x kPanel accumulators, two vectors of B and one of A fit the registers.
constexpr int64_t kPanelVectors = 2;
constexpr int64_t kPanel = kPanelVectors * kWidth;
constexpr int64_t kRows = kWidth == 16 ? 12 : 6;
// Steps over k between two passes over the tiles: a tile's share of A then stays in the first-level cache,
// and the error of a long sum grows with the number of blocks, not of products.
constexpr int64_t kDepth = 128;
// Steps over k that a panel is fetched ahead.
constexpr int64_t kAhead = 16;

static inline int64_t packed_size(int64_t depth, int64_t columns) { return depth * padded(columns); }

// The left operand: A[i][k] = data[i / kRows * tile + i % kRows * row + k * step].
struct Operand {
  const float* data;
  int64_t tile, row, step;
};

static inline Operand row_major(const float* rows, int64_t ld) { return {rows, kRows * ld, ld, 1}; }

template <int M, int V>
static void tile(Operand a, const float* panel, int64_t width, int64_t depth, float* c, int64_t ldc,
                 bool accumulate) {
  Vec acc[M][V];
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) acc[i][v] = Vec{};
  // An address takes once and twice the stride for free: a pointer for every third row saves registers.
  constexpr int kGroups = (M + 2) / 3;
  const float* row[kGroups];
  for (int g = 0; g < kGroups; ++g) row[g] = a.data + 3 * g * a.row;
  for (int64_t k = 0; k < depth; ++k) {
    Vec b[V];
    for (int v = 0; v < V; ++v) {
      b[v] = load(panel + k * width + v * kWidth);
      // A panel that lies beyond the second-level cache is fetched ahead, also across the end of a page.
      __builtin_prefetch(panel + (k + kAhead) * width + v * kWidth);
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Vec x = splat(row[i / 3][i % 3 * a.row]);
      for (int v = 0; v < V; ++v) acc[i][v] += x * b[v];
    }
    for (int g = 0; g < kGroups; ++g) row[g] += a.step;
  }
  if (accumulate)
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < V; ++v) acc[i][v] += load(c + i * ldc + v * kWidth);
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) store(c + i * ldc + v * kWidth, acc[i][v]);
}

template <int M>
static void tile_rows(int64_t m, int64_t vectors, Operand a, const float* panel, int64_t width, int64_t depth,
                      float* c, int64_t ldc, bool accumulate) {
  if constexpr (M > 1) {
    if (m < M) return tile_rows<M - 1>(m, vectors, a, panel, width, depth, c, ldc, accumulate);
  }
  if (vectors == kPanelVectors)
    tile<M, kPanelVectors>(a, panel, width, depth, c, ldc, accumulate);
  else
    tile<M, 1>(a, panel, width, depth, c, ldc, accumulate);
}

// C[m, n] (+)= A[m, depth] * packed[depth, n]; rows of C are ldc >= padded(n) apart and written padded.
static inline void multiply(int64_t m, int64_t n, int64_t depth, Operand a, const float* packed, float* c,
                            int64_t ldc, bool accumulate) {
  if (depth == 0 && !accumulate) {
    for (int64_t i = 0; i < m; ++i) memset(c + i * ldc, 0, padded(n) * sizeof(float));
    return;
  }
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t steps = min(kDepth, depth - k);
    for (int64_t i = 0; i < m; i += kRows) {
      const Operand part = {a.data + i / kRows * a.tile + k * a.step, a.tile, a.row, a.step};
      for (int64_t j = 0; j < n; j += kPanel) {
        const int64_t width = min(kPanel, padded(n) - j);
        tile_rows<kRows>(min(kRows, m - i), width / kWidth, part, packed + depth * j + k * width, width,
                         steps, c + i * ldc + j, ldc, accumulate || k > 0);
      }
    }
  }
}

// Panel j of B[k][n] = rows[n][k]: the transpose of n padded rows with stride ld.
static inline void pack_transposed(const float* rows, int64_t ld, int64_t n, int64_t depth, int64_t j,
                                   float* packed) {
  const int64_t width = min(kPanel, padded(n) - j);
  float* panel = packed + depth * j;
  for (int64_t v = 0; v < width; v += kWidth) {
    const int64_t filled = min(kWidth, n - j - v);
    const float* from = rows + (j + v) * ld;
    const int64_t whole = filled == kWidth ? depth / kWidth * kWidth : 0;
    for (int64_t k = 0; k < whole; k += kWidth) transpose_square(from + k, ld, panel + k * width + v, width);
    for (int64_t k = whole; k < depth; ++k)
      for (int64_t i = 0; i < kWidth; ++i) panel[k * width + v + i] = i < filled ? from[i * ld + k] : 0.0f;
  }
}

// Row k of B[depth, n] into all its panels; the row is padded to whole vectors.
static inline void pack_row(const float* row, int64_t n, int64_t depth, int64_t k, float* packed) {
  for (int64_t j = 0; j < n; j += kPanel) {
    const int64_t width = min(kPanel, padded(n) - j);
    float* to = packed + depth * j + k * width;
    for (int64_t v = 0; v < width; v += kWidth) store(to + v, load(row + j + v));
  }
}

// Columns of Z[depth, ld] as the rows of a left operand. In place, each of them would spread over as many
// cache lines as it is long. `to` has room for round_up(count, kRows) * depth floats.
static inline Operand gather_columns(const float* z, int64_t ld, int64_t count, int64_t depth, float* to) {
  for (int64_t k = 0; k < depth; ++k) {
    const float* row = z + k * ld;
    int64_t i = 0;
    for (; i + kRows <= count; i += kRows) memcpy(to + i * depth + k * kRows, row + i, kRows * sizeof(float));
    if (i < count) memcpy(to + i * depth + k * kRows, row + i, (count - i) * sizeof(float));
  }
  return {to, kRows * depth, 1, kRows};
}

}  // namespace ulfine::ULFINE_ISA
