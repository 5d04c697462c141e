// SPDX-License-Identifier: Apache-2.0
// Value loss, in the manner of policy_loss.cu.
#include "loss.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

// plan value_loss_kernel: as policy_loss_kernel. Bytes per element: vpreds, returns, values (if there is a clip) and mask read
//   once, the gradient written once; what is not valid is read of the mask alone.
// budget value_loss_kernel<S>: 128 registers, loads 3, stores 1
template <class S>
__global__ void __launch_bounds__(kLossThreads, 2) value_loss_kernel(const ValueLossArgs a, const Cut cut, ValueTotals* parts) {
  using A = ArithmeticOf<S>;
  constexpr int N = Stored<S>::kPiece;
  RLKERN_DYNAMIC_SHARED(uint16_t, words);
  const KeptMask kept(a.mask, cut, words);
  MaskCount counts, seen;
  if (cut.first) counts = count_first<S>(cut, a.vpreds, kept, seen);
  const AggWeights agg(with_counts(a.agg), static_cast<double>(counts.tokens), static_cast<double>(counts.sequences));
  const A range = A(a.range), delta = A(a.delta);
  double loss = 0, predictions = 0;
  unsigned clipped = 0, bad = 0;
  A far = 0;
  each_section<S>(cut, a.vpreds, [&](const Section& s) {
    const double weight = agg.mean_of_row ? agg.row(tokens_of_row<N>(s, kept)) : 1;
    const A g = A(agg.scale * weight);
    const Column<S> vpreds(a.vpreds, cut.rows, s), returns(a.returns, cut.rows, s), values(a.values, cut.rows, s);
    const GradColumn<S> d_vpreds(a.d_vpreds, cut.rows, s);
    int64_t k = s.begin + lane();
    unsigned tokens = 0;
    for (unsigned next = k < s.end ? kept.bits<N>(s, k) : 0; k < s.end; k += kWarp) {
      const Piece p = piece_of<N>(k, s.lead, s.length);
      const unsigned valid = next;
      Loaded<S> of_vpred{}, of_return{}, of_value{};
      if (valid) of_vpred = vpreds.piece(k, p), of_return = returns.piece(k, p), of_value = values.piece(k, p);
      if (k + kWarp < s.end) next = kept.bits<N>(s, k + kWarp);
      A d[N] = {};
      double of_piece = 0;
      if (valid) {
#pragma unroll
        for (int i = 0; i < N; ++i) {  // what is not valid is 0 in all of them
          const bool there = valid >> i & 1;
          const A vpred = there ? vpreds.value(of_vpred, i) : A(0), ret = there ? returns.value(of_return, i) : A(0);
          const auto t = value_token(vpred, ret, there ? values.value(of_value, i) : A(0), range, delta);
          d[i] = there ? t.grad * g : A(0);
          of_piece += static_cast<double>(t.loss), predictions += static_cast<double>(vpred);
          clipped += t.clipped, bad += t.loss - t.loss == A(0) ? 0 : 1;
          far = Ops<A>::at_least(far, Ops<A>::magnitude(vpred - ret));  // a NaN is left out
        }
        loss = fused(weight, of_piece, loss), tokens += __popc(valid);
      }
      if (a.d_vpreds) d_vpreds.put(p, d);
    }
    note_section(cut, s, tokens, seen);
  });
  ValueTotals mine;
  mine.tokens = static_cast<double>(seen.tokens), mine.sequences = static_cast<double>(seen.sequences), mine.clipped = clipped, mine.predictions = predictions;
  mine.loss = loss, mine.nonfinite = bad, mine.far = static_cast<double>(far);
  finish_loss(cut, mine, parts, [&](const ValueTotals& t) {
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
