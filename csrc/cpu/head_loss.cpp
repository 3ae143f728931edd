// One step's loss in one call: pseudo-labels, both cross-entropies, orthogonality. Calls the kernels of the
// three ops; its own work is to say which row has which target and weight, and to fold and pack the bank only
// once.
#include "bank.h"
#include "ops.h"

namespace ulfine::ULFINE_ISA {

namespace {

struct Memory {
  PackedBank bank;
  int64_t *targets, *group;
  float *weights, *adjustment, *orthogonality, *op;
};

Memory layout(Scratch& scratch, const HeadLoss& a) {
  const DualCrossEntropy& r = a.rows;
  Memory m{};
  if (r.fused) {
    m.bank.transposed = scratch.take(packed_size(r.d, r.c));
    if (r.d_features != nullptr) m.bank.packed = scratch.take(packed_size(r.c, r.d));
  }
  m.targets = scratch.take_indices(r.b);
  m.group = scratch.take_indices(r.b);
  m.weights = scratch.take(r.b);
  m.adjustment = scratch.take(2 * r.c);
  m.orthogonality = scratch.take(1);
  // The three ops run one after the other, over the same memory.
  const PseudoLabel& w = a.weak;
  const int64_t needs[] = {pseudo_label_scratch(w.b, w.c, w.d, w.scale_rows, w.threads),
                           dual_cross_entropy_scratch(r.b, r.c, r.d, 2, r.fused, r.d_features != nullptr,
                                                      r.d_linear != nullptr, r.threads),
                           a.d_prototypes != nullptr ? orthogonality_scratch(r.c, r.d, r.threads) : 0};
  m.op = scratch.take(max(needs[0], max(needs[1], needs[2])));
  return m;
}

}  // namespace

int64_t head_loss_scratch(const HeadLoss& a) {
  Scratch scratch(nullptr);
  layout(scratch, a);
  return scratch.used();
}

void head_loss(const HeadLoss& a, float* memory) {
  Scratch scratch(memory);
  const Memory m = layout(scratch, a);

  PseudoLabel weak = a.weak;
  weak.scratch = m.op;
  if (a.rows.fused) weak.bank = &m.bank;
  pseudo_label(weak);

  DualCrossEntropy rows = a.rows;
  const int64_t strong = rows.b - a.labelled;
  for (int64_t i = 0; i < rows.b; ++i) {
    const bool labelled = i < a.labelled;
    const int64_t image = labelled ? 0 : (i - a.labelled) % weak.b;
    m.targets[i] = labelled ? a.rows.targets[i] : weak.label[image];
    m.weights[i] = labelled           ? 1.0f / static_cast<float>(a.labelled)
                   : weak.keep[image] ? a.unlabelled_weight / static_cast<float>(strong)
                                      : 0.0f;
    m.group[i] = labelled ? 0 : 1;
  }
  const float* shifts[] = {a.adjustment, a.strong_adjustment};
  for (int group = 0; group < 2; ++group) {
    float* to = m.adjustment + group * rows.c;
    if (shifts[group] != nullptr)
      memcpy(to, shifts[group], rows.c * sizeof(float));
    else
      memset(to, 0, rows.c * sizeof(float));
  }
  rows.adjustment = m.adjustment;
  rows.groups = 2;
  rows.targets = m.targets;
  rows.weights = m.weights;
  rows.group = m.group;
  rows.scratch = m.op;
  if (rows.fused) rows.bank = &m.bank;
  dual_cross_entropy(rows);

  if (a.d_prototypes == nullptr) return;
  orthogonality({rows.prototypes, m.orthogonality, a.d_prototypes, a.orthogonality_weight, m.op, rows.c,
                 rows.d, rows.threads});
  *rows.loss += a.orthogonality_weight * *m.orthogonality;
}

}  // namespace ulfine::ULFINE_ISA
