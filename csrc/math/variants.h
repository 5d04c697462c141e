// SPDX-License-Identifier: Apache-2.0
// The variants of the policy loss: one function of a token each, value next to derivative; what a row adds up to where the ratio
// or a weight is the row's; and the frame around a token: selection, weights, the KL term.
#pragma once
#include "kl.h"

namespace rlkern {
namespace RLKERN_ISA {

RLKERN_HD bool is_not(bool test) { return !test; }
template <class Test>
RLKERN_HD Test is_not(Test lanes) {
  return ~lanes;
}

// ---- a token: the derivative is by the log of the ratio where the loss goes through it (`through_ratio`), else by log_prob
template <class V>
struct VariantNumbers {
  V low, high, cap;            // of the ratio
  V log_low, log_high;         // of a log-ratio, a probability or a divergence
  V own[4];
  explicit VariantNumbers(const PolicyVariantArgs& a)
      : low(constant<V>(1 - a.clip.low)), high(constant<V>(1 + a.clip.high)), cap(constant<V>(a.clip.cap)), log_low(constant<V>(a.clip.low)),
        log_high(constant<V>(a.clip.high)), own{constant<V>(a.own[0]), constant<V>(a.own[1]), constant<V>(a.own[2]), constant<V>(a.own[3])} {}
};
template <class V>
struct VariantInput {
  V x, ratio;  // the clamped log-ratio, of the token or of its row, and its exponential
  V log_prob, old_log_prob, advantage;
  V penalty;     // kl-cov: the coefficient of |x| here, or 0
  V gain, harm;  // of the row. vespo: the weight where A >= 0, and where A < 0; geo-mean: its loss (gain alone)
};
template <class V, class Test>
struct VariantToken {
  V loss, grad;
  Test clipped, lower;
};
RLKERN_HD constexpr bool through_ratio(PolicyKind k) { return k == PolicyKind::clip || k == PolicyKind::kl_cov || k == PolicyKind::sapo; }

// max(-A r, -A clip(r)), where A < 0 at most -A cap; own[0] is the share of the gradient where that ties.
template <class V>
RLKERN_HD auto clip_token(const VariantInput<V>& t, const VariantNumbers<V>& o) {
  const V zero = constant<V>(0), far = constant<V>(__builtin_inf()), r = t.ratio;
  using Test = decltype(r > r);
  const Test gain = t.advantage > zero, harm = t.advantage < zero;
  const V best = clamped(r, harm ? o.low : -far, harm ? o.cap : (gain ? o.high : far)), loss = -t.advantage * best;
  const Test blocked = (best < r) | (best > r), tie = (r == o.cap) & harm;
  const V grad = blocked ? zero : (tie ? o.own[0] * loss : loss);
  const Test clipped = ((r > o.high) & gain) | ((r < o.low) & harm), lower = (r > o.cap) & harm;
  return VariantToken<V, Test>{loss, grad, clipped, lower};
}
// -A r + penalty |x|
template <class V>
RLKERN_HD auto kl_cov_token(const VariantInput<V>& t) {
  const V zero = constant<V>(0), one = constant<V>(1), plain = -t.advantage * t.ratio;
  using Test = decltype(plain > zero);
  const V sign = t.x > zero ? one : (t.x < zero ? -one : t.x);
  const Test none = zero > zero;
  const Test there = t.penalty != zero;  // elsewhere an infinite x must not meet a 0
  return VariantToken<V, Test>{there ? fused(t.penalty, Ops<V>::magnitude(t.x), plain) : plain, there ? fused(t.penalty, sign, plain) : plain, none, none};
}
// -A (4 / tau) sigmoid(tau (r - 1)), tau = own[0] where A > 0, else own[1]
template <class V>
RLKERN_HD auto sapo_token(const VariantInput<V>& t, const VariantNumbers<V>& o) {
  const V zero = constant<V>(0), one = constant<V>(1), four = constant<V>(4);
  using Test = decltype(zero > zero);
  const V tau = t.advantage > zero ? o.own[0] : o.own[1], z = tau * (t.ratio - one);
  const V e = exp_bounded(Ops<V>::at_least(-Ops<V>::magnitude(z), constant<V>(-80))), share = one / (one + e), sigmoid = z < zero ? e * share : share;
  const V factor = -t.advantage * four;
  const Test none = zero > zero;
  return VariantToken<V, Test>{factor / tau * sigmoid, factor * (e * share * share) * t.ratio, none, none};
}
// -A log_prob, its weight detached
template <class V, class Test>
RLKERN_HD auto score_token(V score, V log_prob, Test clipped, Test lower) {
  return VariantToken<V, Test>{-score * log_prob, -score, clipped, lower};
}
template <class V>
RLKERN_HD auto reinforce_token(const VariantInput<V>& t) {
  const V zero = constant<V>(0);
  return score_token(t.advantage, t.log_prob, zero > zero, zero > zero);
}
template <class V>
RLKERN_HD auto cispo_token(const VariantInput<V>& t, const VariantNumbers<V>& o) {
  const V zero = constant<V>(0), kept = clamped(t.ratio, o.low, o.high);
  using Test = decltype(zero > zero);
  const Test clipped = (kept < t.ratio) | (kept > t.ratio);
  return score_token(kept * t.advantage, t.log_prob, clipped, zero > zero);
}
template <class V>
RLKERN_HD auto topr_token(const VariantInput<V>& t) {
  const V zero = constant<V>(0), one = constant<V>(1), kept = t.advantage > zero ? one : Ops<V>::at_most(t.ratio, one);
  using Test = decltype(zero > zero);
  const Test clipped = (t.ratio > one) & (t.advantage < zero);
  return score_token(kept * t.advantage, t.log_prob, clipped, zero > zero);
}
// Open while the policy has not moved too far in the direction that A rewards.
template <class V, class Test>
RLKERN_HD auto gated_token(const VariantInput<V>& t, const VariantNumbers<V>& o, Test open) {
  const Test shut = is_not(open), lower = open & (t.ratio > o.cap);
  const V lost = t.advantage * (t.log_prob - t.old_log_prob);  // a NaN shows, open or not
  const V score = open ? t.advantage * Ops<V>::at_most(t.ratio, o.cap) : constant<V>(0);
  return score_token(lost != lost ? lost : score, t.log_prob, shut, lower);
}
template <class V>
RLKERN_HD auto dppo_tv_token(const VariantInput<V>& t, const VariantNumbers<V>& o) {
  const V moved = exp_of(t.log_prob) - exp_of(t.old_log_prob);
  using Test = decltype(moved > moved);
  const Test gain = t.advantage > constant<V>(0), open = (gain & (moved <= o.log_high)) | (is_not(gain) & (moved >= -o.log_low));
  return gated_token(t, o, open);
}
template <class V>
RLKERN_HD auto dppo_kl_token(const VariantInput<V>& t, const VariantNumbers<V>& o) {
  const V p = expm1_of(t.log_prob), q = expm1_of(t.old_log_prob), tiny = constant<V>(1e-8);  // less one
  const V change = (q + constant<V>(1)) * (t.old_log_prob - t.log_prob), divergence = fused(-q, log_of((tiny - q) / (tiny - p)), change);
  using Test = decltype(p > q);
  const Test gain = t.advantage > constant<V>(0), rises = (divergence <= o.log_high) | (p <= q), falls = (divergence <= o.log_low) | (p >= q);
  const Test open = (gain & rises) | (is_not(gain) & falls);
  return gated_token(t, o, open);
}
// own[0] x^2 / 2 - A log_prob
template <class V>
RLKERN_HD auto dro_token(const VariantInput<V>& t, const VariantNumbers<V>& o) {
  const V zero = constant<V>(0), slope = o.own[0] * t.x;
  using Test = decltype(zero > zero);
  return VariantToken<V, Test>{constant<V>(0.5) * slope * t.x - t.advantage * t.log_prob, fused(o.own[0], t.x, -t.advantage), zero > zero, zero > zero};
}
template <class V>
RLKERN_HD auto vespo_token(const VariantInput<V>& t) {
  const V zero = constant<V>(0), weight = t.advantage >= zero ? t.gain : t.harm;
  return score_token(weight * t.advantage, t.log_prob, zero > zero, zero > zero);
}
// A token's part of the row's mean: x up to high where A > 0, down to low where A < 0, nothing at 0.
template <class V>
RLKERN_HD V geo_mean_part(V x, V advantage, const VariantNumbers<V>& o) {
  const V zero = constant<V>(0), none = zero * (advantage + x);  // a NaN shows
  return advantage > zero ? Ops<V>::at_most(x, o.log_high) : (advantage < zero ? Ops<V>::at_least(x, -o.log_low) : none);
}
template <class V>
RLKERN_HD auto geo_mean_token(const VariantInput<V>& t, const VariantNumbers<V>& o) {
  const V zero = constant<V>(0);
  using Test = decltype(zero > zero);
  const Test gain = t.advantage > zero, harm = t.advantage<zero, above = t.x> o.log_high, below = t.x < -o.log_low;
  const Test blocked = (gain & above) | (harm & below) | (t.advantage == zero), clipped = (above | below) & gain, lower = (above | below) & harm;
  return VariantToken<V, Test>{t.gain, blocked ? zero : t.gain, clipped, lower};
}
template <PolicyKind K, class V>
RLKERN_HD auto variant_token(const VariantInput<V>& t, const VariantNumbers<V>& o) {
  if constexpr (K == PolicyKind::clip) return clip_token(t, o);
  else if constexpr (K == PolicyKind::kl_cov) return kl_cov_token(t);
  else if constexpr (K == PolicyKind::sapo) return sapo_token(t, o);
  else if constexpr (K == PolicyKind::reinforce) return reinforce_token(t);
  else if constexpr (K == PolicyKind::cispo) return cispo_token(t, o);
  else if constexpr (K == PolicyKind::dppo_tv) return dppo_tv_token(t, o);
  else if constexpr (K == PolicyKind::dppo_kl) return dppo_kl_token(t, o);
  else if constexpr (K == PolicyKind::dro) return dro_token(t, o);
  else if constexpr (K == PolicyKind::vespo) return vespo_token(t);
  else if constexpr (K == PolicyKind::topr) return topr_token(t);
  else return geo_mean_token(t, o);
}
// phi of vespo: exp(lam + k L - lam e^L), 0 where that is infinite.
RLKERN_HD double vespo_weight(double total, double k, double lam) {
  const double steep = lam > 1e-4 ? lam : 1e-4, found = ::exp(steep * -::expm1(total) + k * total);
  return found > 1.7976931348623157e308 ? 0 : found;
}

template <class F>
RLKERN_HD void with_kind(PolicyKind kind, F&& f) {
  switch (kind) {
    case PolicyKind::clip: return f(std::integral_constant<PolicyKind, PolicyKind::clip>{});
    case PolicyKind::kl_cov: return f(std::integral_constant<PolicyKind, PolicyKind::kl_cov>{});
    case PolicyKind::sapo: return f(std::integral_constant<PolicyKind, PolicyKind::sapo>{});
    case PolicyKind::reinforce: return f(std::integral_constant<PolicyKind, PolicyKind::reinforce>{});
    case PolicyKind::cispo: return f(std::integral_constant<PolicyKind, PolicyKind::cispo>{});
    case PolicyKind::dppo_tv: return f(std::integral_constant<PolicyKind, PolicyKind::dppo_tv>{});
    case PolicyKind::dppo_kl: return f(std::integral_constant<PolicyKind, PolicyKind::dppo_kl>{});
    case PolicyKind::dro: return f(std::integral_constant<PolicyKind, PolicyKind::dro>{});
    case PolicyKind::vespo: return f(std::integral_constant<PolicyKind, PolicyKind::vespo>{});
    case PolicyKind::topr: return f(std::integral_constant<PolicyKind, PolicyKind::topr>{});
    default: return f(std::integral_constant<PolicyKind, PolicyKind::geo_mean>{});
  }
}

// ---- a row --------------------------------------------------------------------------------------------------------------
// What its tokens add up to. x: log-ratios; parts, advantages: of geo-mean; logs: of the weights.
struct VariantSums {
  double tokens = 0, x = 0, parts = 0, advantages = 0, logs = 0;
};
// Its own numbers: the log of its ratio and whether that is clamped; the weights of vespo, or the loss of geo-mean.
struct VariantRow {
  double tokens = 0, x = 0, gain = 0, harm = 0;
  bool blocked = false;
};
constexpr double kVespoFar = 20, kVespoLeast = -18.420680743952367;  // log 1e-8
RLKERN_HD constexpr bool of_row(PolicyKind k, Level level) { return level != Level::token || k == PolicyKind::vespo || k == PolicyKind::geo_mean; }
template <class V>
RLKERN_HD V vespo_log(V weight) {
  return clamped(log_of(weight), constant<V>(kVespoLeast), constant<V>(kVespoFar));
}
template <class V>
RLKERN_HD V vespo_part(V log_ratio) {
  return clamped(log_ratio, constant<V>(-kVespoFar), constant<V>(kVespoFar));
}
template <class V>
RLKERN_HD V geo_mean_log(V weight) {
  return log_of(weight + constant<V>(1e-10));
}
RLKERN_HD VariantRow variant_row(const PolicyVariantArgs& a, const VariantSums& s) {
  VariantRow found;
  const double count = s.tokens > 0 ? s.tokens : 1;
  found.tokens = s.tokens;
  if (a.kind == PolicyKind::geo_mean) {
    found.gain = -s.advantages / count * ::exp(s.parts / count) * ::exp(s.logs / count);
  } else if (a.kind == PolicyKind::vespo) {
    const double total = clamped(s.x + s.logs, kVespoLeast, kVespoFar);
    found.gain = vespo_weight(total, a.own[0], a.own[1]), found.harm = vespo_weight(total, a.own[2], a.own[3]);
  } else {
    const double x = a.level == Level::sequence ? s.x / count : s.x;
    found.x = x > a.clip.clamp ? a.clip.clamp : x, found.blocked = x > a.clip.clamp;
  }
  return found;
}

// ---- the frame ------------------------------------------------------------------------------------------------------------
// A token as it is read: 0, or anything, where an operand is absent. marked: not 0 where it was chosen.
template <class V>
struct VariantSeen {
  V log_prob, old_log_prob, advantage, weight, behave, marked;
};
// Its loss; the derivative by log_prob itself, and by the log of the ratio; log-ratios: as they are, and as the metrics add
// them up; the ratio, and whether its clamp blocks.
template <class V, class Test>
struct VariantStep {
  V loss, own, through, raw, x, ratio;
  Test blocked, clipped, lower;
};
// The constants of a call and, on top, those of a row.
template <class V>
struct VariantFrame {
  VariantNumbers<V> numbers;
  KlRange<V> range;
  V kl_coef, clamp, behave_cap;
  bool of_row, by_ratio, with_kl, straight, bounded, selected, weighted, behaves;  // bounded: the exponential stays in the normal range
  explicit VariantFrame(const PolicyVariantArgs& a)
      : numbers(a), range(a.kl), kl_coef(constant<V>(a.kl_coef)), clamp(constant<V>(a.clip.clamp)), behave_cap(constant<V>(a.own[1])),
        of_row(a.level != Level::token), by_ratio(a.by_ratio), with_kl(a.kl_coef != 0 && a.ref_log_prob), straight(a.kl.straight_through),
        bounded(a.clip.clamp <= 80), selected(a.selected), weighted(a.weights), behaves(a.behave) {}
};
template <class V>
struct VariantOfRow {
  V x, ratio, gain, harm;
  bool blocked;
  RLKERN_HD explicit VariantOfRow(const VariantRow& r)
      : x(constant<V>(r.x)), ratio(constant<V>(::exp(r.x))), gain(constant<V>(r.gain)), harm(constant<V>(r.harm)), blocked(r.blocked) {}
};
// 0 where the clamp of the ratio blocks a gradient.
template <class V, class Test>
RLKERN_HD V passed(const VariantFrame<V>& f, const VariantOfRow<V>& row, V grad, Test blocked) {
  const V zero = constant<V>(0);
  if (f.of_row) return row.blocked ? zero : grad;
  return blocked ? zero : grad;
}
template <class V>
RLKERN_HD V variant_ratio(const VariantFrame<V>& f, const VariantOfRow<V>& row, V clamped_log_ratio) {
  return f.of_row ? row.ratio : (f.bounded ? exp_bounded(clamped_log_ratio) : exp_of(clamped_log_ratio));
}
template <PolicyKind K, class V>
RLKERN_HD auto variant_step(const VariantFrame<V>& f, const VariantOfRow<V>& row, const VariantSeen<V>& t) {
  using Test = decltype(t.marked > t.marked);
  constexpr bool kThrough = through_ratio(K), kOwnWeights = K == PolicyKind::vespo || K == PolicyKind::geo_mean;
  constexpr bool kNeedsRatio = kThrough || K == PolicyKind::cispo || K == PolicyKind::topr || K == PolicyKind::dppo_tv || K == PolicyKind::dppo_kl;
  const V zero = constant<V>(0), raw = t.log_prob - t.old_log_prob, x = clamped(raw, -f.clamp, f.clamp);
  const Test blocked = (x < raw) | (x > raw), marked = t.marked != zero;
  const V ratio = kNeedsRatio || f.of_row || f.by_ratio ? variant_ratio(f, row, x) : zero;
  const V penalty = K == PolicyKind::kl_cov ? (marked ? f.numbers.own[0] : zero) : zero;
  const auto found =
      variant_token<K>(VariantInput<V>{f.of_row ? row.x : x, ratio, t.log_prob, t.old_log_prob, t.advantage, penalty, row.gain, row.harm}, f.numbers);
  const V seen = K == PolicyKind::kl_cov ? -Ops<V>::magnitude(raw) : (f.of_row ? raw : x);
  V loss = found.loss, grad = kThrough ? passed(f, row, found.grad, blocked) : found.grad;
  Test clipped = found.clipped;
  if (K == PolicyKind::clip && f.selected)  // clip-cov: these tokens leave the loss
    loss = marked ? zero : loss, grad = marked ? zero : grad, clipped = marked;
  if (!kOwnWeights && f.weighted) loss = loss * t.weight, grad = grad * t.weight;
  if (K == PolicyKind::clip && f.behaves) {
    const V w = exp_of(t.old_log_prob - t.behave), kept = w > f.behave_cap ? zero : w;
    loss = loss * kept, grad = grad * kept;
  }
  return VariantStep<V, Test>{loss, kThrough ? zero : grad, kThrough ? grad : zero, raw, seen, ratio, blocked, clipped, found.lower};
}
// The KL term of a token, and what it adds to the derivatives.
template <Kl E, class V, class Test>
RLKERN_HD V variant_kl(const VariantFrame<V>& f, const VariantOfRow<V>& row, V log_prob, V ref_log_prob, V ratio, Test blocked, V& own, V& through) {
  V slope = kl_grad<E>(log_prob, ref_log_prob, f.range, f.straight), value = kl_value<E>(log_prob, ref_log_prob, f.range);
  if (f.by_ratio) {
    value = value * ratio, slope = slope * ratio;
    if (f.with_kl) through = through + f.kl_coef * passed(f, row, value, blocked);
  }
  if (f.with_kl) own = own + f.kl_coef * slope;
  return value;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
