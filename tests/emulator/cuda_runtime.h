// The part of CUDA that the kernels use, for g++, so that the same .cu files run without a GPU.
//
// Blocks run one after the other, the threads of a block as fibres: each runs until it waits for others, at a
// barrier or at a shuffle. What a GPU leaves open is drawn anew for every launch, the order of the blocks and
// of the threads; shared memory is filled with NaN before a block starts. A launch fails if not every thread
// of a block reaches a barrier, or not every thread of a warp a shuffle.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// All shared variables lie in one section, whose ends the linker names.
#define __shared__ static __attribute__((section("shared_memory")))

extern "C" __attribute__((weak)) unsigned char __start_shared_memory, __stop_shared_memory;

enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
using cudaStream_t = struct Stream*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr unsigned kWarpThreads = 32, kMostThreads = 1024;
constexpr size_t kStack = 64 * 1024;

enum class Waits { kNot, kAtBarrier, kAtShuffle, kForNothing };

struct Fibre {
  ucontext_t entry;
  jmp_buf registers;
  bool started;
  Waits waits;
  int shuffles;  // that it has taken part in
};

struct Block {
  std::vector<Fibre> fibres = std::vector<Fibre>(kMostThreads);
  std::unique_ptr<char[]> stacks{new char[kMostThreads * kStack]};
  // What the threads of a warp show each other: two places, because the fastest may be one shuffle ahead.
  uint64_t shown[2][kMostThreads];
  jmp_buf scheduler;
  void (*run)(const void*);
  const void* arguments;
};

inline Block block;
inline std::mt19937 order;
inline const char* failure = "";
inline int launches = 0;

__attribute__((noinline)) inline void wait(Waits what) {
  Fibre& own = block.fibres[threadIdx.x];
  own.waits = what;
  if (_setjmp(own.registers) == 0) _longjmp(block.scheduler, 1);
}

inline void enter() {
  block.run(block.arguments);
  wait(Waits::kForNothing);
}

__attribute__((noinline)) inline void resume(unsigned thread) {
  Fibre& fibre = block.fibres[thread];
  fibre.waits = Waits::kNot;
  threadIdx.x = thread;
  if (_setjmp(block.scheduler) != 0) return;
  if (fibre.started) _longjmp(fibre.registers, 1);
  fibre.started = true;
  setcontext(&fibre.entry);
}

// The numbers first <= i < last in an order of their own.
inline std::vector<unsigned> shuffled(unsigned first, unsigned last) {
  std::vector<unsigned> turns(last - first);
  std::iota(turns.begin(), turns.end(), first);
  std::shuffle(turns.begin(), turns.end(), order);
  return turns;
}

inline bool all_wait(unsigned first, unsigned last, Waits what) {
  return std::all_of(&block.fibres[first], &block.fibres[last],
                     [what](const Fibre& fibre) { return fibre.waits == what; });
}

// Runs the threads of one block; whether they all came to their end. Between two barriers one warp runs as
// far as it can before the next one starts, so that a barrier too few shows.
inline bool run_block(unsigned threads) {
  memset(&__start_shared_memory, 0xFF, &__stop_shared_memory - &__start_shared_memory);
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& fibre = block.fibres[i];
    fibre.started = false;
    fibre.shuffles = 0;
    getcontext(&fibre.entry);
    fibre.entry.uc_stack = {block.stacks.get() + i * kStack, 0, kStack};
    makecontext(&fibre.entry, enter, 0);
  }
  do {
    for (unsigned warp : shuffled(0, threads / kWarpThreads)) {
      const unsigned first = warp * kWarpThreads, last = first + kWarpThreads;
      do {
        for (unsigned thread : shuffled(first, last)) resume(thread);
      } while (all_wait(first, last, Waits::kAtShuffle));
    }
    if (all_wait(0, threads, Waits::kForNothing)) return true;
  } while (all_wait(0, threads, Waits::kAtBarrier));
  failure = "not every thread of the block reaches a barrier, or of a warp a shuffle";
  return false;
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::Waits::kAtBarrier); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned own = threadIdx.x;
  uint64_t* shown = emulator::block.shown[emulator::block.fibres[own].shuffles++ % 2];
  memcpy(&shown[own], &value, sizeof(T));
  emulator::wait(emulator::Waits::kAtShuffle);
  memcpy(&value, &shown[own ^ distance], sizeof(T));
  return value;
}

template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}

inline const char* cudaGetErrorString(cudaError_t) { return emulator::failure; }

template <class A>
cudaError_t cudaLaunchKernel(void (*kernel)(A), dim3 blocks, dim3 threads, void** arguments, size_t,
                             cudaStream_t) {
  ++emulator::launches;
  using Call = std::tuple<void (*)(A), A>;
  const Call call{kernel, *static_cast<A*>(arguments[0])};
  emulator::block.run = [](const void* c) {
    const auto& [function, argument] = *static_cast<const Call*>(c);
    function(argument);
  };
  emulator::block.arguments = &call;
  gridDim = blocks;
  blockDim = threads;
  for (unsigned turn : emulator::shuffled(0, blocks.x)) {
    blockIdx.x = turn;
    if (!emulator::run_block(threads.x)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}
