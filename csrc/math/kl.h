// SPDX-License-Identifier: Apache-2.0
// KL estimators of one token, each value next to its derivative with respect to log_prob.
#pragma once
#include "../args.h"
#include "math.h"

#include <type_traits>

namespace rlkern {
namespace RLKERN_ISA {

template <class V>
struct KlRange {
  V ratio_low, ratio_high, value_low, value_high;
  bool bounded;  // no exponential leaves the normal range
  RLKERN_HD explicit KlRange(const KlOptions& o)
      : ratio_low(constant<V>(o.ratio_low)), ratio_high(constant<V>(o.ratio_high)), value_low(constant<V>(o.value_low)), value_high(constant<V>(o.value_high)),
        bounded(o.ratio_low >= -80 && o.ratio_high <= 80) {}
};

// d = ref_log_prob - log_prob. k1: -d; abs: |d|; k2: d^2 / 2; k3: exp(d) - 1 - d.
template <Kl E, class V>
RLKERN_HD V kl_raw(V d, bool bounded) {
  if constexpr (E == Kl::k1) return constant<V>(0) - d;  // no -0 at 0
  else if constexpr (E == Kl::abs) return d < constant<V>(0) ? -d : d;
  else if constexpr (E == Kl::k2) return constant<V>(0.5) * d * d;
  else return bounded ? exp_minus_1_minus_bounded(d) : exp_minus_1_minus(d);
}
template <Kl E, class V>
RLKERN_HD V kl_raw_grad(V d, bool bounded) {  // d/dlog_prob = -d/dd; a NaN stays one
  const V zero = constant<V>(0), one = constant<V>(1);
  if constexpr (E == Kl::k1) return d != d ? d : one;
  else if constexpr (E == Kl::abs) return d < zero ? one : (d > zero ? -one : d);  // 0 at 0
  else if constexpr (E == Kl::k2) return -d;
  else return bounded ? -expm1_bounded(d) : -expm1_of(d);
}

template <Kl E, class V>
RLKERN_HD V kl_value(V log_prob, V ref_log_prob, const KlRange<V>& range) {
  const V d = clamped(ref_log_prob - log_prob, range.ratio_low, range.ratio_high);
  return clamped(kl_raw<E>(d, range.bounded), range.value_low, range.value_high);
}

// A clamp passes gradient on its closed interval. A straight-through form has the gradient of k2 everywhere.
template <Kl E, class V>
RLKERN_HD V kl_grad(V log_prob, V ref_log_prob, const KlRange<V>& range, bool straight_through) {
  const V raw = ref_log_prob - log_prob, zero = constant<V>(0);
  if (straight_through) return -raw;
  const V d = clamped(raw, range.ratio_low, range.ratio_high), value = kl_raw<E>(d, range.bounded);
  const auto outside = (raw < range.ratio_low) | (raw > range.ratio_high) | (value < range.value_low) | (value > range.value_high);
  return outside ? zero : kl_raw_grad<E>(d, range.bounded);
}

// w * KL with the importance weight w = min(exp(log_prob - old_log_prob), most), before the value's clamp.
template <class V>
RLKERN_HD V importance_weight(V log_prob, V old_log_prob, V most) {
  return Ops<V>::at_most(exp_of(log_prob - old_log_prob), most);
}
template <Kl E, class V>
RLKERN_HD V kl_weighted_value(V log_prob, V ref_log_prob, V old_log_prob, V most, const KlRange<V>& range) {
  const V d = clamped(ref_log_prob - log_prob, range.ratio_low, range.ratio_high);
  return clamped(importance_weight(log_prob, old_log_prob, most) * kl_raw<E>(d, range.bounded), range.value_low, range.value_high);
}

// The weight passes gradient where `most` does not bite; of a straight-through form it is a factor alone.
template <class V>
struct KlGrads {
  V log_prob, ref_log_prob;
};
template <Kl E, class V>
RLKERN_HD KlGrads<V> kl_weighted_grads(V log_prob, V ref_log_prob, V old_log_prob, V most, const KlRange<V>& range, bool straight_through) {
  const V raw = ref_log_prob - log_prob, zero = constant<V>(0), free = exp_of(log_prob - old_log_prob), w = Ops<V>::at_most(free, most);
  if (straight_through) return {w * -raw, w * raw};
  const V d = clamped(raw, range.ratio_low, range.ratio_high), kl = kl_raw<E>(d, range.bounded), value = w * kl;
  const V slope = kl_raw_grad<E>(d, range.bounded);
  const V sum = E == Kl::k3 ? -d : slope + kl;  // of k3 without the cancellation
  const V both = free > most ? slope : sum;
  const auto outside = (raw < range.ratio_low) | (raw > range.ratio_high) | (value < range.value_low) | (value > range.value_high);
  return {outside ? zero : w * both, outside ? zero : w * -slope};
}

// f.template operator()<E>() for the estimator chosen at run time: the choice stays outside the loops.
template <class F>
__attribute__((always_inline)) RLKERN_HD auto with_estimator(Kl e, F&& f) {
  switch (e) {
    case Kl::k1: return f(std::integral_constant<Kl, Kl::k1>{});
    case Kl::abs: return f(std::integral_constant<Kl, Kl::abs>{});
    case Kl::k2: return f(std::integral_constant<Kl, Kl::k2>{});
    default: return f(std::integral_constant<Kl, Kl::k3>{});
  }
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
