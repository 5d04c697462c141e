// SPDX-License-Identifier: Apache-2.0
// GAE with whitened advantages, and discounted returns whitened (REINFORCE++), in one launch.
#include "moments.cuh"
#include "scan_fwd.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

constexpr int kKept = 4;  // tiles' results in registers; further ones stay in shared memory

// What a thread keeps of its tiles until all are known: result number `slot` as it would be written, with the mask's bits.
template <class S>
class Kept {
 public:
  using A = ArithmeticOf<S>;
  static constexpr int N = Stored<S>::kPiece;
  static constexpr size_t kBytes = (sizeof(Loaded<S>) + 1) * kHeldThreads;  // of a slot
  __device__ __forceinline__ Kept(Loaded<S>* room, int slots)
      : room_(room + threadIdx.x), bits_(reinterpret_cast<unsigned char*>(room + slots * kHeldThreads) + threadIdx.x), slots_(kKept + slots) {}
  __device__ __forceinline__ bool has(int64_t slot) const { return slot < slots_; }
  __device__ __forceinline__ void put(int64_t slot, const A (&y)[N], unsigned valid) {
    const Loaded<S> packed = pack(y);
#pragma unroll
    for (int k = 0; k < kKept; ++k)
      if (slot == k) kept_[k] = packed, kept_bits_[k] = static_cast<unsigned char>(valid);
    if (slot >= kKept) room_[(slot - kKept) * kHeldThreads] = packed, bits_[(slot - kKept) * kHeldThreads] = static_cast<unsigned char>(valid);
  }
  __device__ __forceinline__ Loaded<S> get(int64_t slot, unsigned& valid) const {
    Loaded<S> found{};
    if (slot >= kKept) return valid = bits_[(slot - kKept) * kHeldThreads], room_[(slot - kKept) * kHeldThreads];
#pragma unroll
    for (int k = 0; k < kKept; ++k)
      if (slot == k) found = kept_[k], valid = kept_bits_[k];
    return found;
  }

 private:
  static __device__ __forceinline__ Loaded<S> pack(const A (&y)[N]) {
    Loaded<S> packed{};
    if constexpr (Stored<S>::kSame) {
      typename Stored<S>::Element v[N];
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = rounded<typename Stored<S>::Element>(y[i]);
      memcpy(&packed.raw, v, kWide);
    } else {
      packed.value = y[0];
    }
    return packed;
  }
  Loaded<S> kept_[kKept] = {};
  unsigned char kept_bits_[kKept] = {};
  Loaded<S>* const room_;
  unsigned char* const bits_;
  const int slots_;
};

// What a block goes through, in the same order twice: its rows, tile by tile, or its chunks. Chunk u waits for those of smaller
// numbers alone.
struct Share {
  const Rows& rows;
  const Chunks& chunks;
  int group, piece;
  int64_t units;
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {  // f(number, row, first tile, how many, its chunk)
    const Group g(group);
    for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
      if (!chunks.slots) {
        f(g, g.row(unit), 0, tiles_of_block(rows, unit, group, piece), Spot{});
        continue;
      }
      const Spot s{unit % rows.count, unit / rows.count, unit % rows.count * chunks.per_row + unit / rows.count};
      f(g, s.row, s.chunk, s.chunk * kHeldThreads * piece < rows.length ? 1 : 0, s);
    }
  }
};

// plan scan_whiten_kernel: at most as many blocks of 256 threads as the chip holds, launched cooperatively; each takes every so
//   many-th row (or several short ones), or, where rows are few and long, every so many-th chunk, with look-back as above. The
//   advantages (of GAE) or returns of a block's first tiles stay in registers and shared memory until count, mean and M2 of
//   all are known. Bytes per element: as the scan's without whitening; of what the chip cannot hold, one output is written,
//   read and written again. Numerics: the scan's; float64 moments of the values before they are rounded, folded in one order.
// budget scan_whiten_kernel<S, false>: 128 registers, loads 2, stores 1
// budget scan_whiten_kernel<S, true>: 128 registers, loads 4, stores 2
template <class S, bool Gae>
__global__ void __launch_bounds__(kHeldThreads, kHeldBlocks)
    scan_whiten_kernel(const ScanArgs a, const KlRange<ArithmeticOf<S>> range, const Chunks chunks, const int group, const int64_t units, const int in_shared,
                       Part* parts, double* count) {
  using A = ArithmeticOf<S>;
  using F = Forward<S, Gae>;
  RLKERN_SHARED(OfWarp<A>, of_warp, 2 * kHeldThreads / kWarp);
  RLKERN_DYNAMIC_SHARED(Loaded<S>, room);
  Kept<S> kept(room, in_shared);
  const Share share{a.rows, chunks, group, F::N, units};
  ShiftedSums sums;
  int64_t slot = 0;
  share.each([&](const Group& g, int64_t r, int64_t begin, int64_t tiles, const Spot& s) {
    const F row(a, g, r);
    typename F::Fetched next = row.fetch(begin);
    Carry<A> carry = row.first();
    for (int64_t j = begin; j < begin + tiles; ++j, ++slot) {
      const typename F::Fetched held = next;
      if (!chunks.slots) next = row.fetch(j + 1);
      typename F::Tile t;
      row.read(held, range, t);
      const OfWarp<A> mine = row.scan(t);
      OfWarp<A>* const by_turns = of_warp + (slot & 1) * (kHeldThreads / kWarp);
      if (threadIdx.x % kWarp == 0) by_turns[threadIdx.x / kWarp] = mine;
      __syncthreads();
      if (chunks.slots) {
        typename F::Map whole;
        if (threadIdx.x == 0) whole = row.whole(by_turns);
        carry = enter_chunk(chunks, s, whole).after(carry);
      }
      A y[F::N];
      row.replay(t, row.enter(by_turns, carry), y);
      row.write(t, held.piece, y, !kept.has(slot));
      if (kept.has(slot)) kept.put(slot, y, t.valid);
      Pair of_piece;
#pragma unroll
      for (int i = 0; i < F::N; ++i)
        if (t.valid >> i & 1) of_piece.a += static_cast<double>(y[i]), of_piece.b += 1;
      if (!sums.centered) sums.center_on(of_piece);
#pragma unroll
      for (int i = 0; i < F::N; ++i)
        if (t.valid >> i & 1) sums.add(static_cast<double>(y[i]));
    }
  });
  const Part all = scope_fold<false>(Part{sums.moments(), 0}, parts, Part{}, merged);
  if (count && blockIdx.x == 0 && threadIdx.x == 0) *count = all.moments.count;

  const WhitenScale<A, A> scale(all.moments, a.whiten_options);
  const Operand& from = Gae ? a.advantages : a.returns;
  slot = 0;
  share.each([&](const Group& g, int64_t r, int64_t begin, int64_t tiles, const Spot&) {
    const F row(a, g, r);
    for (int64_t j = begin; j < begin + tiles; ++j, ++slot) {
      const Piece p = tile_piece<F::N, true>(g, j, row.length());
      Loaded<S> v{};
      unsigned valid = 0;
      if (kept.has(slot)) {
        v = kept.get(slot, valid);
      } else {
        v = load<S>(from, row.base(from), p);
        if (a.whiten_options.mask_output) valid = valid_bits<F::N>(a.mask, row.base(a.mask), p);
      }
      A y[F::N];
#pragma unroll
      for (int i = 0; i < F::N; ++i) y[i] = a.whiten_options.mask_output && !(valid >> i & 1) ? A(0) : scale(v[i]);
      store<S>(a.advantages, row.base(a.advantages), p, y);
    }
  });
  if (chunks.slots) leave_chunks(chunks);
}

template <class S, bool Gae>
double whiten_as(const char* op, const ScanArgs& a) {
  using F = Forward<S, Gae>;
  const auto kernel = scan_whiten_kernel<S, Gae>;
  if (a.rows.count == 0) return 0;
  double seen = 0;
  const OnDevice device(a.place.device, op);
  Chunks chunks;
  if (!a.rows.cu) chunks = chunks_of<S, 1, typename F::Map, Part>(op, a.place, a.rows, a.rewards);
  const int group = chunks.slots ? kHeldThreads : group_for(a.rows, a.rewards, F::N, kHeldThreads), each = kHeldThreads / group;
  const int64_t units = chunks.slots ? chunks.slots : (a.rows.count + each - 1) / each;
  // as many slots as a block may need, of what two blocks a multiprocessor have for them
  const int64_t length = !a.rows.cu ? a.rows.length : 2 * a.rewards.cols / a.rows.count,
                tiles = chunks.slots ? 1 : (length + group * F::N - 1) / (group * F::N);
  const int64_t processors = device_number(cudaDevAttrMultiProcessorCount, a.place, op), together = processors * kHeldBlocks;
  const int64_t need = (units + together - 1) / together * tiles - kKept;
  const int64_t fit = (device_number(cudaDevAttrMaxSharedMemoryPerMultiprocessor, a.place, op) / kHeldBlocks - 2560) / static_cast<int64_t>(Kept<S>::kBytes);
  const int in_shared = static_cast<int>(need < 0 ? 0 : need < fit ? need : fit);
  const size_t shared = static_cast<size_t>(in_shared) * Kept<S>::kBytes;
  const int64_t most = resident_blocks(op, a.place, kernel, kHeldThreads, shared), blocks = units < most ? units : most;
  Part* const parts = chunks.slots ? static_cast<Part*>(chunks.parts) : room_for<Part>(op, a.place, blocks);
  const Grid grid{blocks, kHeldThreads, shared, true};
  launch(op, a.place, grid, kernel, a, KlRange<ArithmeticOf<S>>(a.kl), chunks, group, units, in_shared, parts, kEmulated ? &seen : nullptr);
  return seen;
}

}  // namespace

double scan_whiten(const ScanArgs& a) {
  double count = 0;
  with_storage([&](auto s) { count = a.values ? whiten_as<decltype(s), true>("gae", a) : whiten_as<decltype(s), false>("discounted_returns", a); }, a.rewards,
               a.values, a.old_log_prob, a.ref_log_prob, a.advantages, a.returns);
  return count;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
