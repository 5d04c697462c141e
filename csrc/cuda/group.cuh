// SPDX-License-Identifier: Apache-2.0
// One group of rows as a team of threads sees it: a warp, or a block where groups are large.
#pragma once
#include "../math/group.h"
#include "reduce.cuh"
#include "rows.cuh"

namespace rlkern {
namespace RLKERN_ISA {

constexpr int kTeamRows = 128;  // rows of a group from which on, by the mean of the batch, a block takes it
inline bool large_groups(const Groups& groups, int64_t rows) { return groups.count > 0 && rows / groups.count >= kTeamRows; }

// A team of 32 threads, or of a whole block's. All of them have what all brought, in order.
template <int Threads, class T, class Op>
__device__ __forceinline__ T team_fold(const T& mine, Op op) {
  if constexpr (Threads == kWarp) {
    Words<T> w(warp_fold(mine, op));
#pragma unroll
    for (int i = 0; i < Words<T>::kCount; ++i) w.word[i] = __shfl_sync(kWholeWarp, w.word[i], 0);
    return w.value();
  } else {
    return block_fold<Threads>(mine, op);
  }
}

// The rows of a group: a thread has every so many-th. Score: a row's, as double; that of a thread's first row stays in a register.
// A thread may overwrite a score in the last round.
template <int Threads, class Score>
struct Members {
  const int64_t* order;
  int64_t first, end, row = -1;
  double held = 0;
  bool omit;
  Score score;
  __device__ __forceinline__ Members(const Groups& groups, int64_t g, bool omits, Score of)
      : order(groups.order), first(groups.offsets[g] + threadIdx.x % Threads), end(groups.offsets[g + 1]), omit(omits), score(of) {
    if (first < end) row = order[first], held = score(row);
  }
  __device__ __forceinline__ bool left_out(double s) const { return omit && s != s; }
  // f(row, score, place in the order)
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    if (first < end) f(row, held, first);
#pragma unroll 1
    for (int64_t i = first + Threads; i < end; i += Threads) {
      const int64_t r = order[i];
      f(r, score(r), i);
    }
  }
  // Without those that are left out.
  template <class F>
  __device__ __forceinline__ void each_there(F&& f) const {
    each([&](int64_t r, double s, int64_t i) {
      if (!left_out(s)) f(r, s, i);
    });
  }
};

struct FirstScore {
  int64_t place = INT64_MAX;
  double score = 0;
};
// As moments_of in csrc/cpu/group.h: two passes about the first score. Weight: a row's, asked where rows weigh differently.
template <int Threads, class Score, class Weight>
__device__ __forceinline__ GroupMoments moments_of(const Members<Threads, Score>& members, bool weighs, Weight weight) {
  FirstScore found;
  members.each_there([&](int64_t, double s, int64_t i) {
    if (i < found.place) found = {i, s};
  });
  found = team_fold<Threads>(found, [](const FirstScore& x, const FirstScore& y) { return y.place < x.place ? y : x; });
  const double shift = shift_of(found.score);
  GroupSums sums;
  members.each_there([&](int64_t r, double s, int64_t) {
    sums.add(s - shift);
    if (weighs) sums.weigh(s - shift, weight(r));
  });
  sums = team_fold<Threads>(sums, [](GroupSums x, const GroupSums& y) {
    x.merge(y);
    return x;
  });
  GroupMoments m = sums.moments(shift, weighs);
  double m2 = 0;
  members.each_there([&](int64_t, double s, int64_t) {
    const double d = m.deviation(s);
    m2 += d * d;
  });
  m.m2 = team_fold<Threads>(m2, [](double x, double y) { return x + y; });
  return m;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
