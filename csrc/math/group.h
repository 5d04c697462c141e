// SPDX-License-Identifier: Apache-2.0
// One group of scores: its mean, spread and baseline, and what each of its rows becomes. All in double: there are few rows.
#pragma once
#include "../args.h"
#include "math.h"

namespace rlkern {
namespace RLKERN_ISA {

// Mean and baseline as distances from `shift`, the group's first score: a large common offset costs no digits, and equal
// scores deviate by exactly 0.
struct GroupMoments {
  double count = 0, shift = 0, mean = 0, baseline = 0, m2 = 0;
  double weight = 0;  // sum of the rows' weights: their number, or their lengths
  RLKERN_HD double deviation(double s) const { return (s - shift) - mean; }
};

// Sums over rows of distances from the shift, which make mean and baseline. weight: the row's, where rows weigh differently.
struct GroupSums {
  double count = 0, sum = 0, weight = 0, weighted = 0;
  RLKERN_HD void add(double distance) { sum += distance, count += 1; }
  RLKERN_HD void weigh(double distance, double w) { weight += w, weighted += w * distance; }
  RLKERN_HD void merge(const GroupSums& o) { count += o.count, sum += o.sum, weight += o.weight, weighted += o.weighted; }
  RLKERN_HD GroupMoments moments(double shift, bool weighs) const {
    GroupMoments m;
    m.count = count, m.shift = shift, m.mean = sum / count;
    m.baseline = weighs ? weighted / weight : m.mean;
    m.weight = weighs ? weight : count;
    return m;
  }
};
// From a group's first score: not an infinity, which would be NaN minus itself.
RLKERN_HD double shift_of(double first) { return first - first == 0 ? first : 0.0; }

RLKERN_HD bool alone(const GroupMoments& g) { return g.count <= 1; }
RLKERN_HD double group_variance(const GroupMoments& g, bool unbiased) { return g.m2 / (unbiased ? g.count - 1 : g.count); }

// ---- group_mean_std: eps is the floor of the variance --------------------------------------------------------------
RLKERN_HD double mean_of(const GroupMoments& g, Singleton rule) { return alone(g) && rule == Singleton::raw ? 0.0 : g.shift + g.mean; }
RLKERN_HD double std_of(const GroupMoments& g, const GroupOptions& o) {
  if (alone(g)) return o.singleton == Singleton::nan ? static_cast<double>(NAN) : 1.0;
  const double var = group_variance(g, o.unbiased);
  return ::sqrt(var < o.eps ? o.eps : var);
}
// d mean / d score and d std / d score
RLKERN_HD double mean_grad(const GroupMoments& g, Singleton rule) { return alone(g) ? (rule == Singleton::raw ? 0.0 : 1.0) : 1.0 / g.count; }
RLKERN_HD double std_grad(const GroupMoments& g, double s, const GroupOptions& o, double floor) {
  const double var = alone(g) ? 0.0 : group_variance(g, o.unbiased);
  if (var == 0 || var < floor) return 0.0;
  return g.deviation(s) / ((o.unbiased ? g.count - 1 : g.count) * ::sqrt(var));
}

// ---- group_normalize: y = stretch * (s - baseline) / (std + eps) ---------------------------------------------------
RLKERN_HD double stretch_of(const GroupMoments& g, Baseline b) { return b == Baseline::leave_one_out ? g.count / (g.count - 1) : 1.0; }
RLKERN_HD double inverse_scale(const GroupMoments& g, const GroupOptions& o) {
  if (!o.scale) return 1.0;
  return 1.0 / ((alone(g) ? 1.0 : ::sqrt(group_variance(g, o.unbiased))) + o.eps);
}
// The group's two numbers, so that its rows need no division.
struct GroupScale {
  GroupMoments g;
  double factor;
  RLKERN_HD GroupScale(const GroupMoments& moments, const GroupOptions& o)
      : g(moments), factor(inverse_scale(moments, o) * (alone(moments) ? 1.0 : stretch_of(moments, o.baseline))) {
    if (!alone(g)) return;
    g.shift = 0, g.baseline = 0;
    if (o.singleton == Singleton::zero) factor = 0;
    if (o.singleton == Singleton::nan) factor = static_cast<double>(NAN);
  }
  RLKERN_HD double operator()(double s) const { return ((s - g.shift) - g.baseline) * factor; }
};
// The largest score of a group, its first row, and the largest of the others. A NaN is larger than every number.
struct BestTwo {
  double best = -INFINITY, second = -INFINITY;
  int64_t row = -1, rows = 0;
  bool nan = false;
  RLKERN_HD void add(double s, int64_t r) {
    if (s != s) nan = true, s = INFINITY;
    ++rows;
    if (s > best || row < 0) second = best, best = s, row = r;
    else if (s > second) second = s;
  }
  // What others found among other rows: of equal scores the lower row is the first.
  RLKERN_HD void merge(const BestTwo& o) {
    nan = nan || o.nan, rows += o.rows;
    if (o.row < 0) return;
    if (row < 0 || o.best > best || (o.best == best && o.row < row)) {
      second = row >= 0 && best > o.second ? best : o.second;
      best = o.best, row = o.row;
    } else if (o.best > second) {
      second = o.best;
    }
  }
  RLKERN_HD double lead() const { return nan || rows < 2 ? static_cast<double>(NAN) : best - second; }
};
// d: sum of the cotangents c of the group; e: sum of c * (s - baseline) * stretch. `weight` is the row's own.
RLKERN_HD double normalize_grad(const GroupMoments& g, const GroupOptions& o, double s, double c, double weight, double d, double e) {
  if (alone(g)) return o.singleton == Singleton::raw ? c * inverse_scale(g, o) : 0.0;
  const double q = inverse_scale(g, o), linear = q * stretch_of(g, o.baseline) * (c - weight / g.weight * d);
  return o.scale ? linear - q * q * e * std_grad(g, s, o, 0.0) : linear;
}

// ---- optimal token baseline ----------------------------------------------------------------------------------------
// Of a group: its rows, and the two largest numbers of valid tokens among them. By token, a row without any is no member.
struct TwoLongest {
  int64_t members = 0, longest = -1, second = -1;
  RLKERN_HD void add(int64_t n, bool by_token) {
    if (!by_token || n > 0) merge({1, n, -1});
  }
  RLKERN_HD void merge(const TwoLongest& o) {
    members += o.members;
    if (o.longest > longest) second = longest > o.second ? longest : o.second, longest = o.longest;
    else if (o.longest > second) second = o.longest;
  }
  // The last columns of a row that alone is the longest have no baseline.
  RLKERN_HD bool cuts(int64_t n) const { return members > 1 && longest > second && n == longest; }
};
// The path variance of one token.
template <class V>
RLKERN_HD V path_variance(V old_log_prob, V sum_pi_squared) {
  return fused(constant<V>(-2), exp_of(old_log_prob), constant<V>(1)) + sum_pi_squared;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
