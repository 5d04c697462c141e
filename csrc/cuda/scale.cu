// SPDX-License-Identifier: Apache-2.0
// The backward of the losses: a gradient times the loss's cotangent.
#include "rows.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

// A piece of what S stores, or of the float32 that is kept for it.
template <class S>
__device__ __forceinline__ void load_kept(const Operand& x, int64_t base, const Piece& p, ArithmeticOf<S> (&v)[Stored<S>::kPiece]) {
  constexpr int N = Stored<S>::kPiece;
  if constexpr (Stored<S>::kSame && sizeof(typename Stored<S>::Element) == 2) {
    if (x.dtype == Dtype::f32) {
      const float* from = static_cast<const float*>(x.data) + base + (x.inner_stride ? p.first : 0);
      if (p.whole && x.inner_stride && wide(from)) {
        uint4 raw[N / kVector<float>];
#pragma unroll
        for (int i = 0; i < N / kVector<float>; ++i) raw[i] = reinterpret_cast<const uint4*>(from)[i];
        memcpy(v, raw, sizeof(v));
        return;
      }
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = i >= p.begin && i < p.end ? from[x.inner_stride ? i : 0] : 0.0f;
      return;
    }
  }
  const auto found = load<S>(x, base, p);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = found[i];
}

// plan scale_kernel: a thread owns one piece of the result; no loop, no shared memory. Bytes per element: x read once, the
//   result written once; the factor is one number.
// budget scale_kernel<S>: 40 registers, loads 1, stores 1
template <class S>
__global__ void __launch_bounds__(kTokenThreads) scale_kernel(const ScaleArgs a, const Tiling tiling) {
  using A = ArithmeticOf<S>;
  constexpr int N = Stored<S>::kPiece;
  int64_t r, k;
  if (!place_of(tiling, r, k)) return;
  const int64_t base = tiling.base(a.out, r);
  const Piece p = piece_of<N>(k, lead_of<S>(a.out, base), tiling.rows.length);
  A v[N];
  load_kept<S>(a.x, tiling.base(a.x, r), p, v);
  const A factor = element<A>(a.factor, 0);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = v[i] == A(0) ? v[i] : v[i] * factor;
  store<S>(a.out, base, p, v);
}

}  // namespace

double scale(const ScaleArgs& a) {
  if (!a.out) return 0;
  const auto run = [&](auto s) {
    using S = decltype(s);
    const Tiling t = tiling_of<S>(Rows{a.out.rows, a.out.cols, nullptr}, a.out, a.x);
    launch("scale", a.place, {t.blocks(), kTokenThreads}, scale_kernel<S>, a, t);
  };
  const bool half = size_of(a.out.dtype) == 2 && a.x.dtype == Dtype::f32;
  if (a.factor.dtype == Dtype::f64 && a.out.dtype != Dtype::f64) run(Mixed<double>{});  // in its arithmetic
  else with_storage(run, a.out, half ? Operand{} : a.x);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
