// SPDX-License-Identifier: Apache-2.0
// Group statistics over scores: the few numbers of a batch, in double.
#include "group.h"

#include "../kernels.h"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

void put(const Operand& x, int64_t r, double v) {
  const Rows one{1, 1, nullptr};
  OutColumn<double>(x, one, 0, false)(r * x.row_stride, 1, splat(v));
}

}  // namespace

double group_mean_std(const GroupMeanStdArgs& a) {
  const Doubled scores(a.scores);
  for (int64_t g = 0; g < a.groups.count; ++g) {
    const GroupMoments m = moments_of(a.groups, g, scores.data, nullptr, a.options.omit);
    put(a.mean, g, mean_of(m, a.options.singleton));
    put(a.std, g, std_of(m, a.options));
  }
  return 0;
}
double group_mean_std_bwd(const GroupMeanStdGradArgs& a) {
  const Doubled scores(a.scores), grad_mean(a.grad_mean), grad_std(a.grad_std);
  for (int64_t g = 0; g < a.groups.count; ++g) {
    const GroupMoments m = moments_of(a.groups, g, scores.data, nullptr, a.options.omit);
    const double through_mean = grad_mean.data[g] * mean_grad(m, a.options.singleton);
    for_group(a.groups, g, [&](int64_t r) {
      const bool out = a.options.omit && scores.data[r] != scores.data[r];
      put(a.d_scores, r, out ? 0.0 : through_mean + grad_std.data[g] * std_grad(m, scores.data[r], a.options, a.options.eps));
    });
  }
  return 0;
}
double group_normalize(const GroupNormalizeArgs& a) {
  const Doubled scores(a.scores), lengths(a.lengths);
  for (int64_t g = 0; g < a.groups.count; ++g) {
    const GroupScale scale(moments_of(a.groups, g, scores.data, lengths.data, a.options.omit), a.options);
    for_group(a.groups, g, [&](int64_t r) {
      const double s = scores.data[r];
      put(a.advantages, r, a.options.omit && s != s ? s : scale(s));
    });
  }
  return 0;
}
double group_normalize_bwd(const GroupNormalizeGradArgs& a) {
  const Doubled scores(a.scores), lengths(a.lengths), grad(a.grad);
  for (int64_t g = 0; g < a.groups.count; ++g) {
    const GroupMoments m = moments_of(a.groups, g, scores.data, lengths.data, a.options.omit);
    const double stretch = stretch_of(m, a.options.baseline);
    double d = 0, e = 0;
    auto left_out = [&](int64_t r) { return a.options.omit && scores.data[r] != scores.data[r]; };
    for_group(a.groups, g, [&](int64_t r) {
      if (left_out(r)) return;
      d += grad.data[r];
      e += grad.data[r] * stretch * ((scores.data[r] - m.shift) - m.baseline);
    });
    for_group(a.groups, g, [&](int64_t r) {
      const double weight = lengths.data ? lengths.data[r] : 1.0;
      put(a.d_scores, r, left_out(r) ? 0.0 : normalize_grad(m, a.options, scores.data[r], grad.data[r], weight, d, e));
    });
  }
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
