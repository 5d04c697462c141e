// SPDX-License-Identifier: Apache-2.0
// Rollout correction: what is asked of a token, as sums of a thread, and where those go in the table.
#pragma once
#include "teams.cuh"

namespace rlkern {
namespace RLKERN_ISA {

using Table = Columns<kCorrectionFields>;

// Sums of x - shift and of its square, in float64, where the subtraction of floats near the shift is exact.
struct Moments2 {
  double sum = 0, square = 0;
  template <class A>
  __device__ __forceinline__ void add(A x, double shift) {
    const double d = static_cast<double>(x) - shift;
    sum += d, square = fused(d, d, square);
  }
};
template <class A>
__device__ __forceinline__ A nothing() {  // above and below no number
  return A(__builtin_nanf(""));
}
// The largest and the smallest; a NaN is left out.
template <class A>
struct Extremes {
  A most = -A(__builtin_inff()), least = A(__builtin_inff());
  __device__ __forceinline__ void add(A x) { most = folded(Fold::most, most, x), least = folded(Fold::least, least, x); }
};

// A token's ratio, 1 where masked.
template <class A>
struct Token {
  RatioTerms<A> terms;
  A old_log_prob, rollout_log_prob, open;  // open: k3 without the bound
  __device__ __forceinline__ Token(A old, A rollout, bool valid) {
    const A safe = A(kSafety);
    old_log_prob = valid ? old : A(0), rollout_log_prob = valid ? rollout : A(0);
    const A raw = old_log_prob - rollout_log_prob;
    terms = ratio_terms(clamped(raw, -safe, safe)), open = terms.k3;
    if (Ops<A>::magnitude(raw) > safe) open = exp_minus_1_minus(raw);
  }
};

struct OffPolicy {
  double old_log_prob = 0, rollout_log_prob = 0, k3 = 0;
  Moments2 excess;  // of the ratio over 1
  unsigned tokens = 0;
  template <class A>
  __device__ __forceinline__ void add(const Token<A>& t) {
    old_log_prob += static_cast<double>(t.old_log_prob), rollout_log_prob += static_cast<double>(t.rollout_log_prob);
    k3 += static_cast<double>(t.open), excess.add(t.terms.e, 1.0);
  }
  __device__ __forceinline__ void leave(const Table& table) const {
    table.leave<Fold::sum>(kRTokens, tokens), table.leave<Fold::sum>(kROld, old_log_prob), table.leave<Fold::sum>(kRRollout, rollout_log_prob);
    table.leave<Fold::sum>(kRK3, k3), table.leave<Fold::sum>(kRExcess, excess.sum), table.leave<Fold::sum>(kRExcess2, excess.square);
  }
};

template <class A>
struct TokenWeights {
  Moments2 weight, plain;  // of the weight over 1, exact near 1; of itself, for weights near 0
  Extremes<A> range;
  unsigned high = 0, low = 0;
  __device__ __forceinline__ A add(A ratio, bool valid, A least, A most, bool icepop) {
    const A w = correction_weight(ratio, least, most, icepop), tested = valid ? ratio : nothing<A>(), own = valid ? w : A(0);
    high += tested > most, low += tested < least;
    range.add(valid ? w : nothing<A>()), weight.add(valid ? w : A(1), 1.0), plain.add(own, 0.0);
    return own;
  }
  __device__ __forceinline__ void leave(const Table& table) const {
    table.leave<Fold::sum>(kRW, weight.sum), table.leave<Fold::sum>(kRW2, weight.square), table.leave<Fold::sum>(kRWSquare, plain.square);
    table.leave<Fold::sum>(kRWHigh, high), table.leave<Fold::sum>(kRWLow, low);
    table.leave<Fold::most>(kRWMax, range.most), table.leave<Fold::least>(kRWMin, range.least);
  }
};

// The probabilities themselves, side by side.
template <class A>
struct Probabilities {
  Moments2 old, rollout, gap;
  double product = 0;
  A most = -A(__builtin_inff());
  __device__ __forceinline__ void add(const Token<A>& t, bool valid) {
    const A p = valid ? exp_of(t.old_log_prob) : A(0), r = valid ? exp_of(t.rollout_log_prob) : A(0), d = Ops<A>::magnitude(p - r);
    product = fused(static_cast<double>(p), static_cast<double>(r), product);
    old.add(p, 0.0), rollout.add(r, 0.0), gap.add(d, 0.0), most = folded(Fold::most, most, d);
  }
  __device__ __forceinline__ void leave(const Table& table) const {
    constexpr int F = kRProbability;
    table.leave<Fold::sum>(F + kPOld, old.sum), table.leave<Fold::sum>(F + kPRollout, rollout.sum), table.leave<Fold::sum>(F + kPGap, gap.sum);
    table.leave<Fold::sum>(F + kPOld2, old.square), table.leave<Fold::sum>(F + kPRollout2, rollout.square);
    table.leave<Fold::sum>(F + kPGap2, gap.square), table.leave<Fold::sum>(F + kPProduct, product), table.leave<Fold::most>(F + kPGapMax, most);
  }
};

// What the options ask, by k = 1, 2, 3.
template <class A>
struct Asked {
  A least = 0, most = 0;        // of the weights
  A low[3] = {}, high[3] = {};  // of token_k*
  bool any[3] = {}, token[3] = {};
  __device__ __forceinline__ bool within(int k, A v) const { return !token[k] || (v >= low[k] && v <= high[k]); }
};
// One divergence: its sum and extremes, and what the option token_k* asks if there is one.
template <class A, int K>
struct ByK {
  double sum = 0;
  Extremes<A> range;
  Moments2 clamped_to;
  unsigned high = 0, low = 0;
  // Of tokens [first, first + N) of a piece, whose `valid` these are; its `keep` loses what the option rejects.
  template <int N>
  __device__ __forceinline__ void add(const RatioTerms<A> (&terms)[N], unsigned valid, int first, unsigned& keep, const Asked<A>& asked) {
    if (!asked.any[K - 1]) return;
    const A least = asked.low[K - 1], most = asked.high[K - 1];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool is_valid = valid >> i & 1;
      const A v = divergence<K>(terms[i].q, terms[i].k3), tested = is_valid ? v : nothing<A>();  // 0 where masked
      sum += static_cast<double>(v), range.add(tested);
      if (!asked.token[K - 1]) continue;
      high += tested > most, low += tested < least;
      if (!(tested >= least && tested <= most)) keep &= ~(1u << (first + i));
      clamped_to.add(is_valid ? clamped(v, least, most) : A(0), 0.0);
    }
  }
  // numbers: how many valid tokens have a log-ratio that is no NaN.
  __device__ __forceinline__ void leave(const Table& table, unsigned numbers, const Asked<A>& asked) const {
    constexpr int F = kRByK + (K - 1) * kByK;
    if (!asked.any[K - 1]) return;
    table.leave<Fold::sum>(F + kKSum, sum), table.leave<Fold::most>(F + kKMax, range.most), table.leave<Fold::least>(F + kKMin, range.least);
    if (!asked.token[K - 1]) return;
    table.leave<Fold::sum>(F + kKClamped, clamped_to.sum), table.leave<Fold::sum>(F + kKClamped2, clamped_to.square);
    table.leave<Fold::sum>(F + kKHigh, high), table.leave<Fold::sum>(F + kKLow, low), table.leave<Fold::sum>(F + kKKept, numbers - high - low);
  }
};

__device__ __forceinline__ Fold fold_of(int field) {
  const bool by_k = field >= kRByK && field < kRProbability;
  const int of_k = by_k ? (field - kRByK) % kByK : -1;
  if (field == kRWMax || of_k == kKMax || field == kRProbability + kPGapMax) return Fold::most;
  return field == kRWMin || of_k == kKMin ? Fold::least : Fold::sum;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
