// Squares of the Gram matrix of unit rows, between the product that makes it and the one that uses it.
//
// A team has a row: of the Gram matrix G, and from the D x D side also a unit row u, whose |u|^4 is taken
// off.
#include "kernels.h"
#include "team.h"

namespace ulfine::cuda {

namespace {

template <int kTeam>
__global__ void __launch_bounds__(kBlock) orthogonality_kernel(Gram a) {
  const bool of_rows = a.c <= a.d;
  const int64_t side = of_rows ? a.c : a.d, i = team<kTeam>();
  if (i >= (of_rows ? side : side + a.c)) return;
  const float* row = i < side ? a.gram + i * side : a.unit + (i - side) * a.d;
  // A row's product with itself is radial: without it here, it stays out of a sum that it would dominate.
  const int64_t left_out = of_rows ? i : -1;
  const double squares = sum_over<kTeam, double>(i < side ? side : a.d, [=](int64_t k) {
    const double g = k == left_out ? 0.0 : static_cast<double>(row[k]);
    return g * g;
  });
  if (lane<kTeam>() != 0) return;
  a.squares[i] = i < side ? squares : -squares * squares;
  if (of_rows) a.gram[i * side + i] = 0.0f;
}

}  // namespace

const char* orthogonality(const Gram& a, void* stream) {
  const bool of_rows = a.c <= a.d;
  return launch_rows(orthogonality_kernel<kWarp>, orthogonality_kernel<kBlock>, of_rows ? a.c : a.d,
                     of_rows ? a.c : a.d + a.c, a, stream);
}

}  // namespace ulfine::cuda
