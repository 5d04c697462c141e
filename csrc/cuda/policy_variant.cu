// SPDX-License-Identifier: Apache-2.0
// The variants of the policy loss whose ratio and weights are the token's own; the others: policy_variant_rows.cu.
#include "variants.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

// plan policy_variant_kernel: as policy_loss_kernel: a warp owns sections of rows, the mask is counted first where a gradient
//   needs that. The kind and the estimator are branches that all threads take alike, so that eleven kinds are one kernel. Bytes
//   per element: each operand and the mask read once, each gradient written once. Numerics: tokens by csrc/math/variants.h; sums
//   in float64, in one order.
// budget policy_variant_kernel<double>: 192 registers, loads 6, stores 2
// budget policy_variant_kernel<Mixed_double>: 176 registers, loads 0, stores 0
// budget policy_variant_kernel<__nv_bfloat16>: 216 registers, loads 6, stores 2
// budget policy_variant_kernel<S>: 128 registers, loads 6, stores 2
template <class S>
__global__ void __launch_bounds__(kLossThreads, kPolicyBlocks<S>)
    policy_variant_kernel(const PolicyVariantArgs a, const Cut cut, const VariantFrame<ArithmeticOf<S>> frame, PolicyTotals* parts) {
  using A = ArithmeticOf<S>;
  constexpr int N = Stored<S>::kPiece;
  RLKERN_DYNAMIC_SHARED(uint16_t, words);
  const KeptMask kept(a.mask, cut, words);
  MaskCount counts, seen;
  if (cut.first) counts = count_first<S>(cut, a.log_prob, kept, seen);
  const AggWeights agg(with_counts(a.agg), static_cast<double>(counts.tokens), static_cast<double>(counts.sequences));
  const VariantOfRow<A> none{VariantRow{}};
  PolicySums<A> sums;
  each_section<S>(cut, a.log_prob, [&](const Section& s) {
    const double weight = agg.mean_of_row ? agg.row(tokens_of_row<N>(s, kept)) : 1;
    const A g = A(agg.scale * weight);
    const VariantReader<S> reader(a, cut.rows, s);
    const GradColumn<S> d_log_prob(a.d_log_prob, cut.rows, s), d_entropy(a.d_entropy, cut.rows, s);
    int64_t k = s.begin + lane();
    unsigned tokens = 0;
    for (unsigned next = k < s.end ? kept.bits<N>(s, k) : 0; k < s.end; k += kWarp) {
      const Piece p = piece_of<N>(k, s.lead, s.length);
      const unsigned valid = next;
      VariantPiece<S> x;
      if (valid) reader.log_probs(x, p), reader.others(x, k, p);
      if (k + kWarp < s.end) next = kept.bits<N>(s, k + kWarp);
      A own[N] = {};
      double sent = 0;
      if (valid) variant_tokens<S>(frame, none, reader, x, valid, weight, false, true, own, sent, sums), tokens += __popc(valid);
#pragma unroll
      for (int i = 0; i < N; ++i) own[i] = valid >> i & 1 ? own[i] * g : A(0);
      if (a.d_log_prob) d_log_prob.put(p, own);
      if (a.d_entropy) put_number(d_entropy, p, valid, A(-a.entropy_coeff * static_cast<double>(g)));
    }
    note_section(cut, s, tokens, seen);
  });
  finish_loss(cut, sums.totals(seen), parts, [&](const PolicyTotals& t) {
    const AggWeights all(with_counts(a.agg), t.tokens, t.sequences);
    put_policy(a, t, all.scale, a.clip.clamp, PutNumber{});
  });
}

template <class S>
void tokens_as(const PolicyVariantArgs& a) {
  const bool count = a.agg.mode == Agg::seq_mean_token_mean || ((a.d_log_prob || a.d_entropy) && counts_first(a.agg));
  const auto g = loss_grid<S, PolicyTotals>("policy_loss", a.place, a.rows, a.log_prob, count, policy_variant_kernel<S>);
  launch("policy_loss", a.place, g.grid, policy_variant_kernel<S>, a, g.cut, VariantFrame<ArithmeticOf<S>>(a), g.parts);
}

}  // namespace

double policy_variant(const PolicyVariantArgs& a) {
  if (of_row(a.kind, a.level)) policy_variant_rows(a);
  else with_variant_storage([&](auto s) { tokens_as<decltype(s)>(a); }, a);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
