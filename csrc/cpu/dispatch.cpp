// Picks the kernels of the best instruction set that this processor has, once.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#define ULFINE_DECLARE(isa)                                                                           \
  namespace isa {                                                                                     \
  void proto_logits(const ProtoLogits&);                                                              \
  int64_t proto_logits_scratch(int64_t, int64_t, int64_t, int);                                       \
  void proto_logits_backward(const ProtoLogitsBackward&);                                             \
  int64_t proto_logits_backward_scratch(int64_t, int64_t, int64_t, int);                              \
  void pseudo_label(const PseudoLabel&);                                                              \
  int64_t pseudo_label_scratch(int64_t, int64_t, int64_t, int64_t, int);                              \
  void dual_cross_entropy(const DualCrossEntropy&);                                                   \
  int64_t dual_cross_entropy_scratch(int64_t, int64_t, int64_t, int64_t, bool, bool, bool, int);      \
  void proto_fit(const ProtoFit&);                                                                    \
  int64_t proto_fit_scratch(int64_t, int64_t, int64_t, int);                                          \
  void orthogonality(const Orthogonality&);                                                           \
  int64_t orthogonality_scratch(int64_t, int64_t, int);                                               \
  static const Selected kSelected = {                                                                 \
      #isa,                                                                                           \
      {proto_logits, proto_logits_scratch, proto_logits_backward, proto_logits_backward_scratch,      \
       pseudo_label, pseudo_label_scratch, dual_cross_entropy, dual_cross_entropy_scratch, proto_fit, \
       proto_fit_scratch, orthogonality, orthogonality_scratch}};                                     \
  }

namespace ulfine {

ULFINE_DECLARE(baseline)
#ifdef ULFINE_X86
ULFINE_DECLARE(avx2)
ULFINE_DECLARE(avx512)
#endif

static const Selected& choose() {
#ifdef ULFINE_X86
  const char* limit = std::getenv("ULFINE_ISA");
  const bool no_avx512 = limit != nullptr && std::strcmp(limit, "avx512") != 0;
  const bool no_avx2 = no_avx512 && std::strcmp(limit, "avx2") != 0;
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!no_avx512 && fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return avx512::kSelected;
  if (!no_avx2 && fma) return avx2::kSelected;
#endif
  return baseline::kSelected;
}

const Selected& selected() {
  static const Selected& chosen = choose();
  return chosen;
}

}  // namespace ulfine
