// SPDX-License-Identifier: Apache-2.0
// GAE and discounted returns, forward.
#include "scan_fwd.cuh"

namespace rlkern {
namespace RLKERN_ISA {

double scan_whiten(const ScanArgs& a);  // scan_whiten.cu

namespace {

constexpr int kRowThreads = 128;

// plan scan_rows_kernel: a group of 32 to 128 threads owns a row and walks it from its end, a tile of a piece of 16 bytes a
//   thread at a time; the next tile is loaded before this one is scanned. Bytes per element: rewards, values (of GAE), the
//   mask and both log-probs (of a KL reward) read once, returns and advantages written once. Numerics: what enters a thread
//   comes from the scan of a warp, products of decays in float64; from there its tokens follow the recurrence itself. The order
//   of operations depends on the length alone.
// budget scan_rows_kernel<S, false>: 128 registers, loads 2, stores 1
// budget scan_rows_kernel<S, true>: 128 registers, loads 4, stores 2
template <class S, bool Gae>
__global__ void __launch_bounds__(kRowThreads, 4) scan_rows_kernel(const ScanArgs a, const KlRange<ArithmeticOf<S>> range, const int group) {
  using A = ArithmeticOf<S>;
  using F = Forward<S, Gae>;
  RLKERN_SHARED(OfWarp<A>, of_warp, 2 * kRowThreads / kWarp);
  const Group g(group);
  const F row(a, g, g.row(blockIdx.x));
  typename F::Fetched next = row.fetch(0);
  Carry<A> carry = row.first();
  const int64_t tiles = tiles_of_block(a.rows, blockIdx.x, group, F::N);
  for (int64_t j = 0; j < tiles; ++j) {
    const typename F::Fetched held = next;
    next = row.fetch(j + 1);
    typename F::Tile t;
    row.read(held, range, t);
    const OfWarp<A> mine = row.scan(t);
    OfWarp<A>* const room = of_warp + (j & 1) * (kRowThreads / kWarp);  // by turns: one barrier a tile is enough
    if (threadIdx.x % kWarp == 0) room[threadIdx.x / kWarp] = mine;
    __syncthreads();
    A y[F::N];
    row.replay(t, row.enter(room, carry), y);
    row.write(t, held.piece, y, true);
  }
}

// plan scan_chunks_kernel: few long rows, cut into chunks of a tile of 256 threads, a block each: a chunk publishes its map, looks
//   back for what enters it and goes through its tokens, which stay in registers. Bytes per element as above, and two maps a
//   chunk.
// budget scan_chunks_kernel<S, false>: 128 registers, loads 2, stores 1
// budget scan_chunks_kernel<S, true>: 128 registers, loads 4, stores 2
template <class S, bool Gae>
__global__ void __launch_bounds__(kScanThreads, 2) scan_chunks_kernel(const ScanArgs a, const KlRange<ArithmeticOf<S>> range, const Chunks chunks) {
  using A = ArithmeticOf<S>;
  using F = Forward<S, Gae>;
  RLKERN_SHARED(OfWarp<A>, of_warp, kScanThreads / kWarp);
  const Spot s = take_chunk(chunks, a.rows);
  const Group g(kScanThreads);
  const F row(a, g, s.row);
  if (s.chunk < row.tiles()) {
    const typename F::Fetched held = row.fetch(s.chunk);
    typename F::Tile t;
    row.read(held, range, t);
    const OfWarp<A> mine = row.scan(t);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = mine;
    __syncthreads();
    typename F::Map whole;
    if (threadIdx.x == 0) whole = row.whole(of_warp);
    Carry<A> carry = enter_chunk(chunks, s, whole).after(row.first());
    A y[F::N];
    row.replay(t, row.enter(of_warp, carry), y);
    row.write(t, held.piece, y, true);
  }
  leave_chunks(chunks);
}

template <class S, bool Gae>
void scan_as(const char* op, const ScanArgs& a) {
  using F = Forward<S, Gae>;
  const KlRange<ArithmeticOf<S>> range(a.kl);
  const Chunks chunks = chunks_of<S, 1, typename F::Map, Empty>(op, a.place, a.rows, a.rewards);
  if (chunks.slots) return launch(op, a.place, {chunks.slots, kScanThreads}, scan_chunks_kernel<S, Gae>, a, range, chunks);
  const int group = group_for(a.rows, a.rewards, F::N, kRowThreads), each = kRowThreads / group;
  launch(op, a.place, {(a.rows.count + each - 1) / each, kRowThreads}, scan_rows_kernel<S, Gae>, a, range, group);
}

}  // namespace

double scan_fwd(const ScanArgs& a) {
  if (a.whiten) return scan_whiten(a);
  with_storage([&](auto s) { a.values ? scan_as<decltype(s), true>("gae", a) : scan_as<decltype(s), false>("discounted_returns", a); }, a.rewards, a.values,
               a.old_log_prob, a.ref_log_prob, a.advantages, a.returns);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
