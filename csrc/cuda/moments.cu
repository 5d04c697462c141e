// SPDX-License-Identifier: Apache-2.0
// Masked sums, means, variances and moments, and their gradients.
#include "moments.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

__device__ __forceinline__ Part added(Part x, const Part& y) {  // of sums, which `mean` holds
  x.moments.count += y.moments.count, x.moments.mean += y.moments.mean, x.weighs += y.weighs;
  return x;
}

// plan masked_reduce_kernel: a grid of at most as many blocks as the chip holds, or a block a row. A thread adds every so
//   many-th piece of 16 bytes; the blocks' parts are folded in order behind a barrier of the grid. Bytes per element: values
//   and mask read once. Numerics: float64; moments as in whitening, sums as they are; a mask of weights is swept again.
// budget masked_reduce_kernel<S, false, false>: 128 registers, loads 1, stores 0
// budget masked_reduce_kernel<S, true, false>: 128 registers, loads 1, stores 0
// budget masked_reduce_kernel<S, false, true>: 128 registers, loads 1, stores 0
// budget masked_reduce_kernel<S, true, true>: 128 registers, loads 1, stores 0
template <class S, bool ByRow, bool Sum>
__global__ void __launch_bounds__(kHeldThreads, kHeldBlocks) masked_reduce_kernel(const ReduceArgs a, const Tiling tiling, Part* parts) {
  constexpr int N = Stored<S>::kPiece;
  const Walk<S, ByRow> walk{tiling, a.values};
  ShiftedSums sums;
  Part mine;
  for (int64_t j = 0;; ++j) {
    const auto s = walk.at(j);
    if (s.past) break;
    if (!s.there) continue;
    const auto v = load<S>(a.values, walk.base(a.values, s.row), s.piece);
    const Bits b = mask_bits<N>(a.mask, walk.base(a.mask, s.row), s.piece);
    if (b.weighs) mine.weighs = 1;
    Pair of_piece;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (b.valid >> i & 1) of_piece.a += static_cast<double>(v[i]), of_piece.b += 1;
    if constexpr (Sum) {
      mine.moments.mean += of_piece.a, mine.moments.count += of_piece.b;
    } else {
      if (!sums.centered) sums.center_on(of_piece);
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (b.valid >> i & 1) sums.add(static_cast<double>(v[i]));
    }
  }
  Part all;
  if constexpr (Sum) {
    all = scope_fold<ByRow>(mine, parts, Part{}, added);
  } else {
    mine.moments = sums.moments();
    all = scope_fold<ByRow>(mine, parts, Part{}, merged);
  }
  const Moments m = all.weighs != 0 ? weighed<S, ByRow>(a.values, a.mask, !Sum, walk, parts) : all.moments;
  if (threadIdx.x != 0 || (!ByRow && blockIdx.x != 0)) return;
  const int64_t r = ByRow ? blockIdx.x : 0;
  put_moments(a.moments, r, m);
  if (a.result)
    set_element(a.result, r * a.result.inner_stride, Sum ? reduced(a.kind, m.count, m.mean, 0, false) : reduced(a.kind, m.count, 0, m.m2, a.unbiased));
}

template <class S, bool ByRow, bool Sum>
void reduce_as(const char* op, const ReduceArgs& a) {
  const Tiling t = ByRow ? Tiling{a.rows, 0} : tiling_of<S>(a.rows, a.values, a.mask);
  const HeldGrid h = held_grid<ByRow>(op, a.place, t, 0, masked_reduce_kernel<S, ByRow, Sum>);
  Part* const parts = ByRow ? nullptr : room_for<Part>(op, a.place, 3 * h.grid.blocks);
  launch(op, a.place, h.grid, masked_reduce_kernel<S, ByRow, Sum>, a, t, parts);
}

// plan masked_reduce_bwd_kernel: a thread a piece, or a block a row. Bytes per element: values (of a variance) and mask read
//   once, the gradient written once; the cotangent is one number, or one a row.
// budget masked_reduce_bwd_kernel<S, false>: 80 registers, loads 1, stores 1
// budget masked_reduce_bwd_kernel<S, true>: 80 registers, loads 1, stores 1
template <class S, bool ByRow>
__global__ void __launch_bounds__(kHeldThreads, kHeldBlocks) masked_reduce_bwd_kernel(const ReduceGradArgs a, const Tiling tiling) {
  using A = ArithmeticOf<S>;
  constexpr int N = Stored<S>::kPiece;
  const Walk<S, ByRow> walk{tiling, a.d_values};
  const int64_t r = ByRow ? blockIdx.x : 0;
  const Moments m = a.moments ? moments_at(a.moments, r) : Moments{};
  WhitenGrad g;
  if (a.kind != Reduce::moments) {
    g = reduced_grad(a.kind, m.count, element<double>(a.grad, r * a.grad.inner_stride), a.unbiased);
  } else {
    const Moments d = moments_at(a.grad, r);
    g.level = m.count == 0 ? 0 : d.mean / m.count, g.slope = 2 * d.m2;
  }
  const A high = A(m.mean), low = A(m.mean - static_cast<double>(high)), level = A(g.level), slope = A(g.slope);
  for (int64_t j = 0;; ++j) {
    const auto s = walk.at(j);
    if (s.past) break;
    if (!s.there) continue;
    Loaded<S> v{};
    if (slope != A(0)) v = load<S>(a.values, walk.base(a.values, s.row), s.piece);
    const int64_t base = walk.base(a.mask, s.row);
    const Bits bits = mask_bits<N>(a.mask, base, s.piece);
    A d[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      d[i] = A(0);
      if (!(bits.valid >> i & 1) || (level == A(0) && slope == A(0))) continue;
      d[i] = slope == A(0) ? level : fused(slope, (v[i] - high) - low, level);
      if (bits.weighs) d[i] *= element<A>(a.mask, base + (s.piece.first + i) * a.mask.inner_stride);
    }
    store<S>(a.d_values, walk.base(a.d_values, s.row), s.piece, d);
  }
}

template <class S, bool ByRow>
void reduce_bwd_as(const char* op, const ReduceGradArgs& a) {
  const Tiling t = ByRow ? Tiling{a.rows, 0} : tiling_of<S>(a.rows, a.d_values, a.values, a.mask);
  launch(op, a.place, {ByRow ? a.rows.count : t.blocks(), kHeldThreads}, masked_reduce_bwd_kernel<S, ByRow>, a, t);
}

const char* name_of(Reduce kind) {
  return kind == Reduce::sum ? "masked_sum" : kind == Reduce::mean ? "masked_mean" : kind == Reduce::var ? "masked_var" : "masked_moments";
}

}  // namespace

// The count where there is one for all rows, emulated.
double masked_reduce(const ReduceArgs& a) {
  ReduceArgs with = a;
  double kept[3] = {};
  if (kEmulated && !a.moments && !a.by_row) with.moments = Operand{kept, Dtype::f64, 1, 3, 0, 1};
  with_storage<false>(
      [&](auto s) {
        using S = decltype(s);
        const bool sum = a.kind == Reduce::sum || a.kind == Reduce::mean;
        const char* const op = name_of(a.kind);
        if (a.by_row) sum ? reduce_as<S, true, true>(op, with) : reduce_as<S, true, false>(op, with);
        else sum ? reduce_as<S, false, true>(op, with) : reduce_as<S, false, false>(op, with);
      },
      a.values);
  return kEmulated && !a.by_row ? static_cast<const double*>(with.moments.data)[0] : 0;
}
double masked_reduce_bwd(const ReduceGradArgs& a) {
  with_storage<false>([&](auto s) { a.by_row ? reduce_bwd_as<decltype(s), true>(name_of(a.kind), a) : reduce_bwd_as<decltype(s), false>(name_of(a.kind), a); },
                      a.d_values, a.values);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
