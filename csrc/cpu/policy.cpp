// SPDX-License-Identifier: Apache-2.0
// The variants of the policy loss. Where the ratio or a weight is the row's, a first sweep of the row sums what they need; where
// the gradient goes through the row, a last one spreads it. A row stays in the cache between them.
#include "loss.h"

#include "../kernels.h"
#include "../math/variants.h"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

// What a variant reads of a row.
template <class A>
struct Columns {
  using V = Vec<A>;
  Column<A> old_log_prob, log_prob, advantages, weights, ref_log_prob, entropy, behave;
  MaskRow mask, selected;
  const uint16_t* kept;
  Columns(const PolicyVariantArgs& a, int64_t r, const uint16_t* k)
      : old_log_prob(a.old_log_prob, a.rows, r), log_prob(a.log_prob, a.rows, r), advantages(a.advantages, a.rows, r), weights(a.weights, a.rows, r),
        ref_log_prob(a.ref_log_prob, a.rows, r), entropy(a.entropy, a.rows, r), behave(a.behave, a.rows, r), mask(a.mask, a.rows, r),
        selected(a.selected ? a.selected : a.mask, a.rows, r), kept(k) {}
  bool direct() const {
    return old_log_prob.direct() && log_prob.direct() && advantages.direct() && weights.direct() && ref_log_prob.direct() && entropy.direct() &&
           behave.direct() && (kept || mask.direct()) && selected.direct();
  }
  template <class Way>
  uint32_t lanes(Way way, int64_t i, int64_t n) const {
    return kept ? kept[i / kLanes<A>] : mask.template lanes<kLanes<A>>(way, i, n);
  }
};

template <class A, PolicyKind K>
VariantRow numbers_of_row(const PolicyVariantArgs& a, const Columns<A>& row, int64_t length) {
  using V = Vec<A>;
  const VariantNumbers<V> o(a);
  const V zero{};
  Sum<A> x, parts, advantages, logs;
  int64_t tokens = 0;
  for_lanes<A, true>(length, row.direct(), [&](auto way, int64_t i, int64_t n) RLKERN_INLINE {
    const uint32_t m = row.lanes(way, i, n);
    tokens += __builtin_popcount(m);
    if (K == PolicyKind::vespo && row.weights && !row.weights.per_row)  // masked tokens too
      logs.add(blend(static_cast<uint32_t>((uint64_t{1} << n) - 1), vespo_log(row.weights(way, i, n)), zero));
    if (m == 0) return;
    const V raw = row.log_prob.valid(way, i, n, m) - row.old_log_prob.valid(way, i, n, m);
    x.add(K == PolicyKind::vespo ? vespo_part(raw) : raw);
    if (K == PolicyKind::geo_mean) {
      const V advantage = row.advantages.valid(way, i, n, m);
      advantages.add(advantage), parts.add(geo_mean_part(raw, advantage, o));
      if (row.weights) logs.add(blend(m, geo_mean_log(row.weights(way, i, n)), zero));
    }
  });
  VariantSums sums{static_cast<double>(tokens), x.total(), parts.total(), advantages.total(), logs.total()};
  if (K == PolicyKind::vespo && row.weights && row.weights.per_row && length > 0) sums.logs += vespo_log(static_cast<double>(row.weights.value[0]));
  return variant_row(a, sums);
}

// One vector of tokens.
template <class A>
struct Step {
  Vec<A> loss, own, through, kl, raw, x;
  uint32_t clipped, lower;
};
template <class A, PolicyKind K, class Way>
RLKERN_INLINE inline Step<A> step_at(const PolicyVariantArgs& a, const VariantFrame<Vec<A>>& frame, const VariantOfRow<Vec<A>>& of_row, const Columns<A>& row,
                                     Way way, int64_t i, int64_t n, uint32_t m) {
  using V = Vec<A>;
  const V zero{};
  VariantSeen<V> t{row.log_prob.valid(way, i, n, m), row.old_log_prob.valid(way, i, n, m), row.advantages.valid(way, i, n, m), zero, zero, zero};
  if (row.weights) t.weight = row.weights.valid(way, i, n, m);
  if (row.behave) t.behave = row.behave.valid(way, i, n, m);
  if (a.selected) t.marked = blend(m & row.selected.template lanes<kLanes<A>>(way, i, n), constant<V>(1), zero);
  auto s = variant_step<K>(frame, of_row, t);
  Step<A> step{s.loss, s.own, s.through, zero, s.raw, s.x, lanes_of(s.clipped) & m, lanes_of(s.lower) & m};
  if (row.ref_log_prob)
    with_estimator(a.kl.estimator, [&](auto e) RLKERN_INLINE {
      step.kl = variant_kl<decltype(e)::value>(frame, of_row, t.log_prob, row.ref_log_prob.valid(way, i, n, m), s.ratio, s.blocked, step.own, step.through);
    });
  return step;
}

template <class A, PolicyKind K>
void sweep_row(const PolicyVariantArgs& a, int64_t r, A weight, const uint16_t* kept, bool stream, RowSums& sums) {
  using V = Vec<A>;
  const Columns<A> row(a, r, kept);
  const int64_t length = a.rows.len(r);
  const bool shares = a.level != Level::token && a.row_grad && (through_ratio(K) || a.by_ratio) && a.d_log_prob;
  const VariantRow its = of_row(K, a.level) ? numbers_of_row<A, K>(a, row, length) : VariantRow{};
  const VariantFrame<V> frame(a);
  const VariantOfRow<V> numbers(its);
  const OutColumn<A> d_log_prob(shares ? Operand{} : a.d_log_prob, a.rows, r, stream), d_entropy(a.d_entropy, a.rows, r, stream);
  const V zero{}, g = splat(weight), d_bonus = splat(A(-a.entropy_coeff * weight)), lowest = splat(-A(__builtin_inff()));
  V high = lowest, far{};
  Sum<A> loss, ratio, kl, bonus, through;
  int64_t tokens = 0, clipped = 0, lower = 0, bad = 0;
  for_lanes<A, true>(length, row.direct() && d_log_prob.direct() && d_entropy.direct(), [&](auto way, int64_t i, int64_t n) RLKERN_INLINE {
    const uint32_t m = row.lanes(way, i, n);
    if (m == 0) {
      d_log_prob(way, i, n, zero), d_entropy(way, i, n, zero);
      return;
    }
    const Step<A> step = step_at<A, K>(a, frame, numbers, row, way, i, n, m);
    if (shares) through.add(blend(m, step.through, zero));
    d_log_prob(way, i, n, blend(m, (step.own + step.through) * g, zero));
    d_entropy(way, i, n, blend(m, d_bonus, zero));
    const V value = blend(m, step.loss, zero), term = blend(m, step.kl, zero);
    loss.add(value), kl.add(term), ratio.add(blend(m, step.x, zero));
    if (row.entropy) bonus.add(row.entropy.valid(way, i, n, m));
    bad += __builtin_popcount(lanes_of(~(value - value == zero)));
    clipped += __builtin_popcount(step.clipped), lower += __builtin_popcount(step.lower), tokens += __builtin_popcount(m);
    high = Ops<V>::at_least(high, blend(m, step.raw, lowest)), far = Ops<V>::at_least(far, Ops<V>::magnitude(step.raw));  // a NaN is left out
  });
  sums = {static_cast<double>(tokens), loss.total(), -ratio.total(), kl.total(), bonus.total(), high[0], far[0], clipped, lower, bad};
  for (int k = 1; k < kLanes<A>; ++k) sums.high = high[k] > sums.high ? high[k] : sums.high, sums.far = far[k] > sums.far ? far[k] : sums.far;
  if (!shares) return;
  const OutColumn<A> out(a.d_log_prob, a.rows, r, stream);
  const V shared = splat(A(through.total() * weight / (a.level == Level::sequence && its.tokens > 0 ? its.tokens : 1)));
  const bool own = !through_ratio(K) || frame.with_kl;
  for_lanes<A, true>(length, row.direct() && out.direct(), [&](auto way, int64_t i, int64_t n) RLKERN_INLINE {
    const uint32_t m = row.lanes(way, i, n);
    const V d = own && m ? shared + step_at<A, K>(a, frame, numbers, row, way, i, n, m).own * g : shared;
    out(way, i, n, blend(m, d, zero));
  });
}

template <class A, PolicyKind K>
void variant_all(const PolicyVariantArgs& a) {
  Scratch<RowSums> sums(a.rows.count);
  sweep_rows<A>(a, sums.data, [&](int64_t r, A weight, const uint16_t* kept, bool stream) { sweep_row<A, K>(a, r, weight, kept, stream, sums.data[r]); });
  policy_results(a, sums.data, a.level == Level::token ? a.clip.clamp : __builtin_inf());
}

template <class A>
void variant_of(const PolicyVariantArgs& a) {
  with_kind(a.kind, [&](auto k) { variant_all<A, decltype(k)::value>(a); });
}

}  // namespace

double policy_variant(const PolicyVariantArgs& a) {
  any_double(a.old_log_prob, a.log_prob, a.advantages, a.weights, a.ref_log_prob, a.entropy, a.behave) ? variant_of<double>(a) : variant_of<float>(a);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
