// SPDX-License-Identifier: Apache-2.0
// KL per token, its gradient, and the KL reward.
#include "../math/kl.h"
#include "reduce.cuh"
#include "rows.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

// ---- kl_penalty ---------------------------------------------------------------------------------------------------------
// plan kl_penalty_fwd_kernel: a thread owns one piece: 16 bytes of each operand, loaded before the first is used; no loop, no
//   shared memory. Bytes per element: log_prob, ref_log_prob (old_log_prob) read once, the value written once. Each element
//   by the functions of csrc/math/kl.h; the estimator is a branch that all threads take alike.
// budget kl_penalty_fwd_kernel<S, false>: 40 registers, loads 2, stores 1
// budget kl_penalty_fwd_kernel<S, true>: 48 registers, loads 3, stores 1
template <class S, bool Weighted>
__global__ void __launch_bounds__(kTokenThreads) kl_penalty_fwd_kernel(const KlArgs a, const Tiling tiling, const KlRange<ArithmeticOf<S>> range) {
  using A = ArithmeticOf<S>;
  constexpr int N = Stored<S>::kPiece;
  int64_t r, k;
  if (!place_of(tiling, r, k)) return;
  const int64_t base = tiling.base(a.log_prob, r);
  const Piece p = piece_of<N>(k, lead_of<S>(a.log_prob, base), tiling.rows.length);
  const auto x = load<S>(a.log_prob, base, p);
  const auto ref = load<S>(a.ref_log_prob, tiling.base(a.ref_log_prob, r), p);
  const auto old = load<S>(a.old_log_prob, tiling.base(a.old_log_prob, r), p);
  const A most = A(a.weight_max);
  A value[N];
  with_estimator(a.options.estimator, [&](auto e) {
    constexpr Kl E = decltype(e)::value;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (Weighted) value[i] = kl_weighted_value<E>(x[i], ref[i], old[i], most, range);
      else value[i] = kl_value<E>(x[i], ref[i], range);
    }
  });
  store<S>(a.kl, tiling.base(a.kl, r), p, value);
}

// plan kl_penalty_bwd_kernel: as the value's, with grad read and the wanted gradients written once each.
// budget kl_penalty_bwd_kernel<S, false>: 48 registers, loads 3, stores 2
// budget kl_penalty_bwd_kernel<S, true>: 64 registers, loads 4, stores 2
template <class S, bool Weighted>
__global__ void __launch_bounds__(kTokenThreads) kl_penalty_bwd_kernel(const KlArgs a, const Tiling tiling, const KlRange<ArithmeticOf<S>> range) {
  using A = ArithmeticOf<S>;
  constexpr int N = Stored<S>::kPiece;
  int64_t r, k;
  if (!place_of(tiling, r, k)) return;
  const int64_t base = tiling.base(a.log_prob, r);
  const Piece p = piece_of<N>(k, lead_of<S>(a.log_prob, base), tiling.rows.length);
  const auto x = load<S>(a.log_prob, base, p);
  const auto ref = load<S>(a.ref_log_prob, tiling.base(a.ref_log_prob, r), p);
  const auto g = load<S>(a.grad, tiling.base(a.grad, r), p);
  const auto old = load<S>(a.old_log_prob, tiling.base(a.old_log_prob, r), p);
  const A most = A(a.weight_max);
  A d[N], d_ref[N];
  const bool plus = a.options.straight_through;
  with_estimator(a.options.estimator, [&](auto e) {
    constexpr Kl E = decltype(e)::value;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (Weighted) {
        const auto slopes = kl_weighted_grads<E>(x[i], ref[i], old[i], most, range, plus);
        d[i] = g[i] * slopes.log_prob, d_ref[i] = g[i] * slopes.ref_log_prob;
      } else {
        d[i] = g[i] * kl_grad<E>(x[i], ref[i], range, plus), d_ref[i] = -d[i];
      }
    }
  });
  if (a.d_log_prob) store<S>(a.d_log_prob, tiling.base(a.d_log_prob, r), p, d);
  if (a.d_ref_log_prob) store<S>(a.d_ref_log_prob, tiling.base(a.d_ref_log_prob, r), p, d_ref);
}

// ---- rewards ------------------------------------------------------------------------------------------------------------
// plan shape_rewards_fwd_kernel: a thread owns one piece, as above; the mask is loaded last, as its bits are wanted at once.
//   Bytes per element: rewards, both log-probs and the mask read once, the result written once.
// budget shape_rewards_fwd_kernel<S>: 64 registers, loads 3, stores 1
template <class S>
__global__ void __launch_bounds__(kTokenThreads) shape_rewards_fwd_kernel(const RewardArgs a, const Tiling tiling, const KlRange<ArithmeticOf<S>> range) {
  using A = ArithmeticOf<S>;
  constexpr int N = Stored<S>::kPiece;
  int64_t r, k;
  if (!place_of(tiling, r, k)) return;
  const int64_t base = tiling.base(a.old_log_prob, r);
  const Piece p = piece_of<N>(k, lead_of<S>(a.old_log_prob, base), tiling.rows.length);
  const auto old = load<S>(a.old_log_prob, base, p);
  const auto ref = load<S>(a.ref_log_prob, tiling.base(a.ref_log_prob, r), p);
  const auto rewards = load<S>(a.rewards, tiling.base(a.rewards, r), p);
  A x[N];
  const unsigned valid = valid_bits<N>(a.mask, tiling.base(a.mask, r), p);
  const A coef = A(a.kl_coef);
  with_estimator(a.options.estimator, [&](auto e) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = rewards[i];
      if (valid >> i & 1) x[i] = x[i] - coef * kl_value<decltype(e)::value>(old[i], ref[i], range);
    }
  });
  store<S>(a.out, tiling.base(a.out, r), p, x);
}

constexpr int kRowThreads = 256;

// The last valid token of a row; the last token where there is none. The whole block asks.
template <int N>
__device__ __forceinline__ int64_t last_valid(const Operand& mask, int64_t base, int lead, int64_t length) {
  for (int64_t top = pieces_of<N>(lead, length); top > 0; top -= kRowThreads) {
    const int64_t k = top - 1 - threadIdx.x;
    int64_t found = -1;
    if (k >= 0) {
      const Piece p = piece_of<N>(k, lead, length);
      const unsigned valid = valid_bits<N>(mask, base, p);
      if (valid) found = p.first + 31 - __clz(static_cast<int>(valid));
    }
    found = block_fold<kRowThreads>(found, [](int64_t one, int64_t other) { return one > other ? one : other; });
    if (found >= 0) return found;
  }
  return length - 1;
}

// plan placed_rewards_kernel: a block owns a row, a thread every 256th piece of it. The end of the mask is read twice: first,
//   from the end, until the block has seen a valid token. Bytes per element: both log-probs and the mask read once, the result
//   written once.
// budget placed_rewards_kernel<S>: 64 registers, loads 2, stores 1
template <class S>
__global__ void __launch_bounds__(kRowThreads, 4) placed_rewards_kernel(const RewardArgs a, const KlRange<ArithmeticOf<S>> range) {
  using A = ArithmeticOf<S>;
  constexpr int N = Stored<S>::kPiece;
  const int64_t r = blockIdx.x, length = a.rows.len(r), base = a.rows.base(a.old_log_prob, r), mask = a.rows.base(a.mask, r);
  const int lead = lead_of<S>(a.old_log_prob, base);
  const int64_t last = last_valid<N>(a.mask, mask, lead, length);
  const A score = clamped<A>(row_value<A>(a.rewards, r), A(a.clip_low), A(a.clip_high)), coef = A(a.kl_coef);
  for (int64_t k = threadIdx.x; k < pieces_of<N>(lead, length); k += kRowThreads) {
    const Piece p = piece_of<N>(k, lead, length);
    A x[N];
    const auto old = load<S>(a.old_log_prob, base, p);
    const auto ref = load<S>(a.ref_log_prob, a.rows.base(a.ref_log_prob, r), p);
    const unsigned valid = valid_bits<N>(a.mask, mask, p);
    with_estimator(a.options.estimator, [&](auto e) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        x[i] = p.first + i == last ? score : A(0);
        if (valid >> i & 1) x[i] = x[i] - coef * kl_value<decltype(e)::value>(old[i], ref[i], range);
      }
    });
    store<S>(a.out, a.rows.base(a.out, r), p, x);
  }
}

// plan placed_grad_kernel: a block owns a row and reads its mask from the end until it has seen a valid token. Bytes: the end
//   of the mask, three numbers a row.
// budget placed_grad_kernel<A>: 40 registers, loads 0, stores 0
template <class A>
__global__ void __launch_bounds__(kRowThreads) placed_grad_kernel(const RewardGradArgs a) {
  const int64_t r = blockIdx.x, length = a.rows.len(r);
  const int64_t last = last_valid<4>(a.mask, a.rows.base(a.mask, r), 0, length);
  if (threadIdx.x != 0) return;
  const A reward = row_value<A>(a.rewards, r);
  const bool moved = reward < A(a.clip_low) || reward > A(a.clip_high);
  const A d = moved || last < 0 ? A(0) : element<A>(a.grad, a.rows.base(a.grad, r) + last * a.grad.inner_stride);
  set_element(a.d_rewards, r * a.d_rewards.row_stride, d);
}

template <class S>
void kl_as(const KlArgs& a) {
  const Tiling t =
      tiling_of<S>(Rows{a.log_prob.rows, a.log_prob.cols, nullptr}, a.log_prob, a.ref_log_prob, a.old_log_prob, a.grad, a.kl, a.d_log_prob, a.d_ref_log_prob);
  const KlRange<ArithmeticOf<S>> range(a.options);
  const Grid grid{t.blocks(), kTokenThreads};
  if (a.grad) launch("kl_penalty", a.place, grid, a.old_log_prob ? kl_penalty_bwd_kernel<S, true> : kl_penalty_bwd_kernel<S, false>, a, t, range);
  else launch("kl_penalty", a.place, grid, a.old_log_prob ? kl_penalty_fwd_kernel<S, true> : kl_penalty_fwd_kernel<S, false>, a, t, range);
}

template <class S>
void rewards_as(const RewardArgs& a) {
  const KlRange<ArithmeticOf<S>> range(a.options);
  if (a.per_row) return launch("shape_rewards", a.place, {a.rows.count, kRowThreads}, placed_rewards_kernel<S>, a, range);
  Rows rows = a.rows;
  if (rows.cu) rows = {1, a.old_log_prob.cols, nullptr};  // rewards a token: rows do not matter
  const Tiling t = tiling_of<S>(rows, a.old_log_prob, a.ref_log_prob, a.rewards, a.mask, a.out);
  launch("shape_rewards", a.place, {t.blocks(), kTokenThreads}, shape_rewards_fwd_kernel<S>, a, t, range);
}

}  // namespace

double kl(const KlArgs& a) {
  with_storage([&](auto s) { kl_as<decltype(s)>(a); }, a.log_prob, a.ref_log_prob, a.old_log_prob, a.grad, a.kl, a.d_log_prob, a.d_ref_log_prob);
  return 0;
}
double shape_rewards(const RewardArgs& a) {
  with_storage([&](auto s) { rewards_as<decltype(s)>(a); }, a.old_log_prob, a.ref_log_prob, a.per_row ? Operand{} : a.rewards, a.out);
  return 0;
}
double shape_rewards_bwd(const RewardGradArgs& a) {
  const bool wide = a.grad.dtype == Dtype::f64 || a.rewards.dtype == Dtype::f64;
  launch("shape_rewards", a.place, {a.d_rewards ? a.rows.count : 0, kRowThreads}, wide ? placed_grad_kernel<double> : placed_grad_kernel<float>, a);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
