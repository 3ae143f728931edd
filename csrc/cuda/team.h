// A team is the threads that share one row: a warp where rows are short, a whole block where they are long.
// Every thread of a team must come to a reduction.
#pragma once

#define ULFINE_ISA cuda
#include <cuda_runtime.h>

#include "../row_math.h"

namespace ulfine::cuda {

constexpr int kWarp = 32;
constexpr int kBlock = 256;
// Longest row of a warp.
constexpr int64_t kShortRow = 128;

// This thread's place in its team, and its team's among all teams.
template <int kTeam>
__device__ inline int lane() {
  return static_cast<int>(threadIdx.x) % kTeam;
}

template <int kTeam>
__device__ inline int64_t team() {
  return static_cast<int64_t>(blockIdx.x) * (kBlock / kTeam) + threadIdx.x / kTeam;
}

// The value of the lane at this distance; T is made of whole words.
template <class T>
__device__ inline T exchange(T value, int distance) {
  constexpr int kWords = sizeof(T) / sizeof(unsigned);
  unsigned words[kWords];
  memcpy(words, &value, sizeof(T));
  for (unsigned& word : words) word = __shfl_xor_sync(~0u, word, distance);
  memcpy(&value, words, sizeof(T));
  return value;
}

// combine() of the values of a team, in one fixed order, so that all its threads get the same bits in every
// run.
template <int kTeam, class T, class Combine>
__device__ inline T reduce(T value, const Combine& combine) {
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const T other = exchange(value, distance);
    value = threadIdx.x & distance ? combine(other, value) : combine(value, other);
  }
  if constexpr (kTeam > kWarp) {
    __shared__ T warps[kTeam / kWarp];
    // The reduction before this one may still be read.
    __syncthreads();
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = warps[0];
    for (int i = 1; i < kTeam / kWarp; ++i) value = combine(value, warps[i]);
  }
  return value;
}

template <int kTeam, class T>
__device__ inline T sum(T value) {
  return reduce<kTeam>(value, [](T a, T b) { return a + b; });
}

// Sum over a row of what `term` gives for each index.
template <int kTeam, class T, class Term>
__device__ inline T sum_over(int64_t n, const Term& term) {
  T total = 0;
  for (int64_t i = lane<kTeam>(); i < n; i += kTeam) total += term(i);
  return sum<kTeam>(total);
}

// Starts blocks of kBlock threads; null, or the text of the error.
template <class Arguments>
const char* launch(void (*kernel)(Arguments), int64_t blocks, Arguments arguments, void* stream) {
  if (blocks == 0) return nullptr;
  void* pointers[] = {&arguments};
  const cudaError_t error = cudaLaunchKernel(kernel, dim3{static_cast<unsigned>(blocks)}, dim3{kBlock},
                                             pointers, 0, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Starts a team for each of `rows` rows of this length.
template <class Arguments>
const char* launch_rows(void (*by_warps)(Arguments), void (*by_blocks)(Arguments), int64_t length,
                        int64_t rows, const Arguments& arguments, void* stream) {
  constexpr int64_t kTeams = kBlock / kWarp;
  if (length > kShortRow) return launch(by_blocks, rows, arguments, stream);
  return launch(by_warps, (rows + kTeams - 1) / kTeams, arguments, stream);
}

}  // namespace ulfine::cuda
