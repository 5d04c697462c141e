// SPDX-License-Identifier: Apache-2.0
// Whitening: over everything in one launch and, as far as the chip holds the values, in one read; of each row; by given moments.
#include "moments.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

// plan whiten_fwd_kernel: everything (a grid of at most as many blocks as the chip holds, launched cooperatively) or one row a
//   block. A thread owns every so many-th piece of 16 bytes: the first four stay in its registers, further ones in shared
//   memory, with the mask's bits beside them, until count, mean and M2 of all are known; then they are scaled and written.
//   Bytes per element: values and mask read once, the result written once; of what the chip cannot hold, values (and, to mask
//   the output, the mask) are read twice. Numerics: float64 sums about a thread's first valid value, merged by Chan's rule in
//   a fixed order; a mask of weights takes two further sweeps.
// budget whiten_fwd_kernel<S, false>: 128 registers, loads 5, stores 5
// budget whiten_fwd_kernel<S, true>: 128 registers, loads 5, stores 5
template <class S, bool ByRow>
__global__ void __launch_bounds__(kHeldThreads, kHeldBlocks) whiten_fwd_kernel(const WhitenArgs a, const Tiling tiling, const int in_shared, Part* parts) {
  using A = ArithmeticOf<S>;
  constexpr int N = Stored<S>::kPiece;
  const Walk<S, ByRow> walk{tiling, a.values};
  RLKERN_DYNAMIC_SHARED(Loaded<S>, more);
  unsigned char* const more_bits = reinterpret_cast<unsigned char*>(more + in_shared * kHeldThreads);
  const bool masks = !a.given || a.options.mask_output;
  Loaded<S> held[kInRegisters] = {};
  Bits bits[kInRegisters];
  const auto look = [&](const typename Walk<S, ByRow>::Spot& s, Loaded<S>& v, Bits& b) {
    if (!s.there) return;
    v = load<S>(a.values, walk.base(a.values, s.row), s.piece);
    if (masks) b = mask_bits<N>(a.mask, walk.base(a.mask, s.row), s.piece);
  };
  ShiftedSums sums;
  Pair of_held;
  double weighs = 0;
  const auto add = [&](const Loaded<S>& v, const Bits& b) {
    if (b.weighs) weighs = 1;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (b.valid >> i & 1) sums.add(static_cast<double>(v[i]));
  };
#pragma unroll
  for (int j = 0; j < kInRegisters; ++j) look(walk.at(j), held[j], bits[j]);
#pragma unroll
  for (int j = 0; j < kInRegisters; ++j)
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (bits[j].valid >> i & 1) of_held.a += static_cast<double>(held[j][i]), of_held.b += 1;
  sums.center_on(of_held);
#pragma unroll
  for (int j = 0; j < kInRegisters; ++j) add(held[j], bits[j]);
  if (!a.given || in_shared)
    for (int64_t j = kInRegisters;; ++j) {
      const auto s = walk.at(j);
      if (s.past) break;
      if (!s.there) continue;
      Loaded<S> v{};
      Bits b;
      look(s, v, b);
      add(v, b);
      const int64_t slot = (j - kInRegisters) * kHeldThreads + threadIdx.x;
      if (j < kInRegisters + in_shared) more[slot] = v, more_bits[slot] = static_cast<unsigned char>(b.valid);
    }

  const int64_t r = ByRow ? blockIdx.x : 0;
  Moments m;
  if (a.given) {
    m = moments_at(a.moments, r);
  } else {
    const Part all = scope_fold<ByRow>(Part{sums.moments(), weighs}, parts, Part{}, merged);
    m = all.weighs != 0 ? weighed<S, ByRow>(a.values, a.mask, true, walk, parts) : all.moments;
    if (threadIdx.x == 0 && (ByRow || blockIdx.x == 0)) put_moments(a.moments, r, m);
  }
  if (!a.out) return;

  const WhitenScale<A, A> scale(a.at_least_one ? over_at_least_one(m) : m, a.options);
  const auto finish = [&](const typename Walk<S, ByRow>::Spot& s, const Loaded<S>& v, unsigned valid) {
    A y[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      y[i] = scale(v[i]);
      if (a.options.mask_output && !(valid >> i & 1)) y[i] = A(0);
    }
    store<S>(a.out, walk.base(a.out, s.row), s.piece, y);
  };
#pragma unroll
  for (int j = 0; j < kInRegisters; ++j) {
    const auto s = walk.at(j);
    if (s.there) finish(s, held[j], bits[j].valid);
  }
  for (int64_t j = kInRegisters;; ++j) {
    const auto s = walk.at(j);
    if (s.past) break;
    if (!s.there) continue;
    const int64_t slot = (j - kInRegisters) * kHeldThreads + threadIdx.x;
    if (j < kInRegisters + in_shared) {
      finish(s, more[slot], more_bits[slot]);
    } else {
      const unsigned valid = a.options.mask_output ? valid_bits<N>(a.mask, walk.base(a.mask, s.row), s.piece) : 0;
      finish(s, load<S>(a.values, walk.base(a.values, s.row), s.piece), valid);
    }
  }
}

template <class S, bool ByRow>
void whiten_as(const char* op, const WhitenArgs& a) {
  const Tiling t = ByRow ? Tiling{a.rows, 0} : tiling_of<S>(a.rows, a.values, a.mask, a.out);
  const HeldGrid h = held_grid<ByRow>(op, a.place, t, sizeof(Loaded<S>) + 1, whiten_fwd_kernel<S, ByRow>);
  Part* const parts = ByRow ? nullptr : room_for<Part>(op, a.place, 3 * h.grid.blocks);
  launch(op, a.place, h.grid, whiten_fwd_kernel<S, ByRow>, a, t, h.in_shared, parts);
}

}  // namespace

double whiten_fwd(const WhitenArgs& a) {
  const char* const op = a.given ? "whiten_apply" : a.by_row ? "masked_normalize" : "masked_whiten";
  double kept[3] = {};
  WhitenArgs with = a;
  if (kEmulated && !a.moments && !a.by_row) with.moments = Operand{kept, Dtype::f64, 1, 3, 0, 1};
  with_storage<false>([&](auto s) { a.by_row ? whiten_as<decltype(s), true>(op, with) : whiten_as<decltype(s), false>(op, with); }, a.values, a.out);
  return kEmulated && !a.by_row ? static_cast<const double*>(with.moments.data)[0] : 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
