// SPDX-License-Identifier: Apache-2.0
// GAE and discounted returns as a group of threads walks a row, right to left.
#pragma once
#include "../math/kl.h"
#include "scan.cuh"

namespace rlkern {
namespace RLKERN_ISA {

// What a token hands to the one on its left: advantage and value, or the return.
template <class A>
struct Carry {
  A y = 0, v = 0;
};
// A warp's map. Of returns: y -> x + c y, cut where c is below 0. Of GAE, with live tokens: y -> x + c (gamma v + decay y), and
// v becomes that of its first live token; the last one's next value and decay are in what enters, so one state is enough.
template <class A>
struct OfWarp {
  double c = 1;
  A f = 1, x = 0, v = 0;  // f: c as a factor
  int live = 0;
};

// The maps of chunks, which hold the recurrence's numbers: of returns, and of GAE y -> x + by_y y + by_v v, where a rounding a
// chunk is less than the recurrence's own.
template <class A>
struct OfReturns {
  using State = Carry<A>;
  double c = 1;
  A x = 0;
  __device__ __forceinline__ State after(const State& s) const { return {applied<true>(c, x, s.y), 0}; }
};
template <class A>
__device__ __forceinline__ OfReturns<A> compose(const OfReturns<A>& first, const OfReturns<A>& then) {
  if (then.c < 0) return then;
  return {first.c < 0 ? kCut : joined(then.c, first.c), applied<true>(then.c, then.x, first.x)};
}
template <class A>
struct OfGae {
  using State = Carry<A>;
  A by_y = 1, by_v = 0, x = 0, v = 0;
  int live = 0;
  __device__ __forceinline__ A sum(A y_in, A v_in) const { return fused(by_y, y_in, fused(by_v, v_in, x)); }
  __device__ __forceinline__ State after(const State& s) const { return live ? State{sum(s.y, s.v), v} : s; }
};
template <class A>
__device__ __forceinline__ OfGae<A> compose(const OfGae<A>& first, const OfGae<A>& then) {
  if (!then.live) return first;
  if (!first.live) return then;
  return {factor<A>(joined(then.by_y, first.by_y)), factor<A>(joined(then.by_y, first.by_v)), then.sum(first.x, first.v), then.v, 1};
}

template <class S, bool Gae>
class Forward {
 public:
  using A = ArithmeticOf<S>;
  static constexpr int N = Stored<S>::kPiece;
  static constexpr unsigned kAll = (1u << N) - 1;
  using Map = std::conditional_t<Gae, OfGae<A>, OfReturns<A>>;
  struct Fetched {
    Loaded<S> reward, value;
    EarlyMask<N> mask;
    Piece piece;
  };
  struct Tile {
    A r[N], v[N];
    unsigned valid, live;
    double c;  // of the lanes above: their map is y -> x + c y; of GAE, if one is live (`known`), its value is v_next
    A x, v_next;
    bool known;
  };
  // Past the last row there are no tokens.
  __device__ __forceinline__ Forward(const ScanArgs& args, const Group& group, int64_t row)
      : a_(args), g_(group), r_(row < args.rows.count ? row : 0), length_(row < args.rows.count ? args.rows.len(row) : 0),
        start_(args.rows.cu ? args.rows.cu[r_] : 0), gamma_(A(args.gamma)),
        decay_(!Gae ? args.gamma : args.gamma * (args.lam && length_ ? row_value<double>(args.lam, row) : args.lam_value)) {}

  __device__ __forceinline__ Carry<A> first() const {
    const A end = a_.bootstrap && length_ ? row_value<A>(a_.bootstrap, r_) : A(0);
    return Gae ? Carry<A>{0, end} : Carry<A>{end, 0};
  }
  __device__ __forceinline__ Fetched fetch(int64_t tile) const {
    Fetched f;
    f.piece = tile_piece<N, true>(g_, tile, length_);
    f.reward = load<S>(a_.rewards, base(a_.rewards), f.piece);
    if constexpr (Gae) f.value = load<S>(a_.values, base(a_.values), f.piece);
    f.mask.fetch(a_.mask, base(a_.mask), f.piece);
    return f;
  }
  // Numbers as the recurrence reads them: 0 at masked tokens under "zero", rewards less the KL penalty at valid ones.
  __device__ __forceinline__ void read(const Fetched& f, const KlRange<A>& range, Tile& t) const {
    t.valid = f.mask.bits(a_.mask, base(a_.mask), f.piece);
    const bool zero = a_.masked == Masked::zero;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool hidden = zero && !(t.valid >> i & 1);
      t.r[i] = hidden ? A(0) : f.reward[i];
      if constexpr (Gae) t.v[i] = hidden ? A(0) : f.value[i];
    }
    if (a_.kl.estimator != Kl::none) shape(f.piece, range, t);
    const unsigned inside = inside_bits(f.piece);
    t.live = a_.masked == Masked::skip ? t.valid : a_.masked == Masked::turn ? ends_of_turns(t.valid, f.piece) : inside;
  }

  // The map of the lanes above, and of the warp in its lane 0.
  __device__ __forceinline__ OfWarp<A> scan(Tile& t) const {
    const unsigned living = __ballot_sync(kWholeWarp, t.live != 0);
    t.known = lanes_above(living) != 0;
    if (Gae) {
      A v = 0;  // of the first live token
#pragma unroll
      for (int i = N - 1; i >= 0; --i)
        if (t.live >> i & 1) v = t.v[i];
      t.v_next = from_lane(v, t.known ? __ffs(static_cast<int>(lanes_above(living))) - 1 : static_cast<int>(threadIdx.x) % kWarp);
      OfWarp<A> w = scanned(t, living);
      w.v = from_lane(v, living ? __ffs(static_cast<int>(living)) - 1 : 0), w.live = living != 0;
      return w;
    }
    return scanned(t, living);
  }
  // What enters this thread's warp, and what leaves the tile, which `carry` entered.
  __device__ __forceinline__ Carry<A> enter(const OfWarp<A>* of_warp, Carry<A>& carry) const {
    Carry<A> mine;
    for (int w = g_.first_warp + g_.warps - 1; w >= g_.first_warp; --w) {
      if (w == g_.warp()) mine = carry;
      const OfWarp<A>& m = of_warp[w];
      if constexpr (Gae) {
        if (m.live) carry.y = fused(m.f, fused(decay_.step, carry.y, gamma_ * carry.v), m.x), carry.v = m.v;
      } else {
        carry.y = m.f < 0 ? m.x : fused(m.f, carry.y, m.x);
      }
    }
    return mine;
  }
  // The map of the tile.
  __device__ __forceinline__ Map whole(const OfWarp<A>* of_warp) const {
    Map all;
    for (int w = g_.first_warp + g_.warps - 1; w >= g_.first_warp; --w) {
      const OfWarp<A>& m = of_warp[w];
      if constexpr (Gae) all = compose(all, Map{factor<A>(joined(m.c, decay_.exact())), factor<A>(joined(m.c, a_.gamma)), m.x, m.v, m.live});
      else all = compose(all, Map{m.c, m.x});
    }
    return all;
  }
  // The tokens by the recurrence itself, from what enters this thread.
  __device__ __forceinline__ void replay(const Tile& t, const Carry<A>& entering, A (&out)[N]) const {
    Carry<A> c = entering;
    if constexpr (Gae) {
      if (t.known) c = {fused(factor<A>(t.c), fused(decay_.step, c.y, gamma_ * c.v), t.x), t.v_next};
    } else {
      c.y = applied<true>(t.c, t.x, c.y);
    }
    const bool reset = a_.masked == Masked::reset, hides = a_.masked == Masked::skip || a_.masked == Masked::turn;
#pragma unroll
    for (int i = N - 1; i >= 0; --i) {
      const bool valid = t.valid >> i & 1;
      if constexpr (Gae) {
        if (t.live >> i & 1) c.y = fused(decay_.step, c.y, fused(gamma_, c.v, t.r[i]) - t.v[i]), c.v = t.v[i];
        out[i] = c.y;
      } else {
        if (t.live >> i & 1) c.y = fused(decay_.step, c.y, t.r[i]);
        out[i] = hides && !valid ? A(0) : c.y;
        if (reset && !valid && (t.live >> i & 1)) c.y = 0;
      }
    }
  }
  // Writes the returns, and of GAE the advantages.
  __device__ __forceinline__ void write(const Tile& t, const Piece& p, const A (&y)[N], bool advantages) const {
    if constexpr (Gae) {
      A sum[N];
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] = y[i] + t.v[i];
      if (advantages) store<S>(a_.advantages, base(a_.advantages), p, y);
      store<S>(a_.returns, base(a_.returns), p, sum);
    } else {
      store<S>(a_.returns, base(a_.returns), p, y);
    }
  }
  __device__ __forceinline__ int64_t base(const Operand& x) const { return a_.rows.cu && x.inner_stride ? start_ : r_ * x.row_stride; }
  __device__ __forceinline__ int64_t length() const { return length_; }
  __device__ __forceinline__ int64_t tiles() const { return tiles_of<N>(g_, length_); }

 private:
  __device__ __forceinline__ void shape(const Piece& p, const KlRange<A>& range, Tile& t) const {
    const auto old = load<S>(a_.old_log_prob, base(a_.old_log_prob), p), ref = load<S>(a_.ref_log_prob, base(a_.ref_log_prob), p);
    const A coef = A(a_.kl_coef);
    with_estimator(a_.kl.estimator, [&](auto e) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (t.valid >> i & 1) t.r[i] = t.r[i] - coef * kl_value<decltype(e)::value>(old[i], ref[i], range);
    });
  }
  // Valid tokens with none after them in their run.
  __device__ __forceinline__ unsigned ends_of_turns(unsigned valid, const Piece& p) const {
    unsigned next = __shfl_down_sync(kWholeWarp, valid & 1, 1);
    const int64_t after = p.first + N;
    if (threadIdx.x % kWarp == kWarp - 1) next = valid && after < length_ ? valid_bits<1>(a_.mask, base(a_.mask), piece_of<1>(after, 0, length_)) : 0;
    return valid & ~(valid >> 1 | next << (N - 1));
  }
  // The sum of a thread's tokens where 0 enters them; is nothing let through?
  __device__ __forceinline__ A own(const Tile& t, bool& cut) const {
    A x = 0, v = t.v_next;
    bool open = Gae && !t.known;
    const bool reset = !Gae && a_.masked == Masked::reset;
#pragma unroll
    for (int i = N - 1; i >= 0; --i) {
      if (!(t.live >> i & 1)) continue;
      if constexpr (Gae) {
        x = fused(decay_.step, x, open ? t.r[i] - t.v[i] : fused(gamma_, v, t.r[i]) - t.v[i]);
        v = t.v[i], open = false;
      } else {
        x = fused(decay_.step, x, t.r[i]);
        if (reset && !(t.valid >> i & 1)) x = 0, cut = true;
      }
    }
    return x;
  }
  __device__ __forceinline__ OfWarp<A> scanned(Tile& t, unsigned living) const {
    OfWarp<A> w;
    t.c = 1, t.x = 0;
    if (living == 0) return w;
    bool cut = false;
    Linear<A> m;
    m.x = own(t, cut);
    if (__all_sync(kWholeWarp, t.live == kAll && !cut)) {
      m.x = warp_scan(m.x, decay_);
      t.c = decay_.above(), m.c = decay_.here();
    } else {
      m.c = cut ? kCut : decay_.over(__popc(t.live) - (Gae && !t.known && t.live));
      m = warp_scan<!Gae>(m);
      t.c = from_above(m.c, 1);
    }
    t.x = from_above(m.x, 1);
    if (threadIdx.x % kWarp == kWarp - 1) t.c = 1, t.x = 0;
    w.c = m.c, w.f = factor<A>(m.c), w.x = m.x;
    return w;
  }

  const ScanArgs& a_;
  const Group& g_;
  const int64_t r_, length_, start_;
  const A gamma_;
  const Decay<A, N, Gae> decay_;
};

}  // namespace RLKERN_ISA
}  // namespace rlkern
