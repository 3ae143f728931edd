// A module with the CUDA launchers as they run in the emulator; pytest builds it, see __init__.py.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include "cuda/kernels.h"

PYBIND11_MODULE(emulated, m) {
  m.attr("emulated") = true;
  m.def("launches", [] { return emulator::launches; });
  ulfine::cuda::bind(m);
}
