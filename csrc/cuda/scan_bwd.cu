// SPDX-License-Identifier: Apache-2.0
// The adjoints of GAE and of discounted returns: the same recurrences in the other direction of time.
#include "scan_bwd.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

constexpr int kRowThreads = 128;

// plan scan_bwd_rows_kernel: as scan_rows_kernel, from the row's start. Bytes per element: the cotangents of advantages (of GAE)
//   and returns and the mask read once, the wanted gradients written once; one number a row for the bootstrap.
// budget scan_bwd_rows_kernel<S, false>: 128 registers, loads 1, stores 1
// budget scan_bwd_rows_kernel<S, true>: 128 registers, loads 2, stores 2
template <class S, bool Gae>
__global__ void __launch_bounds__(kRowThreads, 4) scan_bwd_rows_kernel(const ScanGradArgs a, const int group) {
  using A = ArithmeticOf<S>;
  using B = Backward<S, Gae>;
  RLKERN_SHARED(FlowOfWarp<A>, of_warp, 2 * kRowThreads / kWarp);
  const Group g(group);
  const B row(a, g, g.row(blockIdx.x));
  typename B::Fetched next = row.fetch(0);
  Flow<A> carry;
  const int64_t tiles = tiles_of_block(a.rows, blockIdx.x, group, B::N);
  for (int64_t j = 0; j < tiles; ++j) {
    const typename B::Fetched held = next;
    next = row.fetch(j + 1);
    typename B::Tile t;
    row.read(held, t);
    const FlowOfWarp<A> mine = row.scan(t);
    FlowOfWarp<A>* const room = of_warp + (j & 1) * (kRowThreads / kWarp);  // by turns: one barrier a tile is enough
    if (threadIdx.x % kWarp == 0) room[threadIdx.x / kWarp] = mine;
    __syncthreads();
    A d_reward[B::N], d_value[B::N];
    row.replay(t, row.enter(room, carry), d_reward, d_value);
    row.write(held.piece, d_reward, d_value);
  }
  if (a.d_bootstrap && g.thread == 0 && g.row(blockIdx.x) < a.rows.count) row.write_bootstrap(carry);
}

// plan scan_bwd_chunks_kernel: as scan_chunks_kernel, from the row's start. Bytes per element as above, and two maps a chunk.
// budget scan_bwd_chunks_kernel<S, false>: 128 registers, loads 1, stores 1
// budget scan_bwd_chunks_kernel<S, true>: 128 registers, loads 2, stores 2
template <class S, bool Gae>
__global__ void __launch_bounds__(kScanThreads, 2) scan_bwd_chunks_kernel(const ScanGradArgs a, const Chunks chunks) {
  using A = ArithmeticOf<S>;
  using B = Backward<S, Gae>;
  RLKERN_SHARED(FlowOfWarp<A>, of_warp, kScanThreads / kWarp);
  const Spot s = take_chunk(chunks, a.rows);
  const Group g(kScanThreads);
  const B row(a, g, s.row);
  const int64_t tiles = row.tiles();
  Flow<A> carry;
  if (s.chunk < tiles) {
    const typename B::Fetched held = row.fetch(s.chunk);
    typename B::Tile t;
    row.read(held, t);
    const FlowOfWarp<A> mine = row.scan(t);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = mine;
    __syncthreads();
    typename B::Map whole;
    if (threadIdx.x == 0) whole = row.whole(of_warp);
    carry = enter_chunk(chunks, s, whole).after(carry);
    A d_reward[B::N], d_value[B::N];
    row.replay(t, row.enter(of_warp, carry), d_reward, d_value);
    row.write(held.piece, d_reward, d_value);
  }
  if (a.d_bootstrap && threadIdx.x == 0 && (s.chunk == tiles - 1 || tiles + s.chunk == 0)) row.write_bootstrap(carry);
  leave_chunks(chunks);
}

template <class S, bool Gae>
void scan_bwd_as(const char* op, const ScanGradArgs& a) {
  using B = Backward<S, Gae>;
  const Chunks chunks = chunks_of<S, 1, typename B::Map, Empty>(op, a.place, a.rows, a.grad_returns);
  if (chunks.slots) return launch(op, a.place, {chunks.slots, kScanThreads}, scan_bwd_chunks_kernel<S, Gae>, a, chunks);
  const int group = group_for(a.rows, a.grad_returns, B::N, kRowThreads), each = kRowThreads / group;
  launch(op, a.place, {(a.rows.count + each - 1) / each, kRowThreads}, scan_bwd_rows_kernel<S, Gae>, a, group);
}

}  // namespace

double scan_bwd(const ScanGradArgs& a) {
  with_storage([&](auto s) { a.gae ? scan_bwd_as<decltype(s), true>("gae", a) : scan_bwd_as<decltype(s), false>("discounted_returns", a); }, a.grad_returns,
               a.grad_advantages, a.d_rewards, a.d_values);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
