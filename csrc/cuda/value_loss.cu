// SPDX-License-Identifier: Apache-2.0
// Value loss, in the manner of policy_loss.cu.
#include "loss.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

// plan value_loss_kernel: as policy_loss_kernel. Bytes per element: vpreds, returns, values (if there is a clip) and mask read
//   once, the gradient written once; what is not valid is read of the mask alone.
// budget value_loss_kernel<S>: 80 registers, loads 3, stores 1
template <class S>
__global__ void __launch_bounds__(kLossThreads, 3) value_loss_kernel(const ValueLossArgs a, const Cut cut, ValueTotals* parts) {
  using A = ArithmeticOf<S>;
  constexpr int N = Stored<S>::kPiece;
  RLKERN_DYNAMIC_SHARED(uint16_t, words);
  const KeptMask kept(a.mask, cut, words);
  MaskCount counts;
  if (cut.first) counts = count_first<S>(cut, a.vpreds, kept);
  const AggWeights agg(with_counts(a.agg), counts.tokens, counts.sequences);
  const A range = A(a.range), delta = A(a.delta);
  MaskCount seen;
  double loss = 0, predictions = 0;
  unsigned clipped = 0, bad = 0;
  A far = 0;
  each_section<S>(cut, a.vpreds, [&](const Section& s) {
    const double weight = agg.mean_of_row ? agg.row(tokens_of_row<N>(s, kept)) : 1;
    const A g = A(agg.scale * weight);
    const int64_t base = cut.rows.base(a.vpreds, s.row);
    int64_t tokens = 0;
    int64_t k = s.begin + lane();
    unsigned next = k < s.end ? kept.bits<N>(s, k) : 0;
    for (; k < s.end; k += kWarp) {
      const Piece p = piece_of<N>(k, s.lead, s.length);
      const unsigned valid = next;
      Loaded<S> vpreds{}, returns{}, values{};
      if (valid) {
        vpreds = load<S>(a.vpreds, base, p);
        returns = load<S>(a.returns, cut.rows.base(a.returns, s.row), p);
        values = load<S>(a.values, cut.rows.base(a.values, s.row), p);
      }
      if (k + kWarp < s.end) next = kept.bits<N>(s, k + kWarp);
      A d[N] = {};
      double of_piece = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (!(valid >> i & 1)) continue;
        const A vpred = vpreds[i], ret = returns[i];
        const auto t = value_token(vpred, ret, a.values ? values[i] : A(0), range, delta);
        d[i] = t.grad * g;
        of_piece += static_cast<double>(t.loss), predictions += static_cast<double>(vpred);
        clipped += t.clipped, bad += t.loss - t.loss == A(0) ? 0 : 1;
        far = Ops<A>::at_least(far, Ops<A>::magnitude(vpred - ret));  // a NaN is left out
      }
      loss = fused(weight, of_piece, loss), tokens += __popc(valid);
      if (a.d_vpreds) store_grad<S>(a.d_vpreds, cut.rows.base(a.d_vpreds, s.row), p, d);
    }
    if (!cut.first) {
      tokens = warp_fold(tokens, add_tokens);
      if (lane() == 0) note(cut, s.row, tokens, seen);
    }
  });
  ValueTotals mine;
  mine.tokens = seen.tokens, mine.sequences = seen.sequences, mine.clipped = clipped, mine.predictions = predictions;
  mine.loss = loss, mine.nonfinite = bad, mine.far = static_cast<double>(far);
  finish_loss(cut, mine, counts, parts, [&](const ValueTotals& t) {
    const AggWeights all(with_counts(a.agg), t.tokens, t.sequences);
    put_value(a, t, all.scale, PutNumber{});
  });
}

template <class S>
void value_as(const ValueLossArgs& a) {
  const bool count = a.agg.mode == Agg::seq_mean_token_mean || (a.d_vpreds && counts_first(a.agg));
  const auto g = loss_grid<S, ValueTotals>("value_loss", a.place, a.rows, a.vpreds, count, value_loss_kernel<S>);
  launch("value_loss", a.place, g.grid, value_loss_kernel<S>, a, g.cut, g.parts);
}

}  // namespace

double value_loss(const ValueLossArgs& a) {
  const Operand& d = a.d_vpreds;
  const bool half = size_of(a.vpreds.dtype) == 2 && d.dtype == Dtype::f32;
  with_storage([&](auto s) { value_as<decltype(s)>(a); }, a.vpreds, a.returns, a.values, half ? Operand{} : d);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
