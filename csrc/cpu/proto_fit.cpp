// Class means of the labelled rows, running visual prototypes, and the step of the textual prototypes towards
// them. Only classes that are present in the batch are touched.
#include "ops.h"
#include "parallel.h"
#include "rows.h"

namespace ulfine::ULFINE_ISA {

namespace {

struct Memory {
  int64_t *head, *next, *present;  // rows of class k: head[k], next[head[k]], ... in batch order
  float *x, *mean, *text;
};

Memory layout(Scratch& scratch, int64_t b, int64_t c, int64_t d, int threads) {
  return {scratch.take_indices(c),           scratch.take_indices(b),
          scratch.take_indices(min(b, c)),   scratch.take(threads * padded(d)),
          scratch.take(threads * padded(d)), scratch.take(threads * padded(d))};
}

}  // namespace

int64_t proto_fit_scratch(int64_t b, int64_t c, int64_t d, int threads) {
  Scratch scratch(nullptr);
  layout(scratch, b, c, d, threads);
  return scratch.used();
}

void proto_fit(const ProtoFit& a) {
  Scratch scratch(a.scratch);
  const Memory m = layout(scratch, a.b, a.c, a.d, a.threads);

  double total = 0.0;
  for (int64_t k = 0; k < a.c; ++k) total += a.histogram[k];
  float largest = 0.0f;
  for (int64_t k = 0; k < a.c; ++k) {
    if (total > 0.0)
      a.distribution[k] =
          running_share(a.distribution[k], a.histogram[k], static_cast<float>(total), a.gamma);
    largest = larger(largest, a.distribution[k]);
  }

  int64_t present = 0;
  for (int64_t k = 0; k < a.c; ++k) m.head[k] = -1;
  // From the last row to the first, so that a class's list ends up in batch order.
  for (int64_t i = a.b - 1; i >= 0; --i) {
    const int64_t k = a.targets[i];
    if (k < 0 || k >= a.c) continue;
    if (m.head[k] < 0) m.present[present++] = k;
    m.next[i] = m.head[k];
    m.head[k] = i;
  }

  const int64_t ld = padded(a.d);
  parallel(present, a.threads, [&](int64_t task, int worker) {
    const int64_t k = m.present[task];
    float *x = m.x + worker * ld, *mean = m.mean + worker * ld, *text = m.text + worker * ld;
    memset(mean, 0, ld * sizeof(float));
    int64_t count = 0;
    for (int64_t i = m.head[k]; i >= 0; i = m.next[i]) {
      unit_row(a.features + i * a.d, a.d, x);
      add_scaled(mean, x, 1.0f, ld);
      ++count;
    }
    float *visual = a.visual + k * a.d, *textual = a.textual + k * a.d;
    const bool seen = a.seen[k];
    for (int64_t i = 0; i < a.d; ++i)
      visual[i] = running_mean(visual[i], seen, mean[i], static_cast<float>(count), a.beta);
    a.seen[k] = true;

    const float inverse = unit_row(visual, a.d, x);
    if (inverse == 0.0f) return;
    const float alpha = step_size(a.distribution[k], largest, a.mu);
    unit_row(textual, a.d, text);
    scale_row(text, 1.0f - alpha, ld);
    add_scaled(text, x, alpha, ld);
    const float norm = sqrtf(dot(text, text, ld));
    if (!replaces(norm)) return;
    for (int64_t i = 0; i < a.d; ++i) textual[i] = text[i] / norm;
  });
}

}  // namespace ulfine::ULFINE_ISA
