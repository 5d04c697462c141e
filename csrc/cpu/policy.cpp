// SPDX-License-Identifier: Apache-2.0
// The variants of the policy loss. Where the ratio or a weight is the row's, a first sweep of the row sums what they need; where
// the gradient goes through the row, a last one spreads it. A row stays in the cache between them.
#include "loss.h"

#include "../kernels.h"
#include "../math/kl.h"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

// What a variant reads of a row.
template <class A>
struct VariantRow {
  using V = Vec<A>;
  Column<A> old_log_prob, log_prob, advantages, weights, ref_log_prob, entropy, behave;
  MaskRow mask, selected;
  const uint16_t* kept;
  VariantRow(const PolicyVariantArgs& a, int64_t r, const uint16_t* k)
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

// The row's own numbers: the log of its ratio, its weights, how its gradients are shared.
struct OfRow {
  double tokens = 0, x = 0, gain = 0, harm = 0;
  bool blocked = false;
};

template <class A, PolicyKind K>
OfRow variant_of_row(const PolicyVariantArgs& a, const VariantRow<A>& row, int64_t length) {
  using V = Vec<A>;
  const VariantNumbers<V> o(a);
  const V far = splat(A(20)), least = splat(A(-18.420680743952367)), tiny = splat(A(1e-10)), zero{};
  Sum<A> x, parts, advantages, logs;
  int64_t tokens = 0;
  for_lanes<A, true>(length, row.direct(), [&](auto way, int64_t i, int64_t n) RLKERN_INLINE {
    const uint32_t m = row.lanes(way, i, n);
    tokens += __builtin_popcount(m);
    if (K == PolicyKind::vespo && row.weights && !row.weights.per_row) {  // masked tokens too
      const V inside = blend(static_cast<uint32_t>((uint64_t{1} << n) - 1), log_of(row.weights(way, i, n)), zero);
      logs.add(clamped(inside, least, far));
    }
    if (m == 0) return;
    const V raw = row.log_prob.valid(way, i, n, m) - row.old_log_prob.valid(way, i, n, m);
    x.add(K == PolicyKind::vespo ? clamped(raw, -far, far) : raw);
    if (K == PolicyKind::geo_mean) {
      const V advantage = row.advantages.valid(way, i, n, m);
      advantages.add(advantage), parts.add(geo_mean_part(raw, advantage, o));
      if (row.weights) logs.add(blend(m, log_of(row.weights(way, i, n) + tiny), zero));
    }
  });
  OfRow found;
  const double count = tokens > 0 ? static_cast<double>(tokens) : 1;
  found.tokens = static_cast<double>(tokens);
  if (K == PolicyKind::geo_mean) {
    found.gain = -advantages.total() / count * ::exp(parts.total() / count) * ::exp(logs.total() / count);
  } else if (K == PolicyKind::vespo) {
    double total = x.total() + logs.total();
    if (row.weights && row.weights.per_row && length > 0) total += clamped(::log(static_cast<double>(row.weights.value[0])), -18.420680743952367, 20.0);
    total = clamped(total, -18.420680743952367, 20.0);
    found.gain = vespo_weight(total, a.own[0], a.own[1]), found.harm = vespo_weight(total, a.own[2], a.own[3]);
  } else {
    const double s = a.level == Level::sequence ? x.total() / count : x.total();
    found.x = s > a.clip.clamp ? a.clip.clamp : s, found.blocked = s > a.clip.clamp;
  }
  return found;
}

// One vector of tokens: the loss; its derivative by log_prob itself, and by the log of the ratio; the KL term.
template <class A>
struct Step {
  Vec<A> loss, own, through, kl, raw, x;
  uint32_t clipped, lower;
};

// The sweeps' constants.
template <class A, PolicyKind K>
struct Variant {
  using V = Vec<A>;
  const PolicyVariantArgs& a;
  const OfRow& its;
  const VariantNumbers<V> numbers;
  const KlRange<V> range;
  const bool of_row, with_kl, bounded;  // bounded: the clamp keeps the exponential in the normal range
  const V zero{}, kl_coef, clamp, behave_cap, row_x, row_ratio, gain, harm;
  Variant(const PolicyVariantArgs& args, const OfRow& of)
      : a(args), its(of), numbers(args), range(args.kl), of_row(args.level != Level::token), with_kl(args.kl_coef != 0 && args.ref_log_prob),
        bounded(args.clip.clamp <= 80), kl_coef(splat(A(args.kl_coef))), clamp(splat(A(args.clip.clamp))), behave_cap(splat(A(args.own[1]))),
        row_x(splat(A(of.x))), row_ratio(splat(A(::exp(of.x)))), gain(splat(A(of.gain))), harm(splat(A(of.harm))) {}

  template <class Way>
  RLKERN_INLINE Step<A> at(const VariantRow<A>& row, Way way, int64_t i, int64_t n, uint32_t m) const {
    const V lp = row.log_prob.valid(way, i, n, m), old = row.old_log_prob.valid(way, i, n, m), raw = lp - old, x = clamped(raw, -clamp, clamp);
    const auto blocked = (x < raw) | (x > raw);
    const V ratio = of_row ? row_ratio : (kNeedsRatio || a.by_ratio ? (bounded ? exp_bounded(x) : exp_of(x)) : zero);
    const uint32_t marked = a.selected ? m & row.selected.template lanes<kLanes<A>>(way, i, n) : 0;
    const V penalty = K == PolicyKind::kl_cov ? blend(marked, numbers.own[0], zero) : zero;
    auto found = variant_token<K>(VariantInput<V>{of_row ? row_x : x, ratio, lp, old, row.advantages.valid(way, i, n, m), penalty, gain, harm}, numbers);
    Step<A> step{found.loss,
                 zero,
                 zero,
                 zero,
                 raw,
                 K == PolicyKind::kl_cov ? -Ops<V>::magnitude(raw) : (of_row ? raw : x),
                 lanes_of(found.clipped) & m,
                 lanes_of(found.lower) & m};
    V grad = kThrough ? open_only(found.grad, blocked) : found.grad;
    if (K == PolicyKind::clip && a.selected)  // clip-cov: these tokens leave the loss
      step.loss = blend(marked, zero, step.loss), grad = blend(marked, zero, grad), step.clipped = marked;
    if (!kOwnWeights && row.weights) {
      const V w = row.weights.valid(way, i, n, m);
      step.loss *= w, grad *= w;
    }
    if (K == PolicyKind::clip && row.behave) {
      V w = exp_of(old - row.behave.valid(way, i, n, m));
      w = w > behave_cap ? zero : w;
      step.loss *= w, grad *= w;
    }
    (kThrough ? step.through : step.own) = grad;
    if (row.ref_log_prob) add_kl(step, lp, row.ref_log_prob.valid(way, i, n, m), ratio, blocked);
    return step;
  }

 private:
  static constexpr bool kThrough = through_ratio(K), kOwnWeights = K == PolicyKind::vespo || K == PolicyKind::geo_mean;
  static constexpr bool kNeedsRatio = kThrough || K == PolicyKind::cispo || K == PolicyKind::topr || K == PolicyKind::dppo_tv || K == PolicyKind::dppo_kl;

  template <class Test>
  RLKERN_INLINE V open_only(V grad, Test blocked) const {  // what passes the clamp of the ratio
    if (of_row) return its.blocked ? zero : grad;
    return blocked ? zero : grad;
  }
  template <class Test>
  RLKERN_INLINE void add_kl(Step<A>& step, V lp, V ref, V ratio, Test blocked) const {
    with_estimator(a.kl.estimator, [&](auto e) RLKERN_INLINE {
      constexpr Kl E = decltype(e)::value;
      V slope = kl_grad<E>(lp, ref, range, a.kl.straight_through);
      step.kl = kl_value<E>(lp, ref, range);
      if (a.by_ratio) {
        step.kl *= ratio, slope *= ratio;
        if (with_kl) step.through += kl_coef * open_only(step.kl, blocked);
      }
      if (with_kl) step.own += kl_coef * slope;
    });
  }
};

template <class A, PolicyKind K>
void variant_row(const PolicyVariantArgs& a, int64_t r, A weight, const uint16_t* kept, bool stream, RowSums& sums) {
  using V = Vec<A>;
  const VariantRow<A> row(a, r, kept);
  const int64_t length = a.rows.len(r);
  const bool of_row = a.level != Level::token, shares = of_row && a.row_grad && (through_ratio(K) || a.by_ratio) && a.d_log_prob;
  const OfRow its = of_row || K == PolicyKind::vespo || K == PolicyKind::geo_mean ? variant_of_row<A, K>(a, row, length) : OfRow{};
  const Variant<A, K> variant(a, its);
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
    const Step<A> step = variant.at(row, way, i, n, m);
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
  const bool own = !through_ratio(K) || variant.with_kl;
  for_lanes<A, true>(length, row.direct() && out.direct(), [&](auto way, int64_t i, int64_t n) RLKERN_INLINE {
    const uint32_t m = row.lanes(way, i, n);
    const V d = own && m ? shared + variant.at(row, way, i, n, m).own * g : shared;
    out(way, i, n, blend(m, d, zero));
  });
}

template <class A, PolicyKind K>
void variant_all(const PolicyVariantArgs& a) {
  Scratch<RowSums> sums(a.rows.count);
  sweep_rows<A>(a, sums.data, [&](int64_t r, A weight, const uint16_t* kept, bool stream) { variant_row<A, K>(a, r, weight, kept, stream, sums.data[r]); });
  policy_results(a, sums.data, a.level == Level::token ? a.clip.clamp : __builtin_inf());
}

template <class A>
void variant_of(const PolicyVariantArgs& a) {
  switch (a.kind) {
    case PolicyKind::clip: return variant_all<A, PolicyKind::clip>(a);
    case PolicyKind::kl_cov: return variant_all<A, PolicyKind::kl_cov>(a);
    case PolicyKind::sapo: return variant_all<A, PolicyKind::sapo>(a);
    case PolicyKind::reinforce: return variant_all<A, PolicyKind::reinforce>(a);
    case PolicyKind::cispo: return variant_all<A, PolicyKind::cispo>(a);
    case PolicyKind::dppo_tv: return variant_all<A, PolicyKind::dppo_tv>(a);
    case PolicyKind::dppo_kl: return variant_all<A, PolicyKind::dppo_kl>(a);
    case PolicyKind::dro: return variant_all<A, PolicyKind::dro>(a);
    case PolicyKind::vespo: return variant_all<A, PolicyKind::vespo>(a);
    case PolicyKind::topr: return variant_all<A, PolicyKind::topr>(a);
    default: return variant_all<A, PolicyKind::geo_mean>(a);
  }
}

}  // namespace

double policy_variant(const PolicyVariantArgs& a) {
  any_double(a.old_log_prob, a.log_prob, a.advantages, a.weights, a.ref_log_prob, a.entropy, a.behave) ? variant_of<double>(a) : variant_of<float>(a);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
