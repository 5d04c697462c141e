// SPDX-License-Identifier: Apache-2.0
// Count, mean and sum of squared deviations; how two of them merge; what they make of a value.
#pragma once
#include "../args.h"
#include "math.h"

namespace rlkern {
namespace RLKERN_ISA {

struct Moments {
  double count = 0, mean = 0, m2 = 0;
  // Chan, Golub and LeVeque (1979). An empty side changes nothing, not even by its NaN-free zero mean.
  RLKERN_HD void merge(const Moments& o) {
    if (o.count == 0) return;
    if (count == 0) {
      *this = o;
      return;
    }
    const double n = count + o.count, d = o.mean - mean;
    mean += d * (o.count / n);
    m2 += o.m2 + d * d * (count * o.count / n);
    count = n;
  }
};

RLKERN_HD double variance(const Moments& m, bool unbiased) { return m.m2 / (unbiased ? m.count - 1 : m.count); }
RLKERN_HD double reciprocal_std(const Moments& m, const WhitenOptions& o) {
  if (!o.scale) return 1.0;
  const double var = variance(m, o.unbiased);
  return 1.0 / ::sqrt(o.floor ? (var < o.eps ? o.eps : var) : var + o.eps);
}
// d rstd / d var
RLKERN_HD double reciprocal_std_grad(const Moments& m, const WhitenOptions& o) {
  if (!o.scale) return 0.0;
  const double rstd = reciprocal_std(m, o);
  return o.floor && variance(m, o.unbiased) < o.eps ? 0.0 : -0.5 * rstd * rstd * rstd;
}

// The mean in two parts: in float, v - mean loses the digits that a large mean rounds away. A: the arithmetic type.
template <class V, class A>
struct WhitenScale {
  V high, low, rstd, add;
  RLKERN_HD WhitenScale(const Moments& m, const WhitenOptions& o)
      : high(constant<V>(A(m.mean))), low(constant<V>(m.mean - double(A(m.mean)))), rstd(constant<V>(reciprocal_std(m, o))),
        add(constant<V>(o.shift_mean ? 0 : m.mean)) {}
  RLKERN_HD V operator()(V v) const { return fused((v - high) - low, rstd, add); }
};

}  // namespace RLKERN_ISA
}  // namespace rlkern
