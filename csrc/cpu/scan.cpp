// SPDX-License-Identifier: Apache-2.0
// GAE and discounted returns, forward. Rows and time both run downwards, so that each stream descends through memory
// without a jump: the hardware prefetcher follows it across rows (docs/performance.md).
#include "scan.h"

#include "../kernels.h"
#include "mask.h"
#include "moments.h"
#include "../math/kl.h"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

// Rewards as the recurrence reads them: zero at masked tokens in "zero" mode, less the KL penalty at valid ones.
template <class A>
struct Rewards {
  Column<A> reward, old_log_prob, ref_log_prob;
  bool zero;
  const ScanArgs& args;
  Rewards(const ScanArgs& a, int64_t r)
      : reward(a.rewards, a.rows, r), old_log_prob(a.old_log_prob, a.rows, r), ref_log_prob(a.ref_log_prob, a.rows, r), zero(a.masked == Masked::zero),
        args(a) {}
  bool direct() const { return reward.direct() && args.kl.estimator == Kl::none; }
  Vec<A> operator()(Direct way, int64_t i, int64_t n, uint32_t m) const { return zero ? reward.valid(way, i, n, m) : reward(way, i, n); }
  Vec<A> operator()(Any way, int64_t i, int64_t n, uint32_t m) const {
    const Vec<A> x = zero ? reward.valid(way, i, n, m) : reward(way, i, n);
    return args.kl.estimator == Kl::none || m == 0 ? x : shaped(x, i, n, m);
  }

 private:
  RLKERN_RARE Vec<A> shaped(Vec<A> x, int64_t i, int64_t n, uint32_t m) const {
    const Vec<A> old_lp = old_log_prob.valid(i, n, m), ref_lp = ref_log_prob.valid(i, n, m);
    const KlRange<Vec<A>> range(args.kl);
    const Vec<A> kl = with_estimator(args.kl.estimator, [&](auto e) { return kl_value<decltype(e)::value>(old_lp, ref_lp, range); });
    return blend(m, x - splat(A(args.kl_coef)) * kl, x);
  }
};

// Will the output that whitening reads back still be in the cache then?
bool stays_cached(const ScanArgs& a) { return !worth_streaming(a.rows.total(), bytes_of(a.returns.dtype)); }

template <class A, bool Stats>
void gae_row(const ScanArgs& a, int64_t r, bool stream, Moments* moments) {
  constexpr int W = kLanes<A>;
  const double lam = a.lam ? row_value<double>(a.lam, r) : a.lam_value;
  const Powers<A, true> power(A(a.gamma * lam));
  const Rewards<A> rewards(a, r);
  const Column<A> values(a.values, a.rows, r);
  const MaskRow mask(a.mask, a.rows, r);
  const OutColumn<A> advantages(a.advantages, a.rows, r, stream && !(Stats && stays_cached(a))), returns(a.returns, a.rows, r, stream);
  const Vec<A> gamma = splat(A(a.gamma)), zero{}, one = splat(A(1));
  const bool skip = a.masked == Masked::skip, zeroed = a.masked == Masked::zero;
  MomentLanes<A> stats;
  A y0 = 0, next_value = a.bootstrap ? row_value<A>(a.bootstrap, r) : A(0);
  const bool direct = rewards.direct() && values.direct() && mask.direct() && advantages.direct() && returns.direct();
  for_lanes<A, true>(a.rows.len(r), direct, [&](auto way, int64_t i, int64_t n) RLKERN_INLINE {
    const uint32_t m = mask.template lanes<W>(way, i, n);
    const uint32_t live = skip ? m : static_cast<uint32_t>((uint64_t{1} << n) - 1);  // tokens the recurrence steps on
    const Vec<A> v = zeroed ? values.valid(way, i, n, m) : values(way, i, n);
    Vec<A> y;
    if (live == kAllLanes<A>) {
      const Vec<A> next = shift<A, 1, true>(v, splat(next_value));
      y = power.scan(fused(gamma, next, rewards(way, i, n, m)) - v, y0);
      next_value = v[0], y0 = y[0];
    } else if (live == 0) {
      y = splat(y0);
    } else {
      const Vec<A> latest = affine_lanes<A, true>(blend(live, zero, one), blend(live, v, zero), next_value);
      const Vec<A> next = shift<A, 1, true>(latest, splat(next_value));
      const Vec<A> delta = fused(gamma, next, rewards(way, i, n, m)) - v;
      y = affine_lanes<A, true>(blend(live, power.g1, one), blend(live, delta, zero), y0);
      next_value = latest[0], y0 = y[0];
    }
    if (Stats) stats.add(y, m);
    advantages(way, i, n, y);
    returns(way, i, n, y + v);
  });
  if (Stats) *moments = stats.total();
}

// ---- discounted returns: one function a mask rule ------------------------------------------------------------------
template <class A>
struct Returns {
  const Powers<A, true>& power;
  A carry;
  uint32_t next_bit;  // turn: is the token to the right valid?

  // skip (live = valid tokens), zero and None (live = all): identity where not live
  Vec<A> skip(Vec<A> reward, uint32_t live) {
    const Vec<A> zero{}, one = splat(A(1));
    Vec<A> y;
    if (live == kAllLanes<A>) {
      y = power.scan(reward, carry);
    } else if (live == 0) {
      return zero;
    } else {
      y = affine_lanes<A, true>(blend(live, power.g1, one), blend(live, reward, zero), carry);
    }
    carry = y[0];
    return blend(live, y, zero);
  }
  // emitted everywhere, carried only out of valid tokens
  Vec<A> reset(Vec<A> reward, uint32_t m, int64_t n) {
    if (m == kAllLanes<A>) return skip(reward, m);
    const Vec<A> out = cut(reward, m, n, power.g1[0], carry);
    carry = m & 1 ? out[0] : A(0);
    return out;
  }
  // one step a turn, on the reward of its last token
  Vec<A> turn(Vec<A> reward, uint32_t m) {
    const Vec<A> zero{}, one = splat(A(1));
    const uint32_t last = m & ~(m >> 1 | next_bit << (kLanes<A> - 1));
    const Vec<A> y = last ? affine_lanes<A, true>(blend(last, power.g1, one), blend(last, reward, zero), carry) : splat(carry);
    next_bit = m & 1, carry = y[0];
    return blend(m, y, zero);
  }

 private:
  // serial where the trace is cut: 0 * NaN would not stop a NaN
  RLKERN_RARE static Vec<A> cut(Vec<A> reward, uint32_t m, int64_t n, A gamma, A carry) {
    Vec<A> out{};
    for (int64_t j = n - 1; j >= 0; --j) {
      out[j] = Ops<A>::fused(gamma, carry, reward[j]);
      carry = m >> j & 1 ? out[j] : A(0);
    }
    return out;
  }
};

template <class A, bool Stats>
void returns_row(const ScanArgs& a, int64_t r, bool stream, Moments* moments, uint16_t* kept) {
  constexpr int W = kLanes<A>;
  const Powers<A, true> power{A(a.gamma)};
  const Rewards<A> rewards(a, r);
  const MaskRow mask(a.mask, a.rows, r);
  const OutColumn<A> returns(a.returns, a.rows, r, stream && !(Stats && stays_cached(a)));
  MomentLanes<A> stats;
  Returns<A> step{power, a.bootstrap ? row_value<A>(a.bootstrap, r) : A(0), 0};
  const bool one_rule = a.masked != Masked::turn && a.masked != Masked::reset;  // the direct loop holds no call
  const bool direct = one_rule && rewards.direct() && mask.direct() && returns.direct();
  for_lanes<A, true>(a.rows.len(r), direct, [&](auto way, int64_t i, int64_t n) RLKERN_INLINE {
    const uint32_t m = mask.template lanes<W>(way, i, n), inside = static_cast<uint32_t>((uint64_t{1} << n) - 1);
    const Vec<A> reward = rewards(way, i, n, m);
    Vec<A> out;
    if constexpr (std::is_same_v<decltype(way), Direct>) {
      out = step.skip(reward, a.masked == Masked::skip ? m : inside);
    } else {
      if (a.masked == Masked::turn) out = step.turn(reward, m);
      else if (a.masked == Masked::reset) out = step.reset(reward, m, n);
      else out = step.skip(reward, a.masked == Masked::skip ? m : inside);
    }
    if (Stats) stats.add(out, m);
    if (kept) kept[i / W] = static_cast<uint16_t>(m);
    returns(way, i, n, out);
  });
  if (Stats) *moments = stats.total();
}

// ---- whitening: advantages := whitened advantages (GAE) or masked whitened returns (REINFORCE++), read back once, upwards: the
// first sweep came down, so the rows it left last are the ones still in the cache.
template <class A>
void whiten_row(const ScanArgs& a, int64_t r, bool stream, const WhitenScale<Vec<A>, A>& scale, const uint16_t* kept) {
  constexpr int W = kLanes<A>;
  const Column<A> from(a.values ? a.advantages : a.returns, a.rows, r);
  const MaskRow mask(a.mask, a.rows, r);
  const OutColumn<A> advantages(a.advantages, a.rows, r, stream && !a.values);  // in place through the cache
  for_lanes<A, false>(a.rows.len(r), from.direct() && mask.direct() && advantages.direct(), [&](auto way, int64_t i, int64_t n) RLKERN_INLINE {
    Vec<A> y = scale(from(way, i, n));
    if (a.whiten_options.mask_output) y = blend(kept ? kept[i / W] : mask.template lanes<W>(way, i, n), y, Vec<A>{});
    advantages(way, i, n, y);
  });
}

template <class A>
double scan_all(const ScanArgs& a) {
  const int64_t total = a.rows.total();
  const bool stream = worth_streaming(total, a.values ? 24 : 16);
  const bool keep = a.whiten && a.whiten_options.mask_output && !a.values;
  Scratch<Moments> moments(a.whiten ? a.rows.count : 0);
  Scratch<uint16_t> lanes(keep ? KeptLanes::count(a.rows, kLanes<A>) : 0);
  const KeptLanes kept(a.rows, kLanes<A>, lanes.data);
  parallel_rows(a.rows.count, total, a.place, [&](int64_t begin, int64_t end) {
    for (int64_t r = end - 1; r >= begin; --r) {
      Moments* row = a.whiten ? moments.data + r : nullptr;
      if (a.values) a.whiten ? gae_row<A, true>(a, r, stream, row) : gae_row<A, false>(a, r, stream, nullptr);
      else a.whiten ? returns_row<A, true>(a, r, stream, row, keep ? kept.row(r) : nullptr) : returns_row<A, false>(a, r, stream, nullptr, nullptr);
    }
    if (stream) stream_fence();
  });
  if (!a.whiten) return 0;
  Moments all;
  for (int64_t r = 0; r < a.rows.count; ++r) all.merge(moments.data[r]);
  if (all.count <= (a.whiten_options.unbiased ? 1 : 0)) return all.count;  // the caller refuses
  const WhitenScale<Vec<A>, A> scale(all, a.whiten_options);
  parallel_rows(a.rows.count, total, a.place, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) whiten_row<A>(a, r, stream, scale, keep ? kept.row(r) : nullptr);
    if (stream) stream_fence();
  });
  return all.count;
}

}  // namespace

double scan_fwd(const ScanArgs& a) { return a.returns.dtype == Dtype::f64 ? scan_all<double>(a) : scan_all<float>(a); }

}  // namespace RLKERN_ISA
}  // namespace rlkern
