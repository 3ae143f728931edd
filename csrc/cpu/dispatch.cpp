// Picks the kernels of the best instruction set that this processor has, once.
#include <cstdlib>
#include <cstring>

#define ULFINE_ISA baseline
#include "ops.h"
#undef ULFINE_ISA
#ifdef ULFINE_X86
#define ULFINE_ISA avx2
#include "ops.h"
#undef ULFINE_ISA
#define ULFINE_ISA avx512
#include "ops.h"
#undef ULFINE_ISA
#endif

#define ULFINE_KERNELS(isa)                                                                                 \
  {                                                                                                         \
    #isa, {                                                                                                 \
      isa::proto_logits, isa::proto_logits_scratch, isa::proto_logits_backward,                             \
          isa::proto_logits_backward_scratch, isa::pseudo_label, isa::pseudo_label_scratch,                 \
          isa::dual_cross_entropy, isa::dual_cross_entropy_scratch, isa::proto_fit, isa::proto_fit_scratch, \
          isa::orthogonality, isa::orthogonality_scratch, isa::head_loss, isa::head_loss_scratch            \
    }                                                                                                       \
  }

namespace ulfine {

static const Selected kBaseline = ULFINE_KERNELS(baseline);
#ifdef ULFINE_X86
static const Selected kAvx2 = ULFINE_KERNELS(avx2);
static const Selected kAvx512 = ULFINE_KERNELS(avx512);
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
    return kAvx512;
  if (!no_avx2 && fma) return kAvx2;
#endif
  return kBaseline;
}

const Selected& selected() {
  static const Selected& chosen = choose();
  return chosen;
}

}  // namespace ulfine
