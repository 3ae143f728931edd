// A module with the CUDA launchers as they run in the emulator; pytest builds it, see __init__.py.
#include <pybind11/pybind11.h>

#include "cuda/kernels.h"

PYBIND11_MODULE(emulated, m) {
  m.attr("emulated") = true;
  ulfine::cuda::bind(m);
}
