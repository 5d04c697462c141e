// SPDX-License-Identifier: Apache-2.0
// The adjoints of GAE and of discounted returns: the same recurrences in the other direction of time.
#include "scan.h"

#include "../kernels.h"
#include "mask.h"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

// c_t = pending + g c_prev at valid tokens; a masked token's cotangent waits for the next valid one (it emitted that one's
// carry). d_reward = c, d_value = G_returns - c + gamma c_prev.
template <class A>
void gae_row(const ScanGradArgs& a, int64_t r) {
  constexpr int W = kLanes<A>;
  const double lam = a.lam ? row_value<double>(a.lam, r) : a.lam_value;
  const Powers<A, false> power(A(a.gamma * lam));
  const A gamma = A(a.gamma), g = power.g1[0];
  const Column<A> grad_advantages(a.grad_advantages, a.rows, r), grad_returns(a.grad_returns, a.rows, r);
  const MaskRow mask(a.mask, a.rows, r);
  const OutColumn<A> d_rewards(a.d_rewards, a.rows, r, false), d_values(a.d_values, a.rows, r, false);
  const bool skip = a.masked == Masked::skip, zeroed = a.masked == Masked::zero;
  A c = 0, pending = 0;
  for_vectors<A, false>(a.rows.len(r), [&](int64_t i, int64_t n) RLKERN_INLINE {
    const uint32_t m = mask.lanes<W>(i, n), inside = static_cast<uint32_t>((uint64_t{1} << n) - 1);
    const uint32_t live = skip ? m : inside;
    const Vec<A> h = grad_returns ? grad_returns(i, n) : Vec<A>{};
    Vec<A> x = grad_advantages ? grad_advantages(i, n) + h : h, d_reward{}, d_value = h;
    if (live == kAllLanes<A>) {
      x[0] += pending, pending = 0;
      d_reward = power.scan(x, c);
      d_value = h - d_reward + splat(gamma) * shift<A, 1, false>(d_reward, splat(c));
      c = d_reward[W - 1];
    } else {
      for (int64_t j = 0; j < n; ++j) {
        pending += x[j];
        if (!(live >> j & 1)) continue;
        const A before = c;
        c = Ops<A>::fused(g, before, pending);
        pending = 0;
        d_reward[j] = c;
        d_value[j] = h[j] - c + gamma * before;
      }
    }
    if (zeroed) d_reward = blend(m, d_reward, Vec<A>{}), d_value = blend(m, d_value, Vec<A>{});
    d_rewards(i, n, d_reward);
    d_values(i, n, d_value);
  });
  if (a.d_bootstrap) OutColumn<A>(a.d_bootstrap, Rows{1, 1, nullptr}, 0, false)(r * a.d_bootstrap.row_stride, 1, splat(gamma * c));
}

// skip, zero, None: c_t = G_t + gamma c_prev on live tokens. reset: c_t = G_t + gamma m_t c_prev, on every
// token.
// turn: a turn's cotangents gather at its last token, which alone read a reward.
template <class A>
void returns_row(const ScanGradArgs& a, int64_t r) {
  constexpr int W = kLanes<A>;
  const Powers<A, false> power{A(a.gamma)};
  const A gamma = A(a.gamma);
  const Column<A> grad(a.grad_returns, a.rows, r);
  const MaskRow mask(a.mask, a.rows, r);
  const OutColumn<A> d_rewards(a.d_rewards, a.rows, r, false);
  const int64_t length = a.rows.len(r);
  A c = 0, turn = 0;
  for_vectors<A, false>(length, [&](int64_t i, int64_t n) RLKERN_INLINE {
    const uint32_t m = mask.lanes<W>(i, n), inside = static_cast<uint32_t>((uint64_t{1} << n) - 1);
    const uint32_t live = a.masked == Masked::skip ? m : inside;
    const Vec<A> x = grad(i, n);
    Vec<A> d{};
    if (a.masked == Masked::turn) {
      const uint32_t next = i + n < length ? mask.lanes<W>(i + n, 1) & 1 : 0;
      for (int64_t j = 0; j < n; ++j) {
        if (!(m >> j & 1)) continue;
        turn += x[j];
        if (j + 1 < n ? m >> (j + 1) & 1 : next) continue;
        d[j] = c = Ops<A>::fused(gamma, c, turn);
        turn = 0;
      }
    } else if (a.masked == Masked::reset && m != kAllLanes<A>) {
      for (int64_t j = 0; j < n; ++j) {
        c = m >> j & 1 ? Ops<A>::fused(gamma, c, x[j]) : A(x[j]);
        d[j] = c;
      }
    } else if (live == kAllLanes<A>) {
      d = power.scan(x, c);
      c = d[W - 1];
    } else if (live != 0) {
      d = affine_lanes<A, false>(blend(live, power.g1, splat(A(1))), blend(live, x, Vec<A>{}), c);
      c = d[W - 1];
      d = blend(live, d, Vec<A>{});
    }
    if (a.masked == Masked::zero) d = blend(m, d, Vec<A>{});
    d_rewards(i, n, d);
  });
  if (a.d_bootstrap) OutColumn<A>(a.d_bootstrap, Rows{1, 1, nullptr}, 0, false)(r * a.d_bootstrap.row_stride, 1, splat(gamma * c));
}

template <class A>
void rows(const ScanGradArgs& a) {
  parallel_rows(a.rows.count, a.rows.total(), a.place, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) a.gae ? gae_row<A>(a, r) : returns_row<A>(a, r);
  });
}

}  // namespace

double scan_bwd(const ScanGradArgs& a) {
  a.grad_returns.dtype == Dtype::f64 ? rows<double>(a) : rows<float>(a);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
