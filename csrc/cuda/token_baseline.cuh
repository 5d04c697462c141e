// SPDX-License-Identifier: Apache-2.0
// Rows in chunks: a chunk's tokens as threads have them, and scans in both directions.
#pragma once
#include "../math/group.h"
#include "reduce.cuh"
#include "rows.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

// A row in chunks of as many tokens as a group has columns in shared memory. A thread has one piece of a chunk; a chunk that
// begins inside a piece ends in one more, so one thread is spare.
template <class S>
struct Shape {
  static constexpr int N = Stored<S>::kPiece;
  static constexpr int kThreads = N == 8 ? 128 : 256, kBlocks = 512 / kThreads;  // of a multiprocessor: 128 registers a thread
  static constexpr int kPieces = kThreads - 1;
  static constexpr int64_t kChunk = static_cast<int64_t>(kPieces) * N;
  static constexpr size_t kShared = 2 * kChunk * sizeof(double);
  static_assert(kThreads % kWarp == 0 && kShared <= 16 << 10, "whole warps, two sums a column");
};

// ---- chunks -------------------------------------------------------------------------------------------------------------
// Of a chunk; later of what lies around it: rewards after it, path variances and valid tokens before it.
struct Sums {
  double reward = 0, variance = 0;
  int64_t valid = 0;
};
__device__ __forceinline__ Sums added(const Sums& x, const Sums& y) { return {x.reward + y.reward, x.variance + y.variance, x.valid + y.valid}; }

struct Work {  // how the launch is split
  Sums* chunks = nullptr;     // null: every row is one chunk, and nothing is around it
  int64_t* valid = nullptr;   // of a row
  int64_t a_row = 1;          // chunks of a row; of a packed one, blocks that share it
  int64_t a_group = 1;        // blocks that share a group
};
template <class S>
struct Row {
  int64_t r, length, chunks, first;  // the place of its first chunk among all
  int lead;
  __device__ __forceinline__ Row(const TokenBaselineArgs& a, const Work& work, int64_t row) : r(row), length(a.rows.len(row)) {
    constexpr int64_t K = Shape<S>::kChunk;
    chunks = (length + K - 1) / K;
    first = a.rows.cu ? a.rows.cu[r] / K + r : r * work.a_row;
    lead = lead_of<S>(a.rewards, a.rows.base(a.rewards, r));
  }
};

// A thread's tokens of a chunk: what is masked is 0. Rewards and variances become G and W in place.
template <class S>
struct Tokens {
  static constexpr int N = Stored<S>::kPiece;
  using A = ArithmeticOf<S>;
  Piece p;
  unsigned valid = 0;
  A reward[N], variance[N];
  int column = 0;
  bool packed = false;
  // Of token i, by its distance from the block's first column.
  __device__ __forceinline__ int column_of(int i) const { return column + (packed ? __popc(valid & ((1u << i) - 1)) : i); }
  template <bool Variance>
  __device__ __forceinline__ void read(const TokenBaselineArgs& a, const Row<S>& row, int64_t q) {
    const int64_t from = q * Shape<S>::kChunk, to = from + Shape<S>::kChunk;
    p = piece_of<N>(q * Shape<S>::kPieces + threadIdx.x, row.lead, row.length);
    if (from - p.first > p.begin) p.begin = static_cast<int>(from - p.first);
    if (to - p.first < p.end) p.end = static_cast<int>(to - p.first);
    clip(p.begin, p.end);
    const auto base = [&](const Operand& x) { return a.rows.base(x, row.r); };
    const Loaded<S> x = load<S>(a.rewards, base(a.rewards), p);
    Loaded<S> old{}, squares{}, weights{};
    if constexpr (Variance) {
      old = load<S>(a.old_log_prob, base(a.old_log_prob), p), squares = load<S>(a.sum_pi_squared, base(a.sum_pi_squared), p);
      weights = load<S>(a.weights, base(a.weights), p);
    }
    valid = valid_bits<N>(a.mask, base(a.mask), p);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool there = valid >> i & 1;
      reward[i] = there ? x[i] : A(0), variance[i] = A(0);
      if constexpr (Variance)
        if (there) variance[i] = a.weights ? path_variance(old[i], squares[i]) * (weights[i] * weights[i]) : path_variance(old[i], squares[i]);
    }
  }
  __device__ __forceinline__ void clip(int begin, int end) {
    p.begin = begin < end ? begin : 0, p.end = begin < end ? end : 0;
    p.whole = p.begin == 0 && p.end == N;
  }
  __device__ __forceinline__ Sums sums() const {
    Sums s;
#pragma unroll
    for (int i = 0; i < N; ++i) s.reward += static_cast<double>(reward[i]), s.variance += static_cast<double>(variance[i]);
    s.valid = __popc(valid);
    return s;
  }
};

// ---- scans --------------------------------------------------------------------------------------------------------------
// In `x`, what lies around this lane; in `all`, of lane 0 the rewards and of the last lane the rest, of the whole warp.
__device__ __forceinline__ void around_lane(Sums& x, Sums& all) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  all = x;
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    const double after = from_above(all.reward, d), before = from_below(all.variance, d);
    const int64_t count = from_below(all.valid, d);
    if (lane + d < kWarp) all.reward += after;
    if (lane >= d) all.variance += before, all.valid += count;
  }
  x = {from_above(all.reward, 1), from_below(all.variance, 1), from_below(all.valid, 1)};
  if (lane == kWarp - 1) x.reward = 0;
  if (lane == 0) x.variance = 0, x.valid = 0;
}
// What lies around this thread within its block; `valid`: of the block.
template <int Threads>
__device__ __forceinline__ Sums around_thread(Sums x, int64_t& valid) {
  constexpr int kWarps = Threads / kWarp;
  RLKERN_SHARED(Sums, of_warp, kWarps);
  const int warp = static_cast<int>(threadIdx.x / kWarp), lane = static_cast<int>(threadIdx.x % kWarp);
  Sums all, around;
  around_lane(x, all);
  if (lane == 0) of_warp[warp].reward = all.reward;
  if (lane == kWarp - 1) of_warp[warp].variance = all.variance, of_warp[warp].valid = all.valid;
  __syncthreads();
  valid = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    valid += of_warp[w].valid;
    if (w < warp) around.variance += of_warp[w].variance, around.valid += of_warp[w].valid;
    if (kWarps - 1 - w > warp) around.reward += of_warp[kWarps - 1 - w].reward;
  }
  __syncthreads();  // the next scan writes where this one reads
  return added(around, x);
}

}  // namespace
}  // namespace RLKERN_ISA
}  // namespace rlkern
