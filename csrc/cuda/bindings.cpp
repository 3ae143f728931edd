// The CUDA launchers for Python: a launcher takes the fields of its struct in their order, a struct in a
// struct as a tuple, and the stream.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "kernels.h"

namespace py = pybind11;

namespace ulfine::cuda {

namespace {

template <class Fields, size_t... I>
Fields from(const py::tuple& values, std::index_sequence<I...>);

// Stands for one value while a struct is filled, and becomes what the field is.
struct Value {
  py::handle value;

  template <class T>
  operator T() const;
};

// Number of fields of a struct: the most values that fit its braces.
template <class Fields, class Values, class = void>
struct Fits : std::false_type {};
template <class Fields, size_t... I>
struct Fits<Fields, std::index_sequence<I...>, std::void_t<decltype(Fields{(void(I), Value{})...})>>
    : std::true_type {};

template <class Fields, size_t kCount = 40>
constexpr size_t count() {
  if constexpr (Fits<Fields, std::make_index_sequence<kCount>>::value)
    return kCount;
  else
    return count<Fields, kCount - 1>();
}

template <class Fields>
Fields from(const py::tuple& values) {
  constexpr size_t expected = count<Fields>();
  if (values.size() != expected)
    throw py::type_error("expected " + std::to_string(expected) + " values, got " +
                         std::to_string(values.size()));
  return from<Fields>(values, std::make_index_sequence<expected>{});
}

template <class Fields, size_t... I>
Fields from(const py::tuple& values, std::index_sequence<I...>) {
  return Fields{Value{values[I]}...};
}

template <class T>
Value::operator T() const {
  // An address; 0 is null.
  if constexpr (std::is_pointer_v<T>)
    return reinterpret_cast<T>(value.cast<uintptr_t>());
  else if constexpr (std::is_class_v<T>)
    return from<T>(value.cast<py::tuple>());
  else
    return value.cast<T>();
}

template <class Fields>
void define(py::module_& m, const char* name, const char* (*launcher)(const Fields&, void*)) {
  m.def(name, [=](const py::tuple& fields, uintptr_t stream) {
    const char* error = launcher(from<Fields>(fields), reinterpret_cast<void*>(stream));
    if (error != nullptr) throw std::runtime_error(std::string(name) + ": CUDA launch failed: " + error);
  });
}

}  // namespace

void bind(py::module_& m) {
  define(m, "unit_rows", unit_rows);
  define(m, "finish", finish);
  define(m, "pseudo_label", pseudo_label);
  define(m, "dual_cross_entropy", dual_cross_entropy);
  define(m, "head_loss", head_loss);
  define(m, "proto_fit", proto_fit);
  define(m, "state_update", state_update);
  define(m, "orthogonality", orthogonality);
}

}  // namespace ulfine::cuda
