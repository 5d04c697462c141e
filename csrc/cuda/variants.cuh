// SPDX-License-Identifier: Apache-2.0
// What the kernels of policy_loss's variants share: a piece as it is read, and all that is made of it.
#pragma once
#include "../math/variants.h"
#include "policy.cuh"

namespace rlkern {
namespace RLKERN_ISA {

void policy_variant_rows(const PolicyVariantArgs& a);  // where a ratio or a weight is the row's

// A row's operands, and a piece of them as it was loaded.
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
  const RowOr<S> advantages, weights;
  __device__ __forceinline__ VariantReader(const PolicyVariantArgs& args, const Rows& of, const Section& s)
      : a(args), rows(of), row(s.row), advantages(args.advantages, of, s), weights(args.weights, of, s) {}
  __device__ __forceinline__ Loaded<S> piece(const Operand& x, const Piece& p) const { return load<S>(x, rows.base(x, row), p); }
  // All but both log-probs.
  __device__ __forceinline__ void others(VariantPiece<S>& x, const Piece& p) const {
    x.advantage = advantages.piece(p), x.weight = weights.piece(p);
    x.ref = piece(a.ref_log_prob, p), x.entropy = piece(a.entropy, p), x.behave = piece(a.behave, p);
    if (a.selected) x.marked = valid_bits<N>(a.selected, rows.base(a.selected, row), p);
  }
};

// The derivatives of a piece's valid tokens; what goes through the ratio is added to `sent` if the row's tokens share it. What
// adds up goes into `sums`, by the row's weight, if this is the look that counts. A kind is a branch that all threads take alike.
template <class S, class A = ArithmeticOf<S>>
__device__ __forceinline__ void variant_tokens(const VariantFrame<A>& frame, const VariantOfRow<A>& of_row, const VariantReader<S>& reader,
                                               const VariantPiece<S>& x, unsigned valid, double weight, bool shares, bool counts, A (&own)[Stored<S>::kPiece],
                                               double& sent, PolicySums<A>& sums) {
  constexpr int N = Stored<S>::kPiece;
  const PolicyVariantArgs& a = reader.a;
  A ratio[N] = {};
  unsigned blocked = 0;
  double loss = 0;
  with_kind(a.kind, [&](auto kind) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (!(valid >> i & 1)) continue;
      const VariantSeen<A> t{x.log_prob[i], x.old_log_prob[i],   reader.advantages.value(x.advantage, i), reader.weights.value(x.weight, i),
                             x.behave[i],   A(x.marked >> i & 1)};
      const auto s = variant_step<decltype(kind)::value>(frame, of_row, t);
      ratio[i] = s.ratio, blocked |= (s.blocked ? 1u : 0u) << i, own[i] = s.own;
      if (shares) sent += static_cast<double>(s.through);
      else own[i] += s.through;
      if (!counts) continue;
      loss += static_cast<double>(s.loss), sums.clipped += s.clipped, sums.lower += s.lower;
      sums.see(s.raw, s.x, s.loss);
    }
  });
  sums.loss = fused(weight, loss, sums.loss);
  if (a.ref_log_prob) {
    double kl = 0;
    with_estimator(a.kl.estimator, [&](auto e) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (!(valid >> i & 1)) continue;
        A through = 0;
        kl += static_cast<double>(variant_kl<decltype(e)::value>(frame, of_row, x.log_prob[i], x.ref[i], ratio[i], (blocked >> i & 1) != 0, own[i], through));
        if (shares) sent += static_cast<double>(through);
        else own[i] += through;
      }
    });
    if (counts) sums.kl = fused(weight, kl, sums.kl);
  }
  if (a.entropy && counts) {
    double bonus = 0;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (valid >> i & 1) bonus += static_cast<double>(x.entropy[i]);
    sums.entropy = fused(weight, bonus, sums.entropy);
  }
}

// One number at the valid tokens of a piece.
template <class S>
__device__ __forceinline__ void store_number(const Operand& x, int64_t base, const Piece& p, unsigned valid, ArithmeticOf<S> value) {
  ArithmeticOf<S> d[Stored<S>::kPiece];
#pragma unroll
  for (int i = 0; i < Stored<S>::kPiece; ++i) d[i] = valid >> i & 1 ? value : ArithmeticOf<S>(0);
  store_grad<S>(x, base, p, d);
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
