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

// `clamp`: of the ratio that the metrics report.
inline void policy_results(const PolicyLossArgs& a, const RowSums* rows, double clamp) {
  const Counts counts(rows, a.rows.count);
  const AggWeights agg(a.agg, counts.tokens, counts.sequences);
  double sums[kPolicySums] = {}, pg = 0, kl = 0, entropy = 0, high = -__builtin_inf(), far = 0;
  for (int64_t r = 0; r < a.rows.count; ++r) {
    const RowSums& s = rows[r];
    const double w = agg.row(s.tokens);
    pg += w * s.loss, kl += w * s.kl, entropy += w * s.entropy;
    sums[kClipped] += static_cast<double>(s.clipped), sums[kClippedLower] += static_cast<double>(s.lower);
    sums[kNegLogRatio] += s.neg_log_ratio, sums[kNonfinite] += static_cast<double>(s.nonfinite);
    if (s.tokens > 0) high = s.high > high ? s.high : high, far = s.far > far ? s.far : far;
  }
  pg *= agg.scale, kl *= agg.scale, entropy *= agg.scale;
  sums[kTokens] = counts.tokens, sums[kSequences] = counts.sequences, sums[kPgLoss] = pg;
  sums[kKlLoss] = a.ref_log_prob ? kl : 0, sums[kEntropyLoss] = a.entropy ? entropy : 0;
  double total = pg;
  if (a.ref_log_prob && a.kl_coef != 0) total += a.kl_coef * kl;
  if (a.entropy && a.entropy_coeff != 0) total -= a.entropy_coeff * entropy;
  put(a.loss, 0, total);
  for (int i = 0; i < kPolicySums; ++i) put(a.sums, i, sums[i]);
  const double most = high < clamp ? high : clamp;
  put(a.maxes, kRatioMax, counts.tokens > 0 ? ::exp(most) : 0);
  put(a.maxes, kAbsLogRatioMax, far);
}

template <class... O>
inline bool any_double(const O&... x) {
  return ((x && x.dtype == Dtype::f64) || ...);
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
