// SPDX-License-Identifier: Apache-2.0
// Scans of maps that compose, over the tokens of a row. A walk goes from the late end of time to the early one, or back, and
// threads stand in its order, so one code serves both directions. A Map is plain, its default value is the identity, it has a
// type State, `State after(State)`, and `compose(first, then)`. Every composition has its place, whoever comes first.
#pragma once
#include "../math/math.h"
#include "reduce.cuh"
#include "rows.cuh"

namespace rlkern {
namespace RLKERN_ISA {

constexpr int kScanThreads = 256;

// ---- y -> x + (c + e) y -------------------------------------------------------------------------------------------------
// With one rounding also where the host has no instruction for it: e is what the product rounded away.
__device__ __forceinline__ float fused_once(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
__device__ __forceinline__ double fused_once(double a, double b, double c) { return __builtin_fma(a, b, c); }

// The decay is kept in two parts: a power by squaring would double its error with each step, and a decay near 1 reaches over
// thousands of tokens. A decay of 0 lets nothing pass, not even a NaN; a product that underflows is no such cut.
template <class A>
struct Affine {
  using State = A;
  A c = 1, e = 0, x = 0;
  __device__ __forceinline__ A after(A y) const {
    // e is no part of an infinity, since 0 times that is NaN
    const A rest = Ops<A>::magnitude(y) == A(INFINITY) ? x : fused_once(e, y, x);
    return c == A(0) ? x : fused_once(c, y, rest);
  }
};
// The decay of both; `lost`: what its product rounded away.
template <class A>
__device__ __forceinline__ void multiply(Affine<A>& m, A first, A then, A product, A lost) {
  constexpr A kTiny = sizeof(A) == 4 ? A(1e-37) : A(1e-300);
  m.c = product == A(0) && first != A(0) && then != A(0) ? kTiny : product;
  m.e = Ops<A>::magnitude(product) == A(INFINITY) ? A(0) : lost;
}
template <class A>
__device__ __forceinline__ Affine<A> compose(const Affine<A>& first, const Affine<A>& then) {
  Affine<A> m;
  const A product = then.c * first.c;
  multiply(m, first.c, then.c, product, fused_once(then.c, first.e, fused_once(then.e, first.c, fused_once(then.c, first.c, -product))));
  m.x = then.after(first.x);
  return m;
}
// One token more, whose decay has one part.
template <class A>
__device__ __forceinline__ A stepped(A y, A c, A x) {
  return c == A(0) ? x : fused_once(c, y, x);
}
template <class A>
__device__ __forceinline__ Affine<A> stepped(const Affine<A>& first, A c, A x) {
  Affine<A> m;
  const A product = c * first.c;
  multiply(m, first.c, c, product, fused_once(c, first.e, fused_once(c, first.c, -product)));
  m.x = stepped(first.x, c, x);
  return m;
}

// ---- a tile: what the threads of a block hold of a row, K pieces each -----------------------------------------------------
// Number j of a thread is the (32 j + lane)-th of its warp's pieces in the walk.
template <int Threads, int K, class Map>
class TileScan {
 public:
  using State = typename Map::State;
  // `turn`: 0 and 1 by turns, so that one barrier a tile is enough.
  __device__ __forceinline__ TileScan(const Map (&piece)[K], int turn) {
    RLKERN_SHARED(Map, room, 2 * kWarps);
    const int lane = threadIdx.x % kWarp;
    of_warp_ = room + turn * kWarps;
    Map all;
#pragma unroll
    for (int j = 0; j < K; ++j) {
      Map m = piece[j];
#pragma unroll
      for (int distance = 1; distance < kWarp; distance *= 2) {
        const Map other = from_below(m, distance);
        if (lane >= distance) m = compose(other, m);
      }
      before_[j] = from_below(m, 1);
      if (lane == 0) before_[j] = Map{};
      run_[j] = from_lane(m, kWarp - 1);
      all = j ? compose(all, run_[j]) : run_[j];
    }
    if (lane == 0) of_warp_[threadIdx.x / kWarp] = all;
    __syncthreads();
  }
  // The map of the whole tile.
  __device__ __forceinline__ Map whole() const {
    Map all = of_warp_[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) all = compose(all, of_warp_[w]);
    return all;
  }
  // What enters each piece where `carry` enters the tile; gives what leaves the tile.
  __device__ __forceinline__ State enter(State carry, State (&entering)[K]) const {
    State mine = carry;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w == static_cast<int>(threadIdx.x / kWarp)) mine = carry;
      carry = of_warp_[w].after(carry);
    }
#pragma unroll
    for (int j = 0; j < K; ++j) entering[j] = before_[j].after(mine), mine = run_[j].after(mine);
    return carry;
  }

 private:
  static constexpr int kWarps = Threads / kWarp;
  Map before_[K], run_[K];  // of the 32 pieces around number j: what comes before it, and all of them
  Map* of_warp_;
};

// ---- a row, as a walk meets its pieces ------------------------------------------------------------------------------------
template <class S>
struct TimeWalk {
  static constexpr int N = Stored<S>::kPiece;
  int64_t length = 0, pieces = 0;
  int lead = 0;
  bool late = false;  // begins at the late end
  __device__ __forceinline__ TimeWalk(const Operand& first, int64_t base, int64_t tokens, bool from_late)
      : length(tokens), lead(lead_of<S>(first, base)), late(from_late) {
    pieces = pieces_of<N>(lead, length);
  }
  // The k-th piece; an empty one past the end.
  __device__ __forceinline__ Piece at(int64_t k) const { return k < pieces ? piece_of<N>(late ? pieces - 1 - k : k, lead, length) : Piece{}; }
  // Number j of this thread in a tile of K pieces a thread.
  template <int K>
  __device__ __forceinline__ Piece at(int64_t tile, int j) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    return at((tile * K * (kScanThreads / kWarp) + warp * K + j) * kWarp + lane);
  }
  template <int K>
  __device__ __forceinline__ int64_t tiles() const {
    return pieces == 0 ? 1 : (pieces + K * kScanThreads - 1) / (K * kScanThreads);
  }
  // Of a piece, what the i-th token that the walk meets has. Both indices are constants, so the piece stays in registers.
  template <class Held>
  __device__ __forceinline__ auto met(const Held& piece, int i) const {
    return late ? piece[N - 1 - i] : piece[i];
  }
  __device__ __forceinline__ bool meets(const Piece& p, int i) const {
    const int at = late ? N - 1 - i : i;
    return p.whole || (at >= p.begin && at < p.end);
  }
};

// ---- many rows: a block walks one, tile by tile; the next tile is loaded while this one is scanned -------------------------
// A Body has: kPieces; Map; Held, what it loads of a piece; walk; initial(); read(piece), map(held, piece) and
// write(held, piece, state), where state enters the piece. Gives what leaves the row.
template <class Body>
__device__ __forceinline__ typename Body::Map::State scan_row(Body& body) {
  constexpr int K = Body::kPieces;
  using Map = typename Body::Map;
  using State = typename Map::State;
  typename Body::Held held[K], next[K];
  State carry = body.initial();
#pragma unroll
  for (int j = 0; j < K; ++j) held[j] = body.read(body.walk.template at<K>(0, j));
  const int64_t tiles = body.walk.template tiles<K>();
  for (int64_t tile = 0; tile < tiles; ++tile) {
#pragma unroll
    for (int j = 0; j < K; ++j) next[j] = body.read(body.walk.template at<K>(tile + 1, j));
    Map map[K];
    State entering[K];
#pragma unroll
    for (int j = 0; j < K; ++j) map[j] = body.map(held[j], body.walk.template at<K>(tile, j));
    carry = TileScan<kScanThreads, K, Map>(map, static_cast<int>(tile & 1)).enter(carry, entering);
#pragma unroll
    for (int j = 0; j < K; ++j) body.write(held[j], body.walk.template at<K>(tile, j), entering[j]), held[j] = next[j];
  }
  return carry;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
