// SPDX-License-Identifier: Apache-2.0
// KL per token, its gradient, and the KL reward. The estimator is chosen outside the loops.
#include "../kernels.h"
#include "../math/kl.h"
#include "chunks.h"
#include "mask.h"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

template <class A, Kl E, bool Weighted>
void value_piece(const KlArgs& a, const Rows& rows, int64_t r, int64_t begin, int64_t end, bool stream) {
  const Column<A> log_prob(a.log_prob, rows, r), ref_log_prob(a.ref_log_prob, rows, r), old_log_prob(a.old_log_prob, rows, r);
  const OutColumn<A> kl(a.kl, rows, r, stream);
  const KlRange<Vec<A>> range(a.options);
  const Vec<A> most = splat(A(a.weight_max));
  const bool direct = log_prob.direct() && ref_log_prob.direct() && old_log_prob.direct() && kl.direct();
  for_lanes<A, false>(end - begin, direct, [&](auto way, int64_t k, int64_t n) RLKERN_INLINE {
    const int64_t i = begin + k;
    const Vec<A> x = log_prob(way, i, n), ref = ref_log_prob(way, i, n);
    if constexpr (Weighted) kl(way, i, n, kl_weighted_value<E>(x, ref, old_log_prob(way, i, n), most, range));
    else kl(way, i, n, kl_value<E>(x, ref, range));
  });
}

template <class A, Kl E, bool Weighted>
void grad_piece(const KlArgs& a, const Rows& rows, int64_t r, int64_t begin, int64_t end, bool stream) {
  const Column<A> log_prob(a.log_prob, rows, r), ref_log_prob(a.ref_log_prob, rows, r), old_log_prob(a.old_log_prob, rows, r), grad(a.grad, rows, r);
  const OutColumn<A> d_log_prob(a.d_log_prob, rows, r, stream), d_ref_log_prob(a.d_ref_log_prob, rows, r, stream);
  const KlRange<Vec<A>> range(a.options);
  const Vec<A> most = splat(A(a.weight_max));
  const bool plus = a.options.straight_through,
             direct = log_prob.direct() && ref_log_prob.direct() && old_log_prob.direct() && grad.direct() && d_log_prob.direct() && d_ref_log_prob.direct();
  for_lanes<A, false>(end - begin, direct, [&](auto way, int64_t k, int64_t n) RLKERN_INLINE {
    const int64_t i = begin + k;
    const Vec<A> x = log_prob(way, i, n), ref = ref_log_prob(way, i, n), g = grad(way, i, n);
    if constexpr (Weighted) {
      const auto slopes = kl_weighted_grads<E>(x, ref, old_log_prob(way, i, n), most, range, plus);
      d_log_prob(way, i, n, g * slopes.log_prob);
      d_ref_log_prob(way, i, n, g * slopes.ref_log_prob);
    } else {
      const Vec<A> d = g * kl_grad<E>(x, ref, range, plus);
      d_log_prob(way, i, n, d);
      d_ref_log_prob(way, i, n, -d);
    }
  });
}

template <class A, bool Weighted>
void kl_all(const KlArgs& a) {
  const Rows rows{a.log_prob.rows, a.log_prob.cols, nullptr};
  const Chunks chunks(one_row_if_gapless(rows, a.log_prob, a.ref_log_prob, a.old_log_prob, a.kl, a.grad, a.d_log_prob, a.d_ref_log_prob));
  const bool stream = worth_streaming(rows.total(), (a.grad ? 20 : 12) + (Weighted ? 4 : 0));
  with_estimator(a.options.estimator, [&](auto e) {
    constexpr Kl E = decltype(e)::value;
    chunks.each(a.place, [&](int64_t c) {
      chunks.pieces(c, [&](int64_t r, int64_t begin, int64_t end) {
        a.grad ? grad_piece<A, E, Weighted>(a, chunks.rows, r, begin, end, stream) : value_piece<A, E, Weighted>(a, chunks.rows, r, begin, end, stream);
      });
      if (stream) stream_fence();
    });
  });
}

// ---- rewards -------------------------------------------------------------------------------------------------------
// The last valid token of a row; the last token where there is none.
template <class A>
int64_t last_valid(const MaskRow& mask, int64_t length) {
  constexpr int W = kLanes<A>;
  for (int64_t i = (length - 1) / W * W; i >= 0 && length > 0; i -= W) {
    const uint32_t m = mask.lanes<W>(i, length - i < W ? length - i : W);
    if (m) return i + 31 - __builtin_clz(m);
  }
  return length - 1;
}

template <class A, Kl E>
void reward_row(const RewardArgs& a, int64_t r, bool stream) {
  constexpr int W = kLanes<A>;
  const int64_t length = a.rows.len(r);
  const Column<A> rewards(a.per_row ? Operand{} : a.rewards, a.rows, r), old(a.old_log_prob, a.rows, r), ref(a.ref_log_prob, a.rows, r);
  const MaskRow mask(a.mask, a.rows, r);
  const OutColumn<A> out(a.out, a.rows, r, stream);
  const KlRange<Vec<A>> range(a.options);
  const Vec<A> coef = splat(A(a.kl_coef));
  const A score = a.per_row ? clamped<A>(row_value<A>(a.rewards, r), A(a.clip_low), A(a.clip_high)) : A(0);
  const int64_t at = a.per_row ? last_valid<A>(mask, length) : -1;
  for_vectors<A, false>(length, [&](int64_t i, int64_t n) RLKERN_INLINE {
    const uint32_t m = mask.lanes<W>(i, n);
    Vec<A> x = a.per_row ? Vec<A>{} : rewards(i, n);
    if (at >= i && at < i + n) x[at - i] = score;
    if (m) x = blend(m, x - coef * kl_value<E>(old.valid(i, n, m), ref.valid(i, n, m), range), x);
    out(i, n, x);
  });
}

template <class A>
void reward_all(const RewardArgs& a) {
  const bool stream = worth_streaming(a.rows.total(), 24);
  with_estimator(a.options.estimator, [&](auto e) {
    parallel_rows(a.rows.count, a.rows.total(), a.place, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) reward_row<A, decltype(e)::value>(a, r, stream);
      if (stream) stream_fence();
    });
  });
}

// d_reward of a row: the cotangent where its reward went, unless the clip moved it.
template <class A>
void placed_grad(const RewardGradArgs& a) {
  parallel_rows(a.rows.count, a.rows.total(), a.place, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = last_valid<A>(MaskRow(a.mask, a.rows, r), a.rows.len(r));
      const A reward = row_value<A>(a.rewards, r);
      const bool moved = reward < A(a.clip_low) || reward > A(a.clip_high);
      const A d = moved || at < 0 ? A(0) : Column<A>(a.grad, a.rows, r)(at, 1)[0];
      OutColumn<A>(a.d_rewards, Rows{1, 1, nullptr}, 0, false)(r * a.d_rewards.row_stride, 1, splat(d));
    }
  });
}

bool wide(const Operand& a, const Operand& b, const Operand& c) { return a.dtype == Dtype::f64 || b.dtype == Dtype::f64 || c.dtype == Dtype::f64; }

}  // namespace

double kl(const KlArgs& a) {
  const bool wider = wide(a.log_prob, a.ref_log_prob, a.grad) || a.old_log_prob.dtype == Dtype::f64;
  if (a.old_log_prob) wider ? kl_all<double, true>(a) : kl_all<float, true>(a);
  else wider ? kl_all<double, false>(a) : kl_all<float, false>(a);
  return 0;
}
double shape_rewards(const RewardArgs& a) {
  a.out.dtype == Dtype::f64 ? reward_all<double>(a) : reward_all<float>(a);
  return 0;
}
double shape_rewards_bwd(const RewardGradArgs& a) {
  wide(a.grad, a.rewards, Operand{}) ? placed_grad<double>(a) : placed_grad<float>(a);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
