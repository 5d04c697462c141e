// SPDX-License-Identifier: Apache-2.0
// Rollout correction of one token: the ratio of the two policies with its divergences, the weight, a gate's term. Nothing here
// is differentiated.
#pragma once
#include "../args.h"
#include "math.h"

namespace rlkern {
namespace RLKERN_ISA {

constexpr double kSafety = 20;  // verl's bound on a log-ratio before the exponential

// q = clamp(log-ratio), e = exp(q), k3 = exp(q) - 1 - q: one polynomial for both.
template <class V>
struct RatioTerms {
  V q, e, k3;
};
template <class V>
RLKERN_HD RatioTerms<V> ratio_terms(V q) {  // |q| <= 20
  if constexpr (Ops<V>::kDouble) {
    return {q, exp_of(q), exp_minus_1_minus_bounded(q)};
  } else {
    const Reduced<V> x = reduce_bounded(q, 0);
    return {q, fused(x.power, x.near(), x.power), fused(x.power, x.tail(), fused(x.power, x.r, (x.power - constant<V>(1)) - q))};
  }
}

// Truncated at high, where a NaN stays; IcePop: 0 outside [low, high], a NaN too.
template <class V>
RLKERN_HD V correction_weight(V ratio, V low, V high, bool icepop) {
  if (icepop) return ((ratio >= low) & (ratio <= high)) ? ratio : constant<V>(0);
  return Ops<V>::at_most(ratio, high);
}

// k1 = -q, k2 = q^2 / 2, k3.
template <int K, class V>
RLKERN_HD V divergence(V q, V k3) {
  if constexpr (K == 1) return constant<V>(0) - q;  // no -0 at 0
  else if constexpr (K == 2) return constant<V>(0.5) * q * q;
  else return k3;
}

// The divergence of two events, "this token" and "another", with probabilities p and 1 - p against q and 1 - q.
// Rounding makes none negative: a band from 0 on would drop it.
RLKERN_HD double binary_kl(double p, double q) {
  const double value = p * ::log(p / q) + (1 - p) * ::log((1 - p) / (1 - q));
  return value < 0 ? 0 : value;
}

// What a row's sums decide. The statistic is rounded once, to the arithmetic's type, before it meets its limits. A NaN is kept
// by none; `most` leaves it out, the sum not.
template <class A>
RLKERN_HD bool row_stays(const Rejection& o, double n, double sum, double most) {
  const double s = o.by == RejectBy::sum ? sum : o.by == RejectBy::mean ? (n > 0 ? sum / n : sum) : sum != sum ? sum : (n > 0 ? most : 0);
  return A(s) >= A(o.low) && A(s) <= A(o.high);
}

// ---- gates --------------------------------------------------------------------------------------------------------------
template <class V>
RLKERN_HD V gate_probability(V log_prob) {
  return clamped(exp_of(log_prob), constant<V>(1e-6), constant<V>(1 - 1e-6));
}
// kl(p, q): binary_kl, lane by lane.
template <class V, class F>
RLKERN_HD V gate_term(Gating gating, V old_log_prob, V rollout_log_prob, V log_ratio, F kl) {
  if (gating == Gating::ratio) return log_ratio;
  const V p = gate_probability(rollout_log_prob), q = gate_probability(old_log_prob);
  return gating == Gating::tv ? Ops<V>::magnitude(p - q) : kl(p, q);
}

// A band: what lies outside is filtered, a NaN too unless it clips.
template <class V>
struct Gate {
  V low, high;
  bool clip, drop;
  RLKERN_HD explicit Gate(const ImportanceArgs& a) : low(constant<V>(a.low)), high(constant<V>(a.high)), clip(a.clip), drop(a.nan == OnNan::drop) {}
  RLKERN_HD auto filtered(V s) const {
    const auto outside = (s < low) | (s > high);
    return clip ? outside : outside | (s != s);
  }
  template <class Test>
  RLKERN_HD V weight(V w, Test out) const {
    const V zero = constant<V>(0);
    w = clip ? clamped(w, low, high) : out ? zero : w;
    return drop ? (w - w == zero ? w : zero) : w;
  }
};

}  // namespace RLKERN_ISA
}  // namespace rlkern
