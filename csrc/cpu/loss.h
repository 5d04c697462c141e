// SPDX-License-Identifier: Apache-2.0
// What the losses share: the mask counted beforehand where the aggregation needs it, and sums per row.
#pragma once
#include "../math/loss.h"
#include "mask.h"

namespace rlkern {
namespace RLKERN_ISA {

// One row's sums. They are merged in row order, so that bits do not depend on the thread count.
struct RowSums {
  double tokens, loss, neg_log_ratio, kl, entropy, high, far;  // value loss: neg_log_ratio holds the predictions
  int64_t clipped, lower, nonfinite;
};

// The mask of every row, counted and kept.
struct Counted {
  Scratch<uint16_t> lanes;
  KeptLanes kept;
  bool on;
  Counted(const Rows& rows, int width, bool wanted) : lanes(wanted ? KeptLanes::count(rows, width) : 0), kept(rows, width, lanes.data), on(wanted) {}
  uint16_t* row(int64_t r) const { return on ? kept.row(r) : nullptr; }
};
template <class A>
inline void count_mask(const Rows& rows, const Operand& mask, int threads, const Counted& counted, RowSums* sums) {
  constexpr int W = kLanes<A>;
  parallel_rows(rows.count, rows.total(), threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = end - 1; r >= begin; --r) {
      const MaskRow row(mask, rows, r);
      uint16_t* kept = counted.row(r);
      int64_t tokens = 0;
      for_vectors<A, true>(rows.len(r), [&](int64_t i, int64_t n) RLKERN_INLINE {
        const uint32_t m = row.lanes<W>(i, n);
        kept[i / W] = static_cast<uint16_t>(m);
        tokens += __builtin_popcount(m);
      });
      sums[r].tokens = static_cast<double>(tokens);
    }
  });
}

struct Counts {
  double tokens = 0, sequences = 0;
  Counts(const RowSums* sums, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) tokens += sums[r].tokens, sequences += sums[r].tokens > 0 ? 1 : 0;
  }
};

// row(r, what its gradients are multiplied by, its mask if that was counted beforehand, stream) for every row, downwards.
template <class A, class Args, class Row>
inline void sweep_rows(const Args& a, RowSums* sums, Row&& row) {
  const int64_t total = a.rows.total();
  const bool stream = worth_streaming(total, 24), first = counts_first(a.agg);
  const Counted counted(a.rows, kLanes<A>, first);
  if (first) count_mask<A>(a.rows, a.mask, a.place, counted, sums);
  const Counts counts(sums, first ? a.rows.count : 0);
  const AggWeights agg(a.agg, counts.tokens, counts.sequences);
  parallel_rows(a.rows.count, total, a.place, [&](int64_t begin, int64_t end) {
    for (int64_t r = end - 1; r >= begin; --r) row(r, A(agg.scale * agg.row(sums[r].tokens)), counted.row(r), stream);
    if (stream) stream_fence();
  });
}

inline void put(const Operand& x, int64_t i, double v) {
  const Rows one{1, x.cols, nullptr};
  if (x) OutColumn<double>(x, one, 0, false)(i, 1, splat(v));
}

inline void policy_results(const PolicyLossArgs& a, const RowSums* rows, double clamp) {
  const Counts counts(rows, a.rows.count);
  const AggWeights agg(a.agg, counts.tokens, counts.sequences);
  PolicyTotals t;
  t.tokens = counts.tokens, t.sequences = counts.sequences;
  for (int64_t r = 0; r < a.rows.count; ++r) {
    const RowSums& s = rows[r];
    const double w = agg.row(s.tokens);
    t.loss += w * s.loss, t.kl += w * s.kl, t.entropy += w * s.entropy;
    t.clipped += static_cast<double>(s.clipped), t.lower += static_cast<double>(s.lower);
    t.neg_log_ratio += s.neg_log_ratio, t.nonfinite += static_cast<double>(s.nonfinite);
    if (s.tokens > 0) t.high = s.high > t.high ? s.high : t.high, t.far = s.far > t.far ? s.far : t.far;
  }
  put_policy(a, t, agg.scale, clamp, put);
}

template <class... O>
inline bool any_double(const O&... x) {
  return ((x && x.dtype == Dtype::f64) || ...);
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
