// SPDX-License-Identifier: Apache-2.0
// Policy loss: the value, the gradient already scaled by the aggregation, and the metrics.
#include "policy.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

// The loss of a piece's tokens and, in d, its slopes; what is not valid has 0 for log-ratio and advantage.
template <int N, class A>
__device__ __forceinline__ void policy_tokens(const A (&raw)[N], const A (&advantage)[N], unsigned valid, const PolicyClip<A>& clip, A (&value)[N], A (&d)[N],
                                              PolicySums<A>& sums) {
  bool beyond = false;
#pragma unroll
  for (int i = 0; i < N; ++i) beyond |= Ops<A>::magnitude(raw[i]) > clip.usual;
  if (!beyond) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const auto t = policy_token_usual(raw[i], advantage[i], clip);
      value[i] = t.loss, d[i] = t.clipped ? A(0) : t.loss;
      sums.clipped += t.clipped, sums.see(raw[i], raw[i], valid >> i & 1);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const auto t = policy_token(raw[i], advantage[i], clip);
    value[i] = t.loss, d[i] = t.blocked ? A(0) : t.slope;
    sums.clipped += t.above | t.below, sums.lower += t.lower, sums.see(raw[i], t.x, valid >> i & 1);
  }
}

// plan policy_loss_kernel: at most as many blocks as run at once; a warp owns sections of rows, a lane of it every 32nd piece
//   of 16 bytes. Where a gradient needs what only the whole mask can tell, the grid is cooperative: it first reads the mask,
//   keeps a bit a token in shared memory (beyond 12 KiB a block the mask is read again) and meets once. Then each piece is
//   loaded whole, before the first of it is used, and what is not valid at all is not loaded. Bytes per element: each operand
//   and the mask read once, each gradient written once. Numerics: tokens by csrc/math/loss.h; sums in float64, of a thread, a
//   warp, a block, and of all blocks by the last to finish, which writes the results: one order.
// budget policy_loss_kernel<double, false>: 160 registers, loads 3, stores 1
// budget policy_loss_kernel<double, true>: 224 registers, loads 6, stores 2
// budget policy_loss_kernel<Mixed_double, true>: 168 registers, loads 0, stores 0
// budget policy_loss_kernel<__nv_bfloat16, true>: 216 registers, loads 6, stores 2
// budget policy_loss_kernel<S, false>: 128 registers, loads 3, stores 1
// budget policy_loss_kernel<S, true>: 128 registers, loads 6, stores 2
template <class S, bool Extra>
__global__ void __launch_bounds__(kLossThreads, kPolicyBlocks<S, Extra>)
    policy_loss_kernel(const PolicyLossArgs a, const Cut cut, const PolicyClip<ArithmeticOf<S>> clip, const KlRange<ArithmeticOf<S>> range,
                       PolicyTotals* parts) {
  using A = ArithmeticOf<S>;
  constexpr int N = Stored<S>::kPiece;
  constexpr bool kKeep = !Extra || N <= 4;  // eight tokens of everything leave no registers for it
  RLKERN_DYNAMIC_SHARED(uint16_t, words);
  const KeptMask kept(a.mask, cut, words);
  MaskCount counts, seen;
  if (cut.first) counts = count_first<S>(cut, a.log_prob, kept, seen);
  const AggWeights agg(with_counts(a.agg), static_cast<double>(counts.tokens), static_cast<double>(counts.sequences));
  PolicySums<A> sums;
  each_section<S>(cut, a.log_prob, [&](const Section& s) {
    const double weight = agg.mean_of_row ? agg.row(tokens_of_row<N>(s, kept)) : 1;
    const A g = A(agg.scale * weight);
    const Column<S, false, kKeep> log_prob(a.log_prob, cut.rows, s), old_log_prob(a.old_log_prob, cut.rows, s);
    const Column<S, true, kKeep> advantages(a.advantages, cut.rows, s), weights(a.weights, cut.rows, s);
    const Column<S, false, false> ref(a.ref_log_prob, cut.rows, s), entropy(a.entropy, cut.rows, s);
    const GradColumn<S> d_log_prob(a.d_log_prob, cut.rows, s), d_entropy(a.d_entropy, cut.rows, s);
    int64_t k = s.begin + lane();
    unsigned tokens = 0;
    for (unsigned next = k < s.end ? kept.bits<N>(s, k) : 0; k < s.end; k += kWarp) {
      const Piece p = piece_of<N>(k, s.lead, s.length);
      const unsigned valid = next;
      Loaded<S> of_log_prob{}, of_old{}, of_advantage{}, of_weight{}, of_ref{}, of_entropy{};
      if (valid) {
        of_log_prob = log_prob.piece(k, p), of_old = old_log_prob.piece(k, p), of_advantage = advantages.piece(k, p);
        if (Extra) of_weight = weights.piece(k, p), of_ref = ref.piece(k, p), of_entropy = entropy.piece(k, p);
      }
      if (k + kWarp < s.end) next = kept.bits<N>(s, k + kWarp);
      A value[N], d[N] = {};
      if (valid) {
        A raw[N], advantage[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const bool there = valid >> i & 1;
          raw[i] = there ? log_prob.value(of_log_prob, i) - old_log_prob.value(of_old, i) : A(0);
          advantage[i] = there ? advantages.value(of_advantage, i) : A(0);
        }
        policy_tokens(raw, advantage, valid, clip, value, d, sums);
        if (Extra) extra_terms<S>(a, range, of_log_prob, of_ref, of_entropy, weights, of_weight, valid, weight, value, d, sums);
        sums.add(value, weight), tokens += __popc(valid);
#pragma unroll
        for (int i = 0; i < N; ++i) d[i] = valid >> i & 1 ? d[i] * g : A(0);
      }
      if (a.d_log_prob) d_log_prob.put(p, d);
      if (Extra && a.d_entropy) {
#pragma unroll
        for (int i = 0; i < N; ++i) d[i] = valid >> i & 1 ? A(-a.entropy_coeff * static_cast<double>(g)) : A(0);
        d_entropy.put(p, d);
      }
    }
    note_section(cut, s, tokens, seen);
  });
  finish_loss(cut, sums.totals(seen), parts, [&](const PolicyTotals& t) {
    const AggWeights all(with_counts(a.agg), t.tokens, t.sequences);
    put_policy(a, t, all.scale, a.clip.clamp, PutNumber{});
  });
}

template <class S, bool Extra>
void policy_as(const PolicyLossArgs& a) {
  using A = ArithmeticOf<S>;
  const bool count = a.agg.mode == Agg::seq_mean_token_mean || ((a.d_log_prob || a.d_entropy) && counts_first(a.agg));
  const auto g = loss_grid<S, PolicyTotals>("policy_loss", a.place, a.rows, a.log_prob, count, policy_loss_kernel<S, Extra>);
  launch("policy_loss", a.place, g.grid, policy_loss_kernel<S, Extra>, a, g.cut, PolicyClip<A>(a.clip), KlRange<A>(a.kl), g.parts);
}

}  // namespace

double policy_loss(const PolicyLossArgs& a) {
  const bool extra = a.weights || a.ref_log_prob || a.entropy;
  with_policy_storage([&](auto s) { extra ? policy_as<decltype(s), true>(a) : policy_as<decltype(s), false>(a); }, a);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
