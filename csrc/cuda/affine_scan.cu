// SPDX-License-Identifier: Apache-2.0
// y_t = x_t + decay_t y_next, in either direction, and its adjoint, the same scan in the other direction.
#include "lookback.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

constexpr int kAffinePieces = 2;  // of a thread
// Of a multiprocessor at least: 80 registers a thread, or 128.
template <class S>
constexpr int kForwardBlocks = sizeof(ArithmeticOf<S>) == 4 ? 3 : 2;
constexpr int kAdjointBlocks = 2;

// A row's decay: one a token, or one for all.
template <class S>
struct Decay {
  using A = ArithmeticOf<S>;
  const Operand& tokens;
  int64_t base;
  bool per_token;
  A only;
  __device__ __forceinline__ Decay(const Operand& decay, double value, const Rows& rows, int64_t r)
      : tokens(decay), base(rows.base(decay, r)), per_token(decay && decay.inner_stride), only(A(value)) {
    if (decay && !per_token) only = element<A>(decay, base);
  }
  __device__ __forceinline__ Loaded<S> read(const Piece& p) const { return per_token ? load<S>(tokens, base, p) : Loaded<S>{}; }
  __device__ __forceinline__ A met(const TimeWalk<S>& walk, const Loaded<S>& held, int i) const { return per_token ? walk.met(held, i) : only; }
};

// ---- forward --------------------------------------------------------------------------------------------------------------
template <class S>
struct AffineBody {
  using A = ArithmeticOf<S>;
  using Map = Affine<A>;
  static constexpr int kPieces = kAffinePieces, N = Stored<S>::kPiece;
  struct Held {
    Loaded<S> x, decay;
  };
  const AffineArgs& a;
  int64_t r, x, y;
  TimeWalk<S> walk;
  Decay<S> decay;
  __device__ __forceinline__ AffineBody(const AffineArgs& args, int64_t row)
      : a(args), r(row), x(args.rows.base(args.x, row)), y(args.rows.base(args.y, row)), walk(args.x, x, args.rows.len(row), args.reverse),
        decay(args.decay, args.decay_value, args.rows, row) {}
  __device__ __forceinline__ A initial() const { return a.initial ? row_value<A>(a.initial, r) : A(0); }
  __device__ __forceinline__ Held read(const Piece& p) const { return {load<S>(a.x, x, p), decay.read(p)}; }
  __device__ __forceinline__ Map map(const Held& h, const Piece& p) const {
    Map m;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Map longer = stepped(m, decay.met(walk, h.decay, i), walk.met(h.x, i));
      if (walk.meets(p, i)) m = longer;
    }
    return m;
  }
  __device__ __forceinline__ void write(const Held& h, const Piece& p, A state) const {
    A out[N], in_time[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (walk.meets(p, i)) state = stepped(state, decay.met(walk, h.decay, i), walk.met(h.x, i));
      out[i] = state;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) in_time[i] = walk.met(out, i);
    store<S>(a.y, y, p, in_time);
  }
};

// plan affine_scan_fwd_kernel: a block a row, tile by tile, the next tile loaded while this one is scanned; or, of few long rows,
//   a block a chunk by look-back (lookback.cuh). A thread owns two pieces of 16 bytes of each operand, its warp 64 in a run: it
//   composes the maps of its tokens, the block scans them, and from what enters its pieces it steps through them again. Bytes
//   per element: x and decay read once, y written once. Numerics: steps in the arithmetic of the tokens; products of decays in
//   two parts; all in a fixed order.
// budget affine_scan_fwd_kernel<S, false>: 112 registers, loads 8, stores 2
// budget affine_scan_fwd_kernel<S, true>: 112 registers, loads 4, stores 2
template <class S, bool Cut>
__global__ void __launch_bounds__(kScanThreads, kForwardBlocks<S>) affine_scan_fwd_kernel(const AffineArgs a, const Chunks chunks) {
  if constexpr (Cut) {
    const Spot s = take_chunk(chunks, a.rows);
    AffineBody<S> body(a, s.row);
    if (s.chunk < body.walk.template tiles<kAffinePieces>()) scan_chunk(body, chunks, s);
    leave_chunks(chunks);
  } else {
    AffineBody<S> body(a, blockIdx.x);
    scan_row(body);
  }
}

// ---- adjoint: c_t = grad_t + s, where s = decay c of the token before it in this walk, which goes against the scan's. d_x = c,
// d_decay_t = c_t y_next, d_initial = the s that leaves the row -----------------------------------------------------------
template <class A>
__device__ __forceinline__ A passed(A decay, A c) {
  return decay == A(0) ? A(0) : decay * c;
}
template <class S>
struct AffineGradBody {
  using A = ArithmeticOf<S>;
  using Map = Affine<A>;
  static constexpr int kPieces = kAffinePieces, N = Stored<S>::kPiece;
  struct Held {
    Loaded<S> grad, decay, y;
    A edge;  // y beyond the piece's last token
  };
  const AffineGradArgs& a;
  int64_t r, grad, y, d_x, d_decay;
  bool per_token;  // d_decay
  TimeWalk<S> walk;
  Decay<S> decay;
  A before;  // what the scan began with
  double sum = 0;
  __device__ __forceinline__ AffineGradBody(const AffineGradArgs& args, int64_t row, bool by_token)
      : a(args), r(row), grad(args.rows.base(args.grad, row)), y(args.rows.base(args.y, row)), d_x(args.rows.base(args.d_x, row)),
        d_decay(args.rows.base(args.d_decay, row)), per_token(by_token), walk(args.grad, grad, args.rows.len(row), !args.reverse),
        decay(args.decay, args.decay_value, args.rows, row), before(args.initial ? row_value<A>(args.initial, row) : A(0)) {}
  __device__ __forceinline__ A initial() const { return A(0); }
  __device__ __forceinline__ Held read(const Piece& p) const {
    Held h{load<S>(a.grad, grad, p), decay.read(p), Loaded<S>{}, before};
    if (!a.d_decay) return h;
    h.y = load<S>(a.y, y, p);
    const int64_t next = walk.late ? p.first + p.begin - 1 : p.first + p.end;
    if (p.begin < p.end && next >= 0 && next < walk.length) {
      if constexpr (Stored<S>::kSame) h.edge = number<A>(at<typename Stored<S>::Element>(a.y, y + next * a.y.inner_stride));
      else h.edge = element<A>(a.y, y + next * a.y.inner_stride);
    }
    return h;
  }
  __device__ __forceinline__ Map map(const Held& h, const Piece& p) const {
    Map m;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A d = decay.met(walk, h.decay, i);
      Map longer = stepped(m, d, A(0));
      longer.x = passed(d, walk.met(h.grad, i) + m.x);
      if (walk.meets(p, i)) m = longer;
    }
    return m;
  }
  __device__ __forceinline__ void write(const Held& h, const Piece& p, A s) {
    A c[N], in_time[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      c[i] = walk.met(h.grad, i) + s;
      if (walk.meets(p, i)) s = passed(decay.met(walk, h.decay, i), c[i]);
    }
    if (a.d_x) {
#pragma unroll
      for (int i = 0; i < N; ++i) in_time[i] = walk.met(c, i);
      store<S>(a.d_x, d_x, p, in_time);
    }
    if (!a.d_decay) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      c[i] *= i + 1 < N && walk.meets(p, i + 1) ? walk.met(h.y, i + 1 < N ? i + 1 : i) : h.edge;
      if (!per_token && walk.meets(p, i)) sum += static_cast<double>(c[i]);
    }
    if (!per_token) return;
#pragma unroll
    for (int i = 0; i < N; ++i) in_time[i] = walk.met(c, i);
    store<S>(a.d_decay, d_decay, p, in_time);
  }
};

// plan affine_scan_bwd_kernel: as the value's, in the other direction. Bytes per element: grad and decay (and y, where the decay
//   has a gradient) read once, the wanted gradients written once. A decay's sum over its row in float64: by thread, by block and,
//   of a row in chunks, in the last of them to finish, which folds the sums of all in their order.
// budget affine_scan_bwd_kernel<S, false>: 128 registers, loads 12, stores 4
// budget affine_scan_bwd_kernel<S, true>: 128 registers, loads 6, stores 4
template <class S, bool Cut>
__global__ void __launch_bounds__(kScanThreads, kAdjointBlocks) affine_scan_bwd_kernel(const AffineGradArgs a, const Chunks chunks, const bool per_token) {
  using A = ArithmeticOf<S>;
  const auto add = [](double x, double y) { return x + y; };
  const bool sums = a.d_decay && !per_token;
  const auto finish = [&](int64_t r, A left, double sum, bool leaves, bool summed) {
    if (threadIdx.x != 0) return;
    if (leaves && a.d_initial) set_element(a.d_initial, r * a.d_initial.row_stride, left);
    if (summed) set_element(a.d_decay, r * a.d_decay.inner_stride, static_cast<A>(sum));
  };
  if constexpr (Cut) {
    const Spot s = take_chunk(chunks, a.rows);
    AffineGradBody<S> body(a, s.row, per_token);
    const int64_t tiles = body.walk.template tiles<kAffinePieces>();
    if (s.chunk < tiles) {
      const A left = scan_chunk(body, chunks, s);
      double sum = 0;
      bool last = false;
      if (sums) {
        sum = block_fold<kScanThreads>(body.sum, add);
        last = last_of_row(chunks, s, sum, tiles);
        if (last) sum = fold_parts<kScanThreads>(static_cast<const double*>(chunks.parts) + (s.slot - s.chunk), static_cast<int>(tiles), 0.0, add);
      }
      finish(s.row, left, sum, s.chunk == tiles - 1, last);
    }
    leave_chunks(chunks);
  } else {
    AffineGradBody<S> body(a, blockIdx.x, per_token);
    const A left = scan_row(body);
    finish(blockIdx.x, left, sums ? block_fold<kScanThreads>(body.sum, add) : 0.0, true, sums);
  }
}

template <class S>
void affine_as(const AffineArgs& a) {
  const Chunks chunks = chunks_of<S, kAffinePieces, Affine<ArithmeticOf<S>>, Empty>("affine_scan", a.place, a.rows, a.x);
  if (chunks.slots) launch("affine_scan", a.place, {chunks.slots, kScanThreads}, affine_scan_fwd_kernel<S, true>, a, chunks);
  else launch("affine_scan", a.place, {a.rows.count, kScanThreads}, affine_scan_fwd_kernel<S, false>, a, chunks);
}

template <class S>
void affine_grad_as(const AffineGradArgs& a, bool per_token) {
  const Chunks chunks = chunks_of<S, kAffinePieces, Affine<ArithmeticOf<S>>, double>("affine_scan", a.place, a.rows, a.grad);
  if (chunks.slots) launch("affine_scan", a.place, {chunks.slots, kScanThreads}, affine_scan_bwd_kernel<S, true>, a, chunks, per_token);
  else launch("affine_scan", a.place, {a.rows.count, kScanThreads}, affine_scan_bwd_kernel<S, false>, a, chunks, per_token);
}
Operand if_tokens(const Operand& x, bool tokens) { return tokens ? x : Operand{}; }

}  // namespace

double affine_scan(const AffineArgs& a) {
  with_storage([&](auto s) { affine_as<decltype(s)>(a); }, a.x, if_tokens(a.decay, a.decay.inner_stride != 0), a.y);
  return 0;
}
double affine_scan_bwd(const AffineGradArgs& a) {
  const bool per_token = a.decay && (a.decay.inner_stride != 0 || a.decay.cols != 1);  // or one value, expanded
  with_storage([&](auto s) { affine_grad_as<decltype(s)>(a, per_token); }, a.grad, if_tokens(a.decay, a.decay.inner_stride != 0), a.y, a.d_x,
               if_tokens(a.d_decay, per_token));
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
