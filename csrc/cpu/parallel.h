// Loops over independent tasks. Every task writes memory of its own, so who runs it does not show.
#pragma once

#include <omp.h>

#include "simd.h"

namespace ulfine::ULFINE_ISA {

// fn(task, worker) for task in [0, tasks); worker < threads names the running thread's private scratch.
template <class Fn>
static inline void parallel(int64_t tasks, int threads, const Fn& fn) {
  const int team = static_cast<int>(min(tasks, threads));
  if (team <= 1) {
    for (int64_t i = 0; i < tasks; ++i) fn(i, 0);
    return;
  }
#pragma omp parallel for num_threads(team) schedule(dynamic)
  for (int64_t i = 0; i < tasks; ++i) fn(i, omp_get_thread_num());
}

// Hands out parts of the scratch memory, each on a cache line. With a null base it only measures.
class Scratch {
 public:
  explicit Scratch(float* base) : base_(base) {}
  float* take(int64_t floats) {
    float* part = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(floats, 16);
    return part;
  }
  int64_t* take_indices(int64_t count) { return reinterpret_cast<int64_t*>(take(2 * count)); }
  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

}  // namespace ulfine::ULFINE_ISA
