// SPDX-License-Identifier: Apache-2.0
// Count, mean and M2 of what a scope's threads have seen.
#pragma once
#include "held.cuh"

namespace rlkern {
namespace RLKERN_ISA {

// Sums of differences to a center, in float64: one look at each value, no difference of large squares. The center is the mean of
// what a thread holds in registers, so that an outlier costs no digits; of a thread that holds nothing valid, its first value.
struct ShiftedSums {
  double count = 0, center = 0, first = 0, second = 0;
  bool centered = false;
  __device__ __forceinline__ void center_on(const Pair& of_held) {  // their sum, and how many
    if (of_held.b > 0) center = of_held.a / of_held.b, centered = true;
  }
  __device__ __forceinline__ void add(double v) {
    if (!centered) center = v, centered = true;
    const double d = v - center;
    count += 1, first += d, second = fused(d, d, second);
  }
  __device__ __forceinline__ Moments moments() const {
    Moments m;
    if (count == 0) return m;
    const double d = first / count, m2 = second - first * d;
    m.count = count, m.mean = center + d, m.m2 = m2 < 0 ? 0 : m2;  // rounding; a NaN stays
    return m;
  }
};
struct Part {
  Moments moments;
  double weighs = 0;  // not 0: a mask holds weights
};
__device__ __forceinline__ Part merged(Part x, const Part& y) {
  x.moments.merge(y.moments), x.weighs += y.weighs;
  return x;
}

// Of a mask that holds weights: sum(w) and sum(w v), with which a sum is content, then sum(w (v - mean)^2). Rare, so read again
// by element.
template <class S, bool ByRow>
__device__ __forceinline__ Moments weighed(const Operand& values, const Operand& mask, bool want_m2, const Walk<S, ByRow>& walk, Part* parts) {
  Pair* room = reinterpret_cast<Pair*>(parts + gridDim.x);
  double mean = 0, count = 0;
  for (int pass = 0; pass < 2; ++pass, room += gridDim.x) {
    Pair mine;
    for (int64_t j = 0;; ++j) {
      const auto s = walk.at(j);
      if (s.past) break;
      if (!s.there) continue;
      for (int i = s.piece.begin; i < s.piece.end; ++i) {
        const int64_t at = s.piece.first + i;
        const double w = element<double>(mask, walk.base(mask, s.row) + at * mask.inner_stride);
        if (w == 0) continue;
        const double d = element<double>(values, walk.base(values, s.row) + at * values.inner_stride) - mean;
        mine.a += pass ? w * d * d : w * d, mine.b += w;
      }
    }
    const Pair all = scope_fold<ByRow>(mine, room, Pair{}, plus);
    if (pass) return {count, mean, all.a};
    if (!want_m2) return {all.b, all.a, 0};
    count = all.b, mean = count != 0 ? all.a / count : 0;
  }
  return {};
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
