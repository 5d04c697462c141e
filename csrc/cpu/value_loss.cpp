// SPDX-License-Identifier: Apache-2.0
// Value loss, in the manner of loss.cpp.
#include "loss.h"

#include "../kernels.h"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

template <class A>
RLKERN_RARE int64_t value_nonfinite(const ValueLossArgs& a, int64_t r) {
  const Column<A> vpreds(a.vpreds, a.rows, r), returns(a.returns, a.rows, r), values(a.values, a.rows, r);
  const MaskRow mask(a.mask, a.rows, r);
  int64_t found = 0;
  for (int64_t i = 0; i < a.rows.len(r); ++i) {
    if (!mask.lanes<kLanes<A>>(i, 1)) continue;
    const A term = value_token<A>(vpreds(i, 1)[0], returns(i, 1)[0], values ? values(i, 1)[0] : A(0), A(a.range), A(a.delta)).loss;
    found += term - term == 0 ? 0 : 1;
  }
  return found;
}
template <class A>
void value_row(const ValueLossArgs& a, int64_t r, A weight, const uint16_t* kept, bool stream, RowSums& sums) {
  using V = Vec<A>;
  constexpr int W = kLanes<A>;
  const Column<A> vpreds(a.vpreds, a.rows, r), returns(a.returns, a.rows, r), values(a.values, a.rows, r);
  const MaskRow mask(a.mask, a.rows, r);
  const OutColumn<A> d_vpreds(a.d_vpreds, a.rows, r, stream);
  const V zero{}, g = splat(weight), range = splat(A(a.range)), delta = splat(A(a.delta));
  V high{};
  Sum<A> loss, predictions;
  Count<A> clipped;
  int64_t tokens = 0;
  const bool direct = vpreds.direct() && returns.direct() && values.direct() && d_vpreds.direct() && (kept || mask.direct());
  for_lanes<A, true>(a.rows.len(r), direct, [&](auto way, int64_t i, int64_t n) RLKERN_INLINE {
    const uint32_t m = kept ? kept[i / W] : mask.template lanes<W>(way, i, n);
    if (m == 0) return d_vpreds(way, i, n, zero);
    const V vpred = vpreds.valid(way, i, n, m), ret = returns.valid(way, i, n, m);
    const auto t = value_token(vpred, ret, values ? values.valid(way, i, n, m) : zero, range, delta);
    d_vpreds(way, i, n, m == kAllLanes<A> ? t.grad * g : blend(m, t.grad * g, zero));
    loss.add(t.loss), predictions.add(vpred);
    const V error = vpred - ret, size = error < zero ? -error : error;
    high = size > high ? size : high;
    tokens += __builtin_popcount(m), clipped.add(t.clipped);
  });
  sums.tokens = static_cast<double>(tokens), sums.loss = loss.total(), sums.neg_log_ratio = predictions.total();
  sums.clipped = clipped.total(), sums.nonfinite = 0, sums.high = 0;
  for (int k = 0; k < W; ++k) sums.high = high[k] > sums.high ? high[k] : sums.high;
  sums.nonfinite = sums.loss - sums.loss == 0 ? 0 : value_nonfinite<A>(a, r);
}

void value_results(const ValueLossArgs& a, const RowSums* rows) {
  const Counts counts(rows, a.rows.count);
  const AggWeights agg(a.agg, counts.tokens, counts.sequences);
  ValueTotals t;
  t.tokens = counts.tokens, t.sequences = counts.sequences;
  for (int64_t r = 0; r < a.rows.count; ++r) {
    const RowSums& s = rows[r];
    t.loss += agg.row(s.tokens) * s.loss;
    t.clipped += static_cast<double>(s.clipped), t.predictions += s.neg_log_ratio, t.nonfinite += static_cast<double>(s.nonfinite);
    t.far = s.high > t.far ? s.high : t.far;
  }
  put_value(a, t, agg.scale, put);
}

template <class A>
void value_all(const ValueLossArgs& a) {
  Scratch<RowSums> sums(a.rows.count);
  sweep_rows<A>(a, sums.data, [&](int64_t r, A weight, const uint16_t* kept, bool stream) { value_row<A>(a, r, weight, kept, stream, sums.data[r]); });
  value_results(a, sums.data);
}

}  // namespace

double value_loss(const ValueLossArgs& a) {
  any_double(a.vpreds, a.returns, a.values) ? value_all<double>(a) : value_all<float>(a);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
