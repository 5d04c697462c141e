// SPDX-License-Identifier: Apache-2.0
// The clipped policy loss and the clipped value loss of one token, each value next to its derivative, and what the
// aggregation makes of them.
#pragma once
#include "../args.h"
#include "math.h"

namespace rlkern {
namespace RLKERN_ISA {

// ---- aggregation: loss = scale * sum over rows of row_weight * (the row's sum) --------------------------------------
struct AggWeights {
  bool mean_of_row;
  double scale;
  // `tokens` and `sequences` are this call's own counts, used where the caller gave none.
  RLKERN_HD AggWeights(const AggOptions& o, double tokens, double sequences) : mean_of_row(o.mode == Agg::seq_mean_token_mean) {
    const double n = o.local_tokens ? tokens : o.tokens, b = o.local_sequences ? sequences : o.sequences;
    switch (o.mode) {
      case Agg::token_mean: scale = o.dp_size / n; break;
      case Agg::token_sum: scale = o.dp_size; break;
      case Agg::seq_mean_token_sum_norm: scale = o.dp_size / b / o.scale; break;
      default: scale = o.dp_size / b;
    }
  }
  RLKERN_HD double row(double row_tokens) const { return mean_of_row && row_tokens > 0 ? 1 / row_tokens : 1; }
};
// Must the mask be counted before a gradient can be written?
RLKERN_HD bool counts_first(const AggOptions& o) {
  if (o.mode == Agg::token_sum) return false;
  return o.mode == Agg::token_mean ? o.local_tokens : o.local_sequences || o.mode == Agg::seq_mean_token_mean;
}

// What the tokens of a call add up to, and what is made of it: put(operand, i, value). loss, kl, entropy: each row's by its
// weight, not yet by the scale.
struct PolicyTotals {
  double tokens = 0, sequences = 0, clipped = 0, lower = 0, neg_log_ratio = 0, loss = 0, kl = 0, entropy = 0, nonfinite = 0;
  double high = -__builtin_inf(), far = 0;  // of the log-ratio, and of its size
};
// `clamp`: of the ratio that the metrics report.
template <class Put>
RLKERN_HD void put_policy(const PolicyLossArgs& a, const PolicyTotals& t, double scale, double clamp, Put put) {
  const double pg = t.loss * scale, kl = a.ref_log_prob ? t.kl * scale : 0, entropy = a.entropy ? t.entropy * scale : 0;
  double total = pg;
  if (a.ref_log_prob && a.kl_coef != 0) total += a.kl_coef * kl;
  if (a.entropy && a.entropy_coeff != 0) total -= a.entropy_coeff * entropy;
  put(a.loss, 0, total);
  put(a.sums, kTokens, t.tokens), put(a.sums, kSequences, t.sequences), put(a.sums, kClipped, t.clipped), put(a.sums, kClippedLower, t.lower);
  put(a.sums, kNegLogRatio, t.neg_log_ratio), put(a.sums, kPgLoss, pg), put(a.sums, kKlLoss, kl), put(a.sums, kEntropyLoss, entropy);
  put(a.sums, kNonfinite, t.nonfinite);
  put(a.maxes, kRatioMax, t.tokens > 0 ? ::exp(t.high < clamp ? t.high : clamp) : 0);
  put(a.maxes, kAbsLogRatioMax, t.far);
}
struct ValueTotals {
  double tokens = 0, sequences = 0, clipped = 0, predictions = 0, loss = 0, nonfinite = 0, far = 0;  // far: of an error's size
};
template <class Put>
RLKERN_HD void put_value(const ValueLossArgs& a, const ValueTotals& t, double scale, Put put) {
  put(a.loss, 0, t.loss * scale);
  put(a.sums, kVTokens, t.tokens), put(a.sums, kVSequences, t.sequences), put(a.sums, kVClipped, t.clipped), put(a.sums, kVPredictions, t.predictions);
  put(a.sums, kVLoss, t.loss * scale), put(a.sums, kVNonfinite, t.nonfinite);
  put(a.maxes, kAbsErrorMax, t.far);
}

// ---- policy --------------------------------------------------------------------------------------------------------
// l = max(-A r, -A clip(r)), for A < 0 at most -A cap; r = exp(x), x = the clamped log-ratio. Rounding is monotone, so this
// is -A times the r that wins: at most 1 + high where A > 0, between 1 - low and cap where A < 0.
template <class V>
struct PolicyClip {
  V low, high, cap, clamp;
  V usual;  // a log-ratio of at most this size meets neither the clamp nor the dual clip
  explicit PolicyClip(const PolicyClipOptions& o)
      : low(constant<V>(1 - o.low)), high(constant<V>(1 + o.high)), cap(constant<V>(o.cap)), clamp(constant<V>(o.clamp)),
        usual(constant<V>(limit(o.clamp, ::log(o.cap) * 0.99999))) {}
  static RLKERN_HD double limit(double clamp, double cap) {
    const double least = clamp < cap ? clamp : cap;
    return least < 80 ? least : 80;  // nor leaves the exponential the normal range
  }
};
template <class V, class Test>  // Test: what comparing two V gives
struct PolicyToken {
  V x, loss, slope;  // d loss / d log_prob = blocked ? 0 : slope
  Test blocked, above, below, lower;  // above or below: the clipped term is the larger one; lower: the dual clip
};
// The gradient is -A r where r itself wins, half of it where the dual clip ties with it (torch splits a tie of min in two),
// 0 elsewhere. It is a clamp's on the closed interval; a NaN of A or r shows.
template <class V>
RLKERN_HD auto policy_token(V log_ratio, V advantage, const PolicyClip<V>& o) {
  using Test = decltype(advantage > advantage);
  const V zero = constant<V>(0), far = constant<V>(__builtin_inf());
  const Test gain = advantage > zero, harm = advantage < zero;
  const V x = clamped(log_ratio, -o.clamp, o.clamp), r = exp_of(x);
  const V best = clamped(r, harm ? o.low : -far, harm ? o.cap : (gain ? o.high : far)), loss = -advantage * best;
  const Test blocked = (best < r) | (best > r) | (x < log_ratio) | (x > log_ratio), tie = (r == o.cap) & harm;
  const Test above = (r > o.high) & gain, below = (r < o.low) & harm, lower = (r > o.cap) & harm;
  return PolicyToken<V, Test>{x, loss, tie ? constant<V>(0.5) * loss : loss, blocked, above, below, lower};
}

// The same where |log_ratio| <= o.usual: with fewer comparisons, for most vectors. The gradient is clipped ? 0 : loss.
template <class V, class Test>
struct UsualToken {
  V loss;
  Test clipped;
};
template <class V>
RLKERN_HD auto policy_token_usual(V log_ratio, V advantage, const PolicyClip<V>& o) {
  using Test = decltype(advantage > advantage);
  const V zero = constant<V>(0), r = exp_bounded(log_ratio);
  const Test gain = advantage > zero, harm = advantage < zero;
  const V most = Ops<V>::at_most(r, o.high), least = Ops<V>::at_least(r, o.low), best = gain ? most : (harm ? least : r);
  const Test clipped = (best < r) | (best > r);
  return UsualToken<V, Test>{-advantage * best, clipped};
}

// ---- value ---------------------------------------------------------------------------------------------------------
// l = max((v - R)^2, (clip(v, V - c, V + c) - R)^2) / 2; c infinite: half the squared error. Huber's delta: beyond an error of
// that size e^2 / 2 goes on as its tangent.
template <class V, class Test>
struct ValueToken {
  V loss, grad;
  Test clipped;
};
template <class V>
RLKERN_HD auto value_token(V vpred, V ret, V value, V range, V delta) {
  const V zero = constant<V>(0), half = constant<V>(0.5);
  const V clamp = clamped(vpred, value - range, value + range), inside = value != value ? value : clamp;
  const V error = vpred - ret, other = inside - ret, plain = error * error, clip = other * other;
  using Test = decltype(clip > plain);
  const Test clipped = clip > plain, moved = (inside < vpred) | (inside > vpred), tie = (clip == plain) & moved;
  const V bound = clamped(error, -delta, delta), full = tie ? half * bound : bound, grad = (clipped & moved) ? zero : full;
  const V square = clipped ? clip : plain, size = Ops<V>::magnitude(clipped ? other : error);
  const V loss = size > delta ? delta * (size - half * delta) : half * square;
  const Test lost = clip != clip;
  return ValueToken<V, Test>{lost ? clip : loss, lost ? clip : grad, clipped};
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
