// Runs every CPU kernel on drawn numbers and prints what it gives, a number a line: test_portability.py
// compares processors by it.
#include <stdint.h>
#include <stdio.h>

#include <vector>

#include "cpu/kernels.h"

namespace {

// B rows: labelled ones, then two strong views of the weak ones.
constexpr int64_t kLabelled = 20, kWeak = 25, B = kLabelled + 2 * kWeak, C = 37, D = 65;
constexpr int kThreads = 2;
using Floats = std::vector<float>;
using Integers = std::vector<int64_t>;

// In [-1, 1), the same on every processor.
Floats drawn(int64_t count) {
  static uint32_t state = 1;
  Floats numbers(count);
  for (float& number : numbers) {
    state = state * 1664525u + 1013904223u;
    number = static_cast<float>(static_cast<int32_t>(state) >> 8) / (1 << 23);
  }
  return numbers;
}

template <class Numbers>
void print(const Numbers& numbers) {
  for (const auto number : numbers) printf("%.9g\n", static_cast<double>(number));
}

}  // namespace

int main() {
  const ulfine::Kernels& kernels = ulfine::selected().kernels;
  const Floats x = drawn(B * D), w = drawn(C * D), t = drawn(C * D), grad = drawn(B * C), shift = drawn(C);
  Integers targets(B);
  for (int64_t i = 0; i < B; ++i) targets[i] = i % 7 == 3 ? -1 : i * i % C;
  Floats logits(B * C), d_x(B * D), d_w(C * D), d_t(C * D), scratch;

  scratch.resize(kernels.proto_logits_scratch(B, C, D, kThreads));
  kernels.proto_logits({x.data(), t.data(), logits.data(), scratch.data(), B, C, D, 5.0f, kThreads});
  print(logits);
  scratch.resize(kernels.proto_logits_backward_scratch(B, C, D, kThreads));
  kernels.proto_logits_backward(
      {grad.data(), x.data(), t.data(), d_x.data(), d_t.data(), scratch.data(), B, C, D, 5.0f, kThreads});
  print(d_x);
  print(d_t);

  Floats textual = t, visual = w, share(C, 1.0f / C), counts(C);
  bool seen[C] = {};
  for (int64_t j = 0; j < C; ++j) counts[j] = static_cast<float>(j);
  scratch.resize(kernels.proto_fit_scratch(B, C, D, kThreads));
  kernels.proto_fit({x.data(), targets.data(), counts.data(), textual.data(), visual.data(), seen,
                     share.data(), scratch.data(), B, C, D, 0.1f, 0.9f, 0.9f, kThreads});
  print(textual);
  print(visual);
  print(share);
  print(seen);

  // Composes pseudo_label, dual_cross_entropy and orthogonality.
  for (const bool fused : {false, true}) {
    const float threshold = 0.1f;
    float loss, branch_scale[2];
    Integers label(kWeak), histogram(C), kept_histogram(C);
    Floats confidence(kWeak);
    bool keep[kWeak];
    ulfine::HeadLoss step = {};
    ulfine::PseudoLabel& weak = step.weak;
    ulfine::DualCrossEntropy& rows = step.rows;
    weak.features = x.data() + kLabelled * D;
    rows.features = x.data();
    rows.targets = targets.data();
    weak.linear = rows.linear = w.data();
    weak.prototypes = rows.prototypes = t.data();
    weak.threshold = &threshold;
    weak.thresholds = 1;
    weak.label = label.data();
    weak.confidence = confidence.data();
    weak.keep = keep;
    weak.histogram = histogram.data();
    weak.kept_histogram = kept_histogram.data();
    weak.branch_scale = branch_scale;
    weak.b = weak.scale_rows = kWeak;
    rows.b = B;
    weak.c = rows.c = C;
    weak.d = rows.d = D;
    weak.eta = rows.eta = 0.4f;
    weak.align = rows.align = 1.2f;
    weak.linear_scale = weak.proto_scale = rows.linear_scale = rows.proto_scale = 8.0f;
    weak.temperature = 1.0f;
    weak.normalize_linear = rows.normalize_linear = true;
    weak.threads = rows.threads = kThreads;
    rows.loss = &loss;
    rows.d_features = d_x.data();
    rows.d_linear = d_w.data();
    rows.fused = fused;
    step.labelled = kLabelled;
    step.adjustment = step.strong_adjustment = shift.data();
    step.unlabelled_weight = step.orthogonality_weight = 1.0f;
    step.d_prototypes = d_t.data();
    scratch.resize(kernels.head_loss_scratch(step));
    kernels.head_loss(step, scratch.data());
    print(label);
    print(confidence);
    print(keep);
    print(histogram);
    print(kept_histogram);
    print(branch_scale);
    print(Floats{loss});
    print(d_x);
    print(d_w);
    print(d_t);
  }
}
