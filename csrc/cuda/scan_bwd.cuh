// SPDX-License-Identifier: Apache-2.0
// The adjoints of GAE and of discounted returns as a group of threads walks a row, left to right.
#pragma once
#include "scan.cuh"

namespace rlkern {
namespace RLKERN_ISA {

// What a token hands to the one on its right: the cotangent that a live token adds to its own, and that of the last live one.
template <class A>
struct Flow {
  A s = 0, last = 0;
};
// A warp's map: s -> x + c s, cut where c is below 0; with live tokens, the last one's cotangent is x_last + c_last s.
template <class A>
struct FlowOfWarp {
  double c = 1, c_last = 1;
  A f = 1, x = 0, f_last = 1, x_last = 0;  // f: as factors
  int live = 0;
};

// The same of a chunk.
template <class A, bool Cuts>
struct OfFlow {
  using State = Flow<A>;
  double c = 1, c_last = 1;
  A x = 0, x_last = 0;
  int live = 0;
  __device__ __forceinline__ State after(const State& s) const { return {applied<Cuts>(c, x, s.s), live ? fused(factor<A>(c_last), s.s, x_last) : s.last}; }
};
template <class A, bool Cuts>
__device__ __forceinline__ OfFlow<A, Cuts> compose(const OfFlow<A, Cuts>& first, const OfFlow<A, Cuts>& then) {
  OfFlow<A, Cuts> m = then;
  if (!Cuts || !(then.c < 0)) m.c = Cuts && first.c < 0 ? kCut : joined(then.c, first.c), m.x = applied<Cuts>(then.c, then.x, first.x);
  if (then.live) m.c_last = joined(then.c_last, first.c), m.x_last = fused(factor<A>(then.c_last), first.x, then.x_last);
  else m.c_last = first.c_last, m.x_last = first.x_last, m.live = first.live;
  return m;
}

template <class S, bool Gae>
class Backward {
 public:
  using A = ArithmeticOf<S>;
  static constexpr int N = Stored<S>::kPiece;
  static constexpr unsigned kAll = (1u << N) - 1;
  using Map = OfFlow<A, !Gae>;
  struct Fetched {
    Loaded<S> advantage, returned;
    EarlyMask<N> mask;
    Piece piece;
  };
  struct Tile {
    A x[N], h[N];  // cotangents; of GAE, those of the returns alone
    unsigned valid, live;
    double c;  // of the lanes above: their map is s -> x_above + c s; is a token of theirs live?
    A x_above;
    unsigned living;
  };
  // Past the last row there are no tokens.
  __device__ __forceinline__ Backward(const ScanGradArgs& args, const Group& group, int64_t row)
      : a_(args), g_(group), r_(row < args.rows.count ? row : 0), length_(row < args.rows.count ? args.rows.len(row) : 0),
        start_(args.rows.cu ? args.rows.cu[r_] : 0), gamma_(A(args.gamma)),
        decay_(!Gae ? args.gamma : args.gamma * (args.lam && length_ ? row_value<double>(args.lam, row) : args.lam_value)) {}

  __device__ __forceinline__ Fetched fetch(int64_t tile) const {
    Fetched f;
    f.piece = tile_piece<N, false>(g_, tile, length_);
    f.returned = load<S>(a_.grad_returns, base(a_.grad_returns), f.piece);
    if constexpr (Gae) f.advantage = load<S>(a_.grad_advantages, base(a_.grad_advantages), f.piece);
    f.mask.fetch(a_.mask, base(a_.mask), f.piece);
    return f;
  }
  __device__ __forceinline__ void read(const Fetched& f, Tile& t) const {
    t.valid = f.mask.bits(a_.mask, base(a_.mask), f.piece);
    const bool turn = a_.masked == Masked::turn, skip = a_.masked == Masked::skip;
    const unsigned inside = inside_bits(f.piece), read = Gae || (!turn && !skip) ? inside : t.valid;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      t.h[i] = f.returned[i];
      t.x[i] = !(read >> i & 1) ? A(0) : Gae ? f.advantage[i] + t.h[i] : t.h[i];
    }
    t.live = skip ? t.valid : turn ? ends_of_turns(t.valid, f.piece) : inside;
  }

  // The map of the lanes above, and of the warp in its lane 0.
  __device__ __forceinline__ FlowOfWarp<A> scan(Tile& t) const {
    FlowOfWarp<A> w;
    A c[N];
    const Walked own = walk(t, A(0), c);
    t.living = __ballot_sync(kWholeWarp, t.live != 0);
    Linear<A> m{own.cut ? kCut : 1, own.s};
    if (__all_sync(kWholeWarp, t.live == kAll && !own.cut)) {
      m.x = warp_scan(m.x, decay_);
      t.c = decay_.above(), m.c = decay_.here();
    } else {
      if (!own.cut) m.c = decay_.over(__popc(t.live));
      m = warp_scan<!Gae>(m);
      t.c = from_above(m.c, 1);
    }
    t.x_above = from_above(m.x, 1);
    if (threadIdx.x % kWarp == kWarp - 1) t.c = 1, t.x_above = 0;
    w.c = m.c, w.f = factor<A>(m.c), w.x = m.x, w.live = t.living != 0;
    if (Gae && t.living) {
      const int last = __ffs(static_cast<int>(t.living)) - 1;
      const double tail = decay_.over(t.live ? __popc(t.live) - 1 : 0);
      w.c_last = from_lane(joined(tail, t.c), last), w.f_last = factor<A>(w.c_last);
      w.x_last = from_lane(fused(factor<A>(tail), t.x_above, own.last), last);
    }
    return w;
  }
  // What enters this thread's warp, and what leaves the tile, which `carry` entered.
  __device__ __forceinline__ Flow<A> enter(const FlowOfWarp<A>* of_warp, Flow<A>& carry) const {
    Flow<A> mine;
    for (int w = g_.first_warp + g_.warps - 1; w >= g_.first_warp; --w) {
      if (w == g_.warp()) mine = carry;
      const FlowOfWarp<A>& m = of_warp[w];
      if (Gae && m.live) carry.last = fused(m.f_last, carry.s, m.x_last);
      carry.s = !Gae && m.f < 0 ? m.x : fused(m.f, carry.s, m.x);
    }
    return mine;
  }
  // The map of the tile.
  __device__ __forceinline__ Map whole(const FlowOfWarp<A>* of_warp) const {
    Map all;
    for (int w = g_.first_warp + g_.warps - 1; w >= g_.first_warp; --w) {
      const FlowOfWarp<A>& m = of_warp[w];
      all = compose(all, Map{m.c, m.c_last, m.x, m.x_last, Gae ? m.live : 0});
    }
    return all;
  }
  // The tokens by the recurrence itself, from what enters this thread.
  __device__ __forceinline__ void replay(const Tile& t, const Flow<A>& entering, A (&d_reward)[N], A (&d_value)[N]) const {
    A c[N];
    const Walked w = walk(t, applied<!Gae>(t.c, t.x_above, entering.s), c);
    A before = entering.last;
    if constexpr (Gae) {
      const unsigned above = lanes_above(t.living);
      const A last = from_lane(w.last, above ? __ffs(static_cast<int>(above)) - 1 : static_cast<int>(threadIdx.x) % kWarp);
      if (above) before = last;
    }
    const unsigned shown = a_.masked == Masked::zero ? t.valid : ~0u;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool live = t.live >> i & 1, there = shown >> i & 1;
      d_reward[i] = live && there ? c[i] : A(0);
      if constexpr (Gae) {
        d_value[i] = !there ? A(0) : live ? t.h[i] - c[i] + gamma_ * before : t.h[i];
        if (live) before = c[i];
      }
    }
  }
  __device__ __forceinline__ void write(const Piece& p, const A (&d_reward)[N], const A (&d_value)[N]) const {
    if (a_.d_rewards) store<S>(a_.d_rewards, base(a_.d_rewards), p, d_reward);
    if constexpr (Gae)
      if (a_.d_values) store<S>(a_.d_values, base(a_.d_values), p, d_value);
  }
  __device__ __forceinline__ void write_bootstrap(const Flow<A>& left) const {
    set_element(a_.d_bootstrap, r_ * a_.d_bootstrap.row_stride, Gae ? gamma_ * left.last : left.s);
  }
  __device__ __forceinline__ int64_t tiles() const { return tiles_of<N>(g_, length_); }
  __device__ __forceinline__ int64_t base(const Operand& x) const { return a_.rows.cu && x.inner_stride ? start_ : r_ * x.row_stride; }

 private:
  struct Walked {
    A s = 0, last = 0;  // what leaves; the cotangent of the last live token
    bool cut = false;
  };
  // A token that is not live hands its cotangent on to the next that is; under "reset" a masked one lets nothing pass.
  __device__ __forceinline__ Walked walk(const Tile& t, A s, A (&c)[N]) const {
    Walked w;
    bool found = false;
    const bool reset = !Gae && a_.masked == Masked::reset;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool live = t.live >> i & 1;
      if (reset && live && !(t.valid >> i & 1)) s = 0, found = false, w.cut = true;
      s += t.x[i];
      if (live) w.last = found ? fused(decay_.step, w.last, s) : s, s = 0, found = true;
      c[i] = w.last;
    }
    w.s = found ? fused(decay_.step, w.last, s) : s;
    return w;
  }
  // Valid tokens with none after them in their run; the lane below has the tokens after this one's.
  __device__ __forceinline__ unsigned ends_of_turns(unsigned valid, const Piece& p) const {
    unsigned next = __shfl_up_sync(kWholeWarp, valid & 1, 1);
    const int64_t after = p.first + N;
    if (threadIdx.x % kWarp == 0) next = valid && after < length_ ? valid_bits<1>(a_.mask, base(a_.mask), piece_of<1>(after, 0, length_)) : 0;
    return valid & ~(valid >> 1 | next << (N - 1));
  }

  const ScanGradArgs& a_;
  const Group& g_;
  const int64_t r_, length_, start_;
  const A gamma_;
  const Decay<A, N, false> decay_;
};

}  // namespace RLKERN_ISA
}  // namespace rlkern
