// SPDX-License-Identifier: Apache-2.0
// What the kernels of policy_loss's variants share: a piece as it is read, and all that is made of it.
#pragma once
#include "../math/variants.h"
#include "policy.cuh"

namespace rlkern {
namespace RLKERN_ISA {

void policy_variant_rows(const PolicyVariantArgs& a);  // where a ratio or a weight is the row's

// A piece as it was loaded, and the operands of its row.
template <class S>
struct VariantPiece {
  Loaded<S> log_prob{}, old_log_prob{}, advantage{}, weight{}, ref{}, entropy{}, behave{};
  unsigned marked = 0;
};
template <class S>
struct VariantReader {
  static constexpr int N = Stored<S>::kPiece;
  const PolicyVariantArgs& a;
  const Rows& rows;
  const int64_t row;
  const Column<S, true> advantages, weights;
  __device__ __forceinline__ VariantReader(const PolicyVariantArgs& args, const Rows& of, const Section& s)
      : a(args), rows(of), row(s.row), advantages(args.advantages, of, s), weights(args.weights, of, s) {}
  // Where they lie is found again for each piece: addresses kept would cost registers.
  __device__ __forceinline__ void log_probs(VariantPiece<S>& x, const Piece& p) const {
    x.log_prob = load<S>(a.log_prob, rows.base(a.log_prob, row), p), x.old_log_prob = load<S>(a.old_log_prob, rows.base(a.old_log_prob, row), p);
  }
  __device__ __forceinline__ void others(VariantPiece<S>& x, int64_t k, const Piece& p) const {
    x.advantage = advantages.piece(k, p), x.weight = weights.piece(k, p);
    x.ref = load<S>(a.ref_log_prob, rows.base(a.ref_log_prob, row), p), x.entropy = load<S>(a.entropy, rows.base(a.entropy, row), p);
    x.behave = load<S>(a.behave, rows.base(a.behave, row), p);
    if (a.selected) x.marked = valid_bits<N>(a.selected, rows.base(a.selected, row), p);
  }
};

// The KL and entropy terms of a piece's valid tokens. What the ratio has in them is found again: numbers kept from the kinds
// would cost registers in every call.
template <class S, class A = ArithmeticOf<S>>
__device__ __forceinline__ void variant_extras(const VariantFrame<A>& frame, const VariantOfRow<A>& of_row, const PolicyVariantArgs& a,
                                               const VariantPiece<S>& x, unsigned valid, double weight, bool shares, bool counts, A (&own)[Stored<S>::kPiece],
                                               double& sent, PolicySums<A>& sums) {
  constexpr int N = Stored<S>::kPiece;
  if (a.entropy && counts) {
    double bonus = 0;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (valid >> i & 1) bonus += static_cast<double>(x.entropy[i]);
    sums.entropy = fused(weight, bonus, sums.entropy);
  }
  if (!a.ref_log_prob) return;
  double kl = 0;
  with_estimator(a.kl.estimator, [&](auto e) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (!(valid >> i & 1)) continue;
      A ratio = 0, through = 0;
      bool blocked = false;
      if (frame.by_ratio) {
        const A raw = x.log_prob[i] - x.old_log_prob[i], inside = clamped(raw, -frame.clamp, frame.clamp);
        ratio = variant_ratio(frame, of_row, inside), blocked = inside < raw || inside > raw;
      }
      kl += static_cast<double>(variant_kl<decltype(e)::value>(frame, of_row, x.log_prob[i], x.ref[i], ratio, blocked, own[i], through));
      if (shares) sent += static_cast<double>(through);
      else own[i] += through;
    }
  });
  if (counts) sums.kl = fused(weight, kl, sums.kl);
}

// The derivatives of a piece's valid tokens; what goes through the ratio is added to `sent` if the row's tokens share it. What
// adds up goes into `sums`, by the row's weight, if this is the look that counts. A kind is a branch that all threads take alike.
template <class S, class A = ArithmeticOf<S>>
__device__ __forceinline__ void variant_tokens(const VariantFrame<A>& frame, const VariantOfRow<A>& of_row, const VariantReader<S>& reader,
                                               const VariantPiece<S>& x, unsigned valid, double weight, bool shares, bool counts, A (&own)[Stored<S>::kPiece],
                                               double& sent, PolicySums<A>& sums) {
  variant_extras<S>(frame, of_row, reader.a, x, valid, weight, shares, counts, own, sent, sums);
  double loss = 0;
  with_kind(reader.a.kind, [&](auto kind) {
#pragma unroll
    for (int i = 0; i < Stored<S>::kPiece; ++i) {
      if (!(valid >> i & 1)) continue;
      const VariantSeen<A> t{x.log_prob[i], x.old_log_prob[i],   reader.advantages.value(x.advantage, i), reader.weights.value(x.weight, i),
                             x.behave[i],   A(x.marked >> i & 1)};
      const auto s = variant_step<decltype(kind)::value>(frame, of_row, t);
      own[i] += s.own;
      if (shares) sent += static_cast<double>(s.through);
      else own[i] += s.through;
      if (!counts) continue;
      loss += static_cast<double>(s.loss), sums.clipped += s.clipped, sums.lower += s.lower;
      sums.bad += s.loss - s.loss == A(0) ? 0 : 1, sums.see(s.raw, s.x, true);
    }
  });
  sums.loss = fused(weight, loss, sums.loss);
}

// One number at the valid tokens of a piece.
template <class S>
__device__ __forceinline__ void put_number(const GradColumn<S>& to, const Piece& p, unsigned valid, ArithmeticOf<S> value) {
  ArithmeticOf<S> d[Stored<S>::kPiece];
#pragma unroll
  for (int i = 0; i < Stored<S>::kPiece; ++i) d[i] = valid >> i & 1 ? value : ArithmeticOf<S>(0);
  to.put(p, d);
}

// f(Stored's argument) for the operands of a variant.
template <class F>
void with_variant_storage(F&& f, const PolicyVariantArgs& a) {
  if (!a.behave || a.behave.dtype == a.log_prob.dtype) return with_policy_storage(f, a);
  const auto wide = [](const Operand& x) { return x && x.dtype == Dtype::f64; };
  const bool any =
      wide(a.behave) || wide(a.log_prob) || wide(a.old_log_prob) || wide(a.advantages) || wide(a.weights) || wide(a.ref_log_prob) || wide(a.entropy);
  any ? f(Mixed<double>{}) : f(Mixed<float>{});
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
