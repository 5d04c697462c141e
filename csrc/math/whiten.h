// SPDX-License-Identifier: Apache-2.0
// Count, mean and sum of squared deviations; how two of them merge; what they make of a value, and of its gradient.
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

// Moments about sum / max(count, 1).
RLKERN_HD Moments over_at_least_one(const Moments& m) {
  if (!(m.count < 1)) return m;
  const double mean = m.mean * m.count, d = m.mean - mean;
  return {1, mean, m.m2 + m.count * d * d};
}

RLKERN_HD double degrees(const Moments& m, bool unbiased) { return unbiased ? m.count - 1 : m.count; }
// No count, no variance: NaN, also where count - 1 would divide.
RLKERN_HD double variance(const Moments& m, bool unbiased) { return m.m2 / (m.count == 0 ? 0.0 : degrees(m, unbiased)); }
RLKERN_HD double reciprocal_std(const Moments& m, const WhitenOptions& o) {
  if (!o.scale) return 1.0;
  const double var = variance(m, o.unbiased);
  return 1.0 / ::sqrt(o.floor ? (var < o.eps ? o.eps : var) : var + o.eps);
}
// d rstd / d var; clamp's gradient is 1 on the closed interval
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

// d_v = direct * G + weight * (level + slope * (v - mean)): the form of every gradient in this family.
struct WhitenGrad {
  double direct = 0, level = 0, slope = 0;
  double d_mean = 0, d_m2 = 0;
};
// From sum(G) and sum(G (v - mean)), which pass nothing where they are 0, also where 1 / std is NaN: a row without a valid
// element. `m` as counted; `at_least_one` as in over_at_least_one.
RLKERN_HD WhitenGrad whiten_grad(const Moments& m, const WhitenOptions& o, bool at_least_one, double sum, double product) {
  const Moments e = at_least_one ? over_at_least_one(m) : m;
  const double rstd = reciprocal_std(e, o), d_var = product == 0 ? 0.0 : reciprocal_std_grad(e, o) * product;
  const double residual = m.count * (m.mean - e.mean);  // sum(w (v - mean)): 0 unless the count was raised to 1
  WhitenGrad g;
  g.direct = rstd;
  g.d_mean = sum == 0 ? 0.0 : ((o.shift_mean ? 0.0 : 1.0) - rstd) * sum;
  g.d_m2 = d_var == 0 ? 0.0 : d_var / degrees(e, o.unbiased);
  g.level = (g.d_mean - 2 * g.d_m2 * residual) / e.count;
  g.slope = 2 * g.d_m2;
  return g;
}

// verl adds 1e-8 to the count that it divides by, in float32, where it shows only if the count is 0: a mean of nothing is 0.
RLKERN_HD double reduced(Reduce kind, double count, double sum, double m2, bool unbiased) {
  const double n = count == 0 ? 1e-8 : count;
  if (kind == Reduce::sum) return sum;
  if (kind == Reduce::mean) return sum / n;
  return unbiased ? variance({count, 0, m2}, true) : m2 / n;
}
RLKERN_HD WhitenGrad reduced_grad(Reduce kind, double count, double grad, bool unbiased) {
  WhitenGrad g;
  if (kind == Reduce::sum) g.level = grad;
  else if (kind == Reduce::mean) g.level = reduced(kind, count, grad, 0, false);
  else g.slope = 2 * reduced(kind, count, 0, grad, unbiased);
  return g;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
