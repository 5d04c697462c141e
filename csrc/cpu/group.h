// SPDX-License-Identifier: Apache-2.0
// One group of rows: how to walk it, and its moments.
#pragma once
#include "../math/group.h"

#include "lanes.h"

namespace rlkern {
namespace RLKERN_ISA {

// f(row) for each row of group g, in the order of the batch.
template <class F>
inline void for_group(const Groups& groups, int64_t g, F&& f) {
  for (int64_t i = groups.offsets[g]; i < groups.offsets[g + 1]; ++i) f(groups.order[i]);
}
// weights: null where every row weighs the same. omit: a NaN is no score.
inline GroupMoments moments_of(const Groups& groups, int64_t g, const double* scores, const double* weights, bool omit = false) {
  int64_t begin = groups.offsets[g];
  const int64_t end = groups.offsets[g + 1];
  auto left_out = [&](int64_t r) { return omit && scores[r] != scores[r]; };
  while (begin < end && left_out(groups.order[begin])) ++begin;
  const double shift = shift_of(begin < end ? scores[groups.order[begin]] : 0.0);
  GroupSums sums;
  for_group(groups, g, [&](int64_t r) {
    if (left_out(r)) return;
    const double d = scores[r] - shift;
    sums.add(d);
    if (weights) sums.weigh(d, weights[r]);
  });
  GroupMoments m = sums.moments(shift, weights != nullptr);
  for_group(groups, g, [&](int64_t r) {
    if (left_out(r)) return;
    const double d = m.deviation(scores[r]);
    m.m2 += d * d;
  });
  return m;
}

// A (B,) operand as doubles.
struct Doubled {
  Scratch<double> memory;
  const double* data;
  explicit Doubled(const Operand& x) : memory(x ? x.rows : 0), data(x ? memory.data : nullptr) {
    for (int64_t r = 0; r < x.rows && x; ++r) memory.data[r] = row_value<double>(x, r);
  }
};

}  // namespace RLKERN_ISA
}  // namespace rlkern
