// The extension module: addresses and sizes in, nothing of torch. With cuda/bindings.cpp the only file that
// includes pybind11.
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"
#ifdef ULFINE_WITH_CUDA
#include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace {

using ulfine::selected;

// Python passes an address as an integer; 0 is null.
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of ulfine_fast. Call them through ulfine_fast.ops, which checks the arguments.";
  m.def("isa", [] { return selected().isa; });

  const auto unlocked = py::call_guard<py::gil_scoped_release>();

  m.def("proto_logits_scratch", selected().kernels.proto_logits_scratch);
  m.def(
      "proto_logits",
      [](uintptr_t features, uintptr_t prototypes, uintptr_t logits, uintptr_t scratch, int64_t b, int64_t c,
         int64_t d, float scale, int threads) {
        selected().kernels.proto_logits({at<const float>(features), at<const float>(prototypes),
                                         at<float>(logits), at<float>(scratch), b, c, d, scale, threads});
      },
      unlocked);

  m.def("proto_logits_backward_scratch", selected().kernels.proto_logits_backward_scratch);
  m.def(
      "proto_logits_backward",
      [](uintptr_t grad, uintptr_t features, uintptr_t prototypes, uintptr_t d_features,
         uintptr_t d_prototypes, uintptr_t scratch, int64_t b, int64_t c, int64_t d, float scale,
         int threads) {
        selected().kernels.proto_logits_backward(
            {at<const float>(grad), at<const float>(features), at<const float>(prototypes),
             at<float>(d_features), at<float>(d_prototypes), at<float>(scratch), b, c, d, scale, threads});
      },
      unlocked);

  m.def("pseudo_label_scratch", selected().kernels.pseudo_label_scratch);
  m.def(
      "pseudo_label",
      [](uintptr_t features, uintptr_t linear, uintptr_t prototypes, uintptr_t threshold, int64_t thresholds,
         uintptr_t adjustment, uintptr_t label, uintptr_t confidence, uintptr_t keep, uintptr_t histogram,
         uintptr_t kept_histogram, uintptr_t branch_scale, uintptr_t scratch, int64_t b, int64_t c, int64_t d,
         double eta, float align, float linear_scale, float proto_scale, float temperature,
         bool normalize_linear, int64_t scale_rows, int threads) {
        selected().kernels.pseudo_label({at<const float>(features),
                                         at<const float>(linear),
                                         at<const float>(prototypes),
                                         at<const float>(threshold),
                                         thresholds,
                                         at<const float>(adjustment),
                                         at<int64_t>(label),
                                         at<float>(confidence),
                                         at<bool>(keep),
                                         at<int64_t>(histogram),
                                         at<int64_t>(kept_histogram),
                                         at<float>(branch_scale),
                                         at<float>(scratch),
                                         b,
                                         c,
                                         d,
                                         eta,
                                         align,
                                         linear_scale,
                                         proto_scale,
                                         temperature,
                                         normalize_linear,
                                         scale_rows,
                                         threads,
                                         nullptr});
      },
      unlocked);

  m.def("dual_cross_entropy_scratch", selected().kernels.dual_cross_entropy_scratch);
  m.def(
      "dual_cross_entropy",
      [](uintptr_t features, uintptr_t targets, uintptr_t linear, uintptr_t prototypes, uintptr_t weights,
         uintptr_t adjustment, int64_t groups, uintptr_t group, uintptr_t loss, uintptr_t d_features,
         uintptr_t d_linear, uintptr_t scratch, int64_t b, int64_t c, int64_t d, double eta, float align,
         float linear_scale, float proto_scale, bool fused, bool normalize_linear, int threads) {
        selected().kernels.dual_cross_entropy({at<const float>(features),
                                               at<const int64_t>(targets),
                                               at<const float>(linear),
                                               at<const float>(prototypes),
                                               at<const float>(weights),
                                               at<const float>(adjustment),
                                               groups,
                                               at<const int64_t>(group),
                                               at<float>(loss),
                                               at<float>(d_features),
                                               at<float>(d_linear),
                                               at<float>(scratch),
                                               b,
                                               c,
                                               d,
                                               eta,
                                               align,
                                               linear_scale,
                                               proto_scale,
                                               fused,
                                               normalize_linear,
                                               threads,
                                               nullptr});
      },
      unlocked);

  m.def("head_loss",
        [](py::function scratch, uintptr_t features, uintptr_t weak, uintptr_t targets, uintptr_t linear,
           uintptr_t prototypes, uintptr_t threshold, int64_t thresholds, uintptr_t weak_adjustment,
           uintptr_t adjustment, uintptr_t strong_adjustment, uintptr_t loss, uintptr_t d_features,
           uintptr_t d_linear, uintptr_t d_prototypes, uintptr_t label, uintptr_t confidence, uintptr_t keep,
           uintptr_t histogram, uintptr_t kept_histogram, uintptr_t branch_scale, int64_t b, int64_t labelled,
           int64_t unlabelled, int64_t c, int64_t d, float align, double eta, float linear_scale,
           float proto_scale, float temperature, bool normalize_linear, int64_t scale_rows, bool fused,
           float unlabelled_weight, float orthogonality_weight, int threads) {
          const auto *w = at<const float>(linear), *t = at<const float>(prototypes);
          const ulfine::HeadLoss arguments = {{at<const float>(weak),
                                               w,
                                               t,
                                               at<const float>(threshold),
                                               thresholds,
                                               at<const float>(weak_adjustment),
                                               at<int64_t>(label),
                                               at<float>(confidence),
                                               at<bool>(keep),
                                               at<int64_t>(histogram),
                                               at<int64_t>(kept_histogram),
                                               at<float>(branch_scale),
                                               nullptr,
                                               unlabelled,
                                               c,
                                               d,
                                               eta,
                                               align,
                                               linear_scale,
                                               proto_scale,
                                               temperature,
                                               normalize_linear,
                                               scale_rows,
                                               threads,
                                               nullptr},
                                              {at<const float>(features),
                                               at<const int64_t>(targets),
                                               w,
                                               t,
                                               nullptr,
                                               nullptr,
                                               0,
                                               nullptr,
                                               at<float>(loss),
                                               at<float>(d_features),
                                               at<float>(d_linear),
                                               nullptr,
                                               b,
                                               c,
                                               d,
                                               eta,
                                               align,
                                               linear_scale,
                                               proto_scale,
                                               fused,
                                               normalize_linear,
                                               threads,
                                               nullptr},
                                              labelled,
                                              at<const float>(adjustment),
                                              at<const float>(strong_adjustment),
                                              unlabelled_weight,
                                              at<float>(d_prototypes),
                                              orthogonality_weight};
          const auto kernels = selected().kernels;
          float* memory = at<float>(scratch(kernels.head_loss_scratch(arguments)).cast<uintptr_t>());
          const py::gil_scoped_release unlock;
          kernels.head_loss(arguments, memory);
        });

  m.def("proto_fit_scratch", selected().kernels.proto_fit_scratch);
  m.def(
      "proto_fit",
      [](uintptr_t features, uintptr_t targets, uintptr_t histogram, uintptr_t textual, uintptr_t visual,
         uintptr_t seen, uintptr_t distribution, uintptr_t scratch, int64_t b, int64_t c, int64_t d, float mu,
         double beta, double gamma, int threads) {
        selected().kernels.proto_fit({at<const float>(features), at<const int64_t>(targets),
                                      at<const float>(histogram), at<float>(textual), at<float>(visual),
                                      at<bool>(seen), at<float>(distribution), at<float>(scratch), b, c, d,
                                      mu, beta, gamma, threads});
      },
      unlocked);

  m.def("orthogonality_scratch", selected().kernels.orthogonality_scratch);
  m.def(
      "orthogonality",
      [](uintptr_t prototypes, uintptr_t value, uintptr_t gradient, float weight, uintptr_t scratch,
         int64_t c, int64_t d, int threads) {
        selected().kernels.orthogonality({at<const float>(prototypes), at<float>(value), at<float>(gradient),
                                          weight, at<float>(scratch), c, d, threads});
      },
      unlocked);

#ifdef ULFINE_WITH_CUDA
  m.attr("has_cuda") = true;
  ulfine::cuda::bind(m);
#else
  m.attr("has_cuda") = false;
#endif
}
