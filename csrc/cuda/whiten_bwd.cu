// SPDX-License-Identifier: Apache-2.0
// Gradients of whitening: d_v = direct * G + weight * (level + slope * (v - mean)), its three numbers from the forward's
// moments and two sums over G.
#include "held.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

constexpr int kHalf = kInRegisters / 2;  // pieces in registers: of two operands

// plan whiten_bwd_kernel: as whiten_fwd_kernel: a grid over everything or a block a row. A thread holds two pieces of grad and
//   of values in registers and further ones in shared memory until sum(G) and sum(G (v - mean)) of all are known. Bytes per
//   element: grad, values and mask read once (the mask twice where it is not kept), the gradient written once; what the chip
//   cannot hold is read twice. Numerics: sums in float64, in a fixed order.
// budget whiten_bwd_kernel<S, false>: 128 registers, loads 6, stores 3
// budget whiten_bwd_kernel<S, true>: 128 registers, loads 6, stores 3
template <class S, bool ByRow>
__global__ void __launch_bounds__(kHeldThreads, kHeldBlocks) whiten_bwd_kernel(const WhitenGradArgs a, const Tiling tiling, const int in_shared, Pair* parts) {
  using A = ArithmeticOf<S>;
  constexpr int N = Stored<S>::kPiece;
  const Walk<S, ByRow> walk{tiling, a.values};
  using Spot = typename Walk<S, ByRow>::Spot;
  RLKERN_DYNAMIC_SHARED(Loaded<S>, more);
  const int64_t r = ByRow ? blockIdx.x : 0;
  const Moments m = moments_at(a.moments, r);
  const double mean = a.at_least_one ? over_at_least_one(m).mean : m.mean;
  const bool masked = a.options.mask_output;

  Loaded<S> grad[kHalf] = {}, values[kHalf] = {};
  const auto look = [&](const Spot& s, Loaded<S>& g, Loaded<S>& v) {
    if (!s.there) return;
    g = load<S>(a.grad, walk.base(a.grad, s.row), s.piece);
    v = load<S>(a.values, walk.base(a.values, s.row), s.piece);
  };
  Pair sums;
  const auto add = [&](const Spot& s, const Loaded<S>& g, const Loaded<S>& v) {
    if (!s.there) return;
    const unsigned used = masked ? valid_bits<N>(a.mask, walk.base(a.mask, s.row), s.piece) : (1u << s.piece.end) - (1u << s.piece.begin);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const double y = static_cast<double>(g[i]);
      if (!(used >> i & 1) || y == 0) continue;  // a NaN that G does not ask about stays where it is
      sums.a += y, sums.b = fused(y, static_cast<double>(v[i]) - mean, sums.b);
    }
  };
#pragma unroll
  for (int j = 0; j < kHalf; ++j) look(walk.at(j), grad[j], values[j]);
#pragma unroll
  for (int j = 0; j < kHalf; ++j) add(walk.at(j), grad[j], values[j]);
  for (int64_t j = kHalf;; ++j) {
    const Spot s = walk.at(j);
    if (s.past) break;
    if (!s.there) continue;
    Loaded<S> g{}, v{};
    look(s, g, v);
    add(s, g, v);
    const int64_t slot = 2 * (j - kHalf) * kHeldThreads + threadIdx.x;
    if (j < kHalf + in_shared) more[slot] = g, more[slot + kHeldThreads] = v;
  }
  const Pair all = scope_fold<ByRow>(sums, parts, Pair{}, plus);
  WhitenGrad f = whiten_grad(m, a.options, a.at_least_one, all.a, all.b);
  if (threadIdx.x == 0 && (ByRow || blockIdx.x == 0)) put_moments(a.d_moments, r, {0, f.d_mean, f.d_m2});
  if (a.given) f.level = f.slope = 0;
  if (!a.d_values) return;

  const bool inner = f.level != 0 || f.slope != 0;
  const A high = A(mean), low = A(mean - static_cast<double>(high)), direct = A(f.direct), level = A(f.level), slope = A(f.slope);
  const auto finish = [&](const Spot& s, const Loaded<S>& g, const Loaded<S>& v) {
    const int64_t base = walk.base(a.mask, s.row);
    const Bits bits = inner || masked ? mask_bits<N>(a.mask, base, s.piece) : Bits{};
    A d[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool valid = bits.valid >> i & 1;
      d[i] = A(0);
      if (inner && valid) {
        d[i] = slope == A(0) ? level : fused(slope, (v[i] - high) - low, level);
        if (bits.weighs) d[i] *= element<A>(a.mask, base + (s.piece.first + i) * a.mask.inner_stride);
      }
      if (!masked || valid) d[i] = fused(direct, g[i], d[i]);  // `direct` may be NaN
    }
    store<S>(a.d_values, walk.base(a.d_values, s.row), s.piece, d);
  };
#pragma unroll
  for (int j = 0; j < kHalf; ++j) {
    const Spot s = walk.at(j);
    if (s.there) finish(s, grad[j], values[j]);
  }
  for (int64_t j = kHalf;; ++j) {
    const Spot s = walk.at(j);
    if (s.past) break;
    if (!s.there) continue;
    const int64_t slot = 2 * (j - kHalf) * kHeldThreads + threadIdx.x;
    Loaded<S> g{}, v{};
    if (j < kHalf + in_shared) g = more[slot], v = more[slot + kHeldThreads];
    else look(s, g, v);
    finish(s, g, v);
  }
}

template <class S, bool ByRow>
void whiten_bwd_as(const char* op, const WhitenGradArgs& a) {
  const Tiling t = ByRow ? Tiling{a.rows, 0} : tiling_of<S>(a.rows, a.values, a.grad, a.mask, a.d_values);
  const HeldGrid h = held_grid<ByRow>(op, a.place, t, 2 * sizeof(Loaded<S>), whiten_bwd_kernel<S, ByRow>, kHalf);
  Pair* const parts = ByRow ? nullptr : room_for<Pair>(op, a.place, h.grid.blocks);
  launch(op, a.place, h.grid, whiten_bwd_kernel<S, ByRow>, a, t, h.in_shared, parts);
}

}  // namespace

double whiten_bwd(const WhitenGradArgs& a) {
  const char* const op = a.given ? "whiten_apply" : a.by_row ? "masked_normalize" : "masked_whiten";
  with_storage<false>([&](auto s) { a.by_row ? whiten_bwd_as<decltype(s), true>(op, a) : whiten_bwd_as<decltype(s), false>(op, a); }, a.values, a.grad,
                      a.d_values);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
