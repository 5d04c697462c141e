// SPDX-License-Identifier: Apache-2.0
// What the policy losses share beyond loss.cuh: a thread's sums, and the KL and entropy terms.
#pragma once
#include "../math/kl.h"
#include "loss.cuh"

namespace rlkern {
namespace RLKERN_ISA {

// Blocks of a multiprocessor, at least: 128 registers a thread for two. Float64 needs more; so does bfloat16 with every
// operand, in what the compiler makes of it for sm_120.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr bool kTight = true;
#else
constexpr bool kTight = false;
#endif
template <class S, bool Extra = true>
constexpr int kPolicyBlocks = sizeof(ArithmeticOf<S>) == 8 || (kTight && Extra && std::is_same_v<S, __nv_bfloat16>) ? 1 : 2;

template <class A>
struct PolicySums {
  double loss = 0, kl = 0, entropy = 0, x = 0;
  unsigned clipped = 0, lower = 0, bad = 0;
  A high = -constant<A>(__builtin_inf()), far = 0;  // of the log-ratio, and of its size
  // The metrics of a token, raw its log-ratio; a NaN is left out of the largest. What is not valid has 0 for both.
  __device__ __forceinline__ void see(A raw, A clamped, bool valid) {
    x += static_cast<double>(clamped);
    high = Ops<A>::at_least(high, valid ? raw : high), far = Ops<A>::at_least(far, Ops<A>::magnitude(raw));
  }
  // The loss of a piece's tokens.
  template <int N>
  __device__ __forceinline__ void add(const A (&value)[N], double weight) {
    double all = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) all += static_cast<double>(value[i]);
    loss = fused(weight, all, loss);
    if (all - all == 0) return;
#pragma unroll
    for (int i = 0; i < N; ++i) bad += value[i] - value[i] == A(0) ? 0 : 1;
  }
  __device__ __forceinline__ PolicyTotals totals(const MaskCount& seen) const {
    PolicyTotals t;
    t.tokens = static_cast<double>(seen.tokens), t.sequences = static_cast<double>(seen.sequences), t.clipped = clipped, t.lower = lower, t.neg_log_ratio = -x;
    t.loss = loss, t.kl = kl, t.entropy = entropy, t.nonfinite = bad;
    t.high = static_cast<double>(high), t.far = static_cast<double>(far);
    return t;
  }
};

// The KL term of a piece's valid tokens: its sum, by the row's weight, and kl_coef times its slope in d.
template <class S>
__device__ __forceinline__ double kl_term(const PolicyLossArgs& a, const KlRange<ArithmeticOf<S>>& range, const Loaded<S>& log_prob, const Loaded<S>& ref,
                                          unsigned valid, ArithmeticOf<S> (&d)[Stored<S>::kPiece]) {
  using A = ArithmeticOf<S>;
  double sum = 0;
  with_estimator(a.kl.estimator, [&](auto e) {
    constexpr Kl E = decltype(e)::value;
#pragma unroll
    for (int i = 0; i < Stored<S>::kPiece; ++i) {
      if (!(valid >> i & 1)) continue;
      sum += static_cast<double>(kl_value<E>(log_prob[i], ref[i], range));
      if (a.kl_coef != 0) d[i] += A(a.kl_coef) * kl_grad<E>(log_prob[i], ref[i], range, a.kl.straight_through);
    }
  });
  return sum;
}
// Importance weights (a Column), the KL term and the entropy term of a piece's valid tokens.
template <class S, class Weights>
__device__ __forceinline__ void extra_terms(const PolicyLossArgs& a, const KlRange<ArithmeticOf<S>>& range, const Loaded<S>& log_prob, const Loaded<S>& ref,
                                            const Loaded<S>& entropy, const Weights& weights, const Loaded<S>& w, unsigned valid, double weight,
                                            ArithmeticOf<S> (&value)[Stored<S>::kPiece], ArithmeticOf<S> (&d)[Stored<S>::kPiece],
                                            PolicySums<ArithmeticOf<S>>& sums) {
  using A = ArithmeticOf<S>;
#pragma unroll
  for (int i = 0; i < Stored<S>::kPiece; ++i) {
    if (!a.weights || !(valid >> i & 1)) continue;
    const A factor = weights.value(w, i);
    value[i] *= factor, d[i] *= factor;
  }
  if (a.ref_log_prob) sums.kl = fused(weight, kl_term<S>(a, range, log_prob, ref, valid, d), sums.kl);
  if (a.entropy) {
    double bonus = 0;
#pragma unroll
    for (int i = 0; i < Stored<S>::kPiece; ++i)
      if (valid >> i & 1) bonus += static_cast<double>(entropy[i]);
    sums.entropy = fused(weight, bonus, sums.entropy);
  }
}

// f(Stored's argument) for the operands of a policy loss. What is one number a row has no say, nor a half's gradient in float32.
template <class F>
void with_policy_storage(F&& f, const PolicyLossArgs& a) {
  const bool half = size_of(a.log_prob.dtype) == 2;
  const auto grad = [&](const Operand& d) { return half && d.dtype == Dtype::f32 ? Operand{} : d; };
  const auto wide = [](const Operand& x) { return x && !x.inner_stride && x.dtype == Dtype::f64; };
  if (a.log_prob.dtype != Dtype::f64 && (wide(a.advantages) || wide(a.weights))) return f(Mixed<double>{});  // in its arithmetic
  with_storage(f, a.log_prob, a.old_log_prob, tokens_of(a.advantages), tokens_of(a.weights), a.ref_log_prob, a.entropy, grad(a.d_log_prob), grad(a.d_entropy));
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
