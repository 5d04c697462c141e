// SPDX-License-Identifier: Apache-2.0
// What threads tell each other: within a warp, a block, a grid. Every fold has one order, so the bits are the same in every
// run. T is any plain type, and op(a, b) puts what came first on the left.
#pragma once
#include <cooperative_groups.h>

#include <type_traits>

#include "launch.cuh"

namespace rlkern {
namespace RLKERN_ISA {

constexpr unsigned kWholeWarp = 0xffffffffu;

// ---- a warp: its 32 threads call together -----------------------------------------------------------------------------
// A plain value as words that shuffles move and caches hold.
template <class T>
struct Words {
  using Word = std::conditional_t<sizeof(T) % 8 == 0, unsigned long long, unsigned>;
  static_assert(sizeof(T) % 4 == 0, "words of 4 or 8 bytes");
  static constexpr int kCount = sizeof(T) / sizeof(Word);
  Word word[kCount];
  __device__ __forceinline__ explicit Words(const T& x) { memcpy(word, &x, sizeof(T)); }
  __device__ __forceinline__ T value() const {
    T x;
    memcpy(&x, word, sizeof(T));
    return x;
  }
};
// The value of the thread `distance` lanes up; its own where there is none.
template <class T>
__device__ __forceinline__ T from_above(const T& mine, int distance) {
  Words<T> w(mine);
#pragma unroll
  for (int i = 0; i < Words<T>::kCount; ++i) w.word[i] = __shfl_down_sync(kWholeWarp, w.word[i], distance);
  return w.value();
}
template <class T>
__device__ __forceinline__ T from_below(const T& mine, int distance) {
  Words<T> w(mine);
#pragma unroll
  for (int i = 0; i < Words<T>::kCount; ++i) w.word[i] = __shfl_up_sync(kWholeWarp, w.word[i], distance);
  return w.value();
}
template <class T>
__device__ __forceinline__ T from_lane(const T& mine, int lane) {
  Words<T> w(mine);
#pragma unroll
  for (int i = 0; i < Words<T>::kCount; ++i) w.word[i] = __shfl_sync(kWholeWarp, w.word[i], lane);
  return w.value();
}
// Lane 0 has the fold of all lanes, in order.
template <class T, class Op>
__device__ __forceinline__ T warp_fold(T mine, Op op) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) mine = op(mine, from_above(mine, distance));
  return mine;
}

// ---- a block: all its threads call together ---------------------------------------------------------------------------
// Every thread has the fold of all, in order. Threads: the block's, whole warps.
template <int Threads, class T, class Op>
__device__ __forceinline__ T block_fold(T mine, Op op) {
  static_assert(Threads % kWarp == 0 && Threads <= 1024, "whole warps");
  constexpr int kWarps = Threads / kWarp;
  RLKERN_SHARED(T, of_warp, kWarps);
  mine = warp_fold(mine, op);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = mine;
  __syncthreads();
  T all = of_warp[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) all = op(all, of_warp[w]);
  __syncthreads();  // the next fold writes where this one reads
  return all;
}

// ---- a grid -----------------------------------------------------------------------------------------------------------
// Leaves this block's value in parts[blockIdx.x]. In the last block to finish, and there alone, it gives true: all parts
// are written then. The counter is 0 before the launch and after it.
template <class T>
__device__ __forceinline__ bool last_to_finish(const T& of_block, T* parts, unsigned* counter) {
  RLKERN_SHARED(bool, last, 1);
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = of_block;
    __threadfence();  // the part before the count
    last[0] = atomicAdd(counter, 1u) == gridDim.x - 1;
    if (last[0]) *counter = 0;
  }
  __syncthreads();
  const bool is_last = last[0];
  if (is_last) __threadfence();
  return is_last;
}
// What other blocks have written: not from a cache of this multiprocessor.
template <class T>
__device__ __forceinline__ T part(const T* parts, int64_t i) {
  using Word = typename Words<T>::Word;
  T found;
  const Word* from = reinterpret_cast<const Word*>(parts + i);
  Word word[Words<T>::kCount];
#pragma unroll
  for (int w = 0; w < Words<T>::kCount; ++w) word[w] = __ldcg(from + w);
  memcpy(&found, word, sizeof(T));
  return found;
}
// A word that a loop waits for another block to change. Volatile, since the assembler takes other loads, __ldcg too, out of the loop.
__device__ __forceinline__ unsigned watched(const unsigned* word) { return *static_cast<const volatile unsigned*>(word); }
// The fold of parts[0, count) in order: a run of them a thread, then the block's fold. All threads of a block have it.
template <int Threads, class T, class Op>
__device__ __forceinline__ T fold_parts(const T* parts, int count, T none, Op op) {
  const int share = (count + Threads - 1) / Threads, begin = static_cast<int>(threadIdx.x) * share;
  T mine = none;
  for (int i = begin; i < begin + share && i < count; ++i) mine = op(mine, part(parts, i));
  return block_fold<Threads>(mine, op);
}
// All blocks of a cooperative launch meet.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

}  // namespace RLKERN_ISA
}  // namespace rlkern
