// SPDX-License-Identifier: Apache-2.0
// What the scans of a row by one decay share: powers of it, the scan of a warp, and the tiles that a group of threads walks,
// from the end where the recurrence begins. Lanes and warps above are nearer to that end.
#pragma once
#include "../math/math.h"
#include "lookback.cuh"

namespace rlkern {
namespace RLKERN_ISA {

// ---- decays -------------------------------------------------------------------------------------------------------------
// A product of decays is float64: in float it would double its error with each step of a scan, and a decay near 1 reaches over
// thousands of tokens. It becomes neither 0 nor infinite, since 0 times an infinity is a NaN where the recurrence has none.
__device__ __forceinline__ double joined(double near, double far) {
  constexpr double kLeast = 2.2250738585072014e-308, kMost = 1.7976931348623157e308;
  const double product = near * far, size = product < 0 ? -product : product;
  if ((size >= kLeast && size <= kMost) || product != product || near == 0 || far == 0) return product;
  const double bound = size < 1 ? kLeast : kMost;
  return (near < 0) != (far < 0) ? -bound : bound;
}
// The same as a factor of a sum.
template <class A>
__device__ __forceinline__ A factor(double c) {
  if constexpr (sizeof(A) == 8) {
    return c;
  } else {
    const float f = static_cast<float>(c), size = f < 0 ? -f : f;
    if ((size >= 1.17549435e-38f && size <= 3.40282347e38f) || f != f || c == 0) return f;
    const float bound = size < 1 ? 1.40129846e-45f : 3.40282347e38f;
    return c < 0 ? -bound : bound;
  }
}

// The decay of a row: at a step, and over the live tokens of a piece of N, or of several. Where what enters a warp has the last
// token's decay in it, there is one step less.
template <class A, int N, bool LastIsIn>
class Decay {
 public:
  A step;
  __device__ __forceinline__ explicit Decay(double d) : step(A(d)), exact_(sizeof(A) == 8 ? step : d) {
#pragma unroll
    for (int i = 1; i < N; ++i) less_ = joined(less_, exact_);
    whole_ = joined(less_, exact_);
    double p = whole_;
    above_ = LastIsIn ? less_ : 1;
    const int pieces = kWarp - (LastIsIn ? 2 : 1) - static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      of_pieces_[k] = factor<A>(p);
      if (pieces > 0 && pieces >> k & 1) above_ = joined(above_, p);
      p = joined(p, p);
    }
  }
  __device__ __forceinline__ double over(int tokens) const {
    if (tokens == N) return whole_;
    if (tokens == N - 1) return less_;
    double p = 1;
    for (int i = 0; i < tokens; ++i) p = joined(p, exact_);
    return p;
  }
  __device__ __forceinline__ double exact() const { return exact_; }
  static constexpr int kSteps = 5;
  __device__ __forceinline__ A of_pieces(int k) const { return of_pieces_[k]; }         // 2^k of them
  __device__ __forceinline__ double above() const { return above_; }                    // of all lanes above
  __device__ __forceinline__ double here() const { return joined(whole_, above_); }     // and of this one

 private:
  double exact_, less_ = 1, whole_, above_;
  A of_pieces_[kSteps];
};
static_assert(1 << Decay<float, 4, false>::kSteps == kWarp, "a step a doubling");

// ---- maps: y -> x + c y of what enters ------------------------------------------------------------------------------------
constexpr double kCut = -1;  // a decay that lets nothing pass, not even a NaN
template <class A>
struct Linear {
  double c = 1;
  A x = 0;
};
template <bool Cuts, class A>
__device__ __forceinline__ A applied(double c, A x, A entering) {
  return Cuts && c < 0 ? x : fused(factor<A>(c), entering, x);
}
// Of this lane and those above it.
template <bool Cuts, class A>
__device__ __forceinline__ Linear<A> warp_scan(Linear<A> m) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const double c = from_above(m.c, distance);
    const A x = from_above(m.x, distance);
    if (lane + distance >= kWarp || (Cuts && m.c < 0)) continue;
    m.x = fused(factor<A>(m.c), x, m.x);
    m.c = Cuts && c < 0 ? kCut : joined(m.c, c);
  }
  return m;
}
// The same where all tokens of the warp are live.
template <class A, class Powers>
__device__ __forceinline__ A warp_scan(A x, const Powers& decay) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int k = 0; k < Powers::kSteps; ++k) {
    const A far = from_above(x, 1 << k);
    if (lane + (1 << k) < kWarp) x = fused(decay.of_pieces(k), far, x);
  }
  return x;
}
__device__ __forceinline__ unsigned lanes_above(unsigned ballot) {
  const unsigned lane = threadIdx.x % kWarp;
  return lane == kWarp - 1 ? 0 : ballot >> (lane + 1) << (lane + 1);
}

// ---- groups of threads ----------------------------------------------------------------------------------------------------
// A block is one group or several, of whole warps; each walks a row, a tile of a piece a thread at a time.
struct Group {
  int threads, thread, first_warp, warps;
  __device__ __forceinline__ explicit Group(int count)
      : threads(count), thread(static_cast<int>(threadIdx.x) & (count - 1)), first_warp((static_cast<int>(threadIdx.x) & -count) / kWarp),
        warps(count / kWarp) {}
  __device__ __forceinline__ int warp() const { return first_warp + thread / kWarp; }
  __device__ __forceinline__ int64_t row(int64_t unit) const { return unit * (blockDim.x / threads) + threadIdx.x / threads; }
};
// How many threads suit a row: a power of two, so that short rows share a block.
inline int group_for(const Rows& rows, const Operand& like, int piece, int most) {
  const int64_t length = !rows.cu ? rows.length : rows.count ? like.cols / rows.count : 0;  // packed: on average
  int threads = kWarp;
  while (threads < most && static_cast<int64_t>(threads) * piece < length) threads *= 2;
  return threads;
}
// The tiles of the longest row of a block: all its threads meet at each.
__device__ __forceinline__ int64_t tiles_of_block(const Rows& rows, int64_t unit, int group, int piece) {
  const int64_t each = blockDim.x / group, first = unit * each;
  int64_t most = rows.length;
  if (rows.cu)
    for (int64_t r = first; r < first + each && r < rows.count; ++r) most = rows.len(r) > most ? rows.len(r) : most;
  return (most + group * piece - 1) / (group * piece);
}

template <int N>
__device__ __forceinline__ int64_t tiles_of(const Group& g, int64_t length) {
  return (length + g.threads * N - 1) / (g.threads * N);
}
// The piece of a thread in the j-th tile of the walk. Pieces and tiles begin at the row's start, whatever its address and what
// follows: masked tokens there, as padding has them, change no bit.
template <int N, bool Reverse>
__device__ __forceinline__ Piece tile_piece(const Group& g, int64_t j, int64_t length) {
  const int64_t k = Reverse ? (tiles_of<N>(g, length) - 1 - j) * g.threads + g.thread : (j + 1) * g.threads - 1 - g.thread;
  return k < 0 || k >= pieces_of<N>(0, length) ? Piece{} : piece_of<N>(k, 0, length);
}
__device__ __forceinline__ unsigned inside_bits(const Piece& p) { return ((1u << p.end) - 1) & ~((1u << p.begin) - 1); }

// A mask of bytes is loaded as it is, so that its bits need not be waited for where a load is issued early.
template <int N>
struct EarlyMask {
  using Word = std::conditional_t<N == 8, uint64_t, std::conditional_t<N == 4, uint32_t, std::conditional_t<N == 2, uint16_t, uint8_t>>>;
  static_assert(sizeof(Word) == N, "a byte a token");
  Word raw = 0;
  bool early = false;
  __device__ __forceinline__ void fetch(const Operand& mask, int64_t base, const Piece& p) {
    const char* from = static_cast<const char*>(mask.data) + base + p.first;
    early = mask && mask.inner_stride && p.whole && bytes_of(mask.dtype) == 1 && reinterpret_cast<uintptr_t>(from) % N == 0;
    if (early) raw = *reinterpret_cast<const Word*>(from);
  }
  __device__ __forceinline__ unsigned bits(const Operand& mask, int64_t base, const Piece& p) const {
    if (!early) return valid_bits<N>(mask, base, p);
    unsigned found = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) found |= static_cast<unsigned>((raw >> (8 * i) & 0xff) != 0) << i;
    return found;
  }
};

}  // namespace RLKERN_ISA
}  // namespace rlkern
