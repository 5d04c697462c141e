// SPDX-License-Identifier: Apache-2.0
// GAE with whitened advantages, and discounted returns whitened (REINFORCE++), in one launch.
#include "moments.cuh"
#include "scan_fwd.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

constexpr int kGroup = 128;  // threads of a row
static_assert(kHeldThreads == kScanThreads && kHeldThreads % kGroup == 0, "a chunk is a block's; rows share one");

struct Task {
  int units, run;  // units of a grid; run: consecutive rows of a group, which leave one part
  int64_t count;       // parts
  Moments* parts;
  double* seen;   // how many values there are, where the host reads it
  int in_shared;  // results of a thread
};
// So many tiles of a row from `begin` on, and where their moments go.
struct Stretch {
  int64_t row = 0, part = 0;
  int begin = 0, tiles = 0;
  bool first = true;  // of its part
  Spot spot{};
};

// What a thread keeps of its tiles until all are known: result number `slot` as it would be written, with the mask's bits.
template <class S>
class Kept {
 public:
  using A = ArithmeticOf<S>;
  static constexpr int N = Stored<S>::kPiece;
  static constexpr size_t kBytes = (sizeof(Loaded<S>) + 1) * kHeldThreads;  // of a slot
  __device__ __forceinline__ Kept(Loaded<S>* room, int slots) : room_(room), slots_(slots) {}
  __device__ __forceinline__ bool has(int slot) const { return slot < slots_; }
  __device__ __forceinline__ void put(int slot, const A (&y)[N], unsigned valid, Dtype written) {
    Loaded<S> packed{};
    if constexpr (Stored<S>::kSame) {
      typename Stored<S>::Element v[N];
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = rounded<typename Stored<S>::Element>(y[i]);
      memcpy(&packed.raw, v, kWide);
    } else {
      packed.value = as_written(y[0], written);
    }
    room_[at(slot)] = packed, bits()[at(slot)] = static_cast<unsigned char>(valid);
  }
  __device__ __forceinline__ Loaded<S> get(int slot, unsigned& valid) const { return valid = bits()[at(slot)], room_[at(slot)]; }

 private:
  static __device__ __forceinline__ A as_written(A y, Dtype d) {
    if (d == Dtype::f64) return y;
    if (d == Dtype::f32) return static_cast<A>(static_cast<float>(y));
    return d == Dtype::f16 ? number<A>(rounded<__half>(y)) : number<A>(rounded<__nv_bfloat16>(y));
  }
  static __device__ __forceinline__ int at(int slot) { return slot * kHeldThreads + static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ unsigned char* bits() const { return reinterpret_cast<unsigned char*>(room_ + slots_ * kHeldThreads); }
  Loaded<S>* const room_;
  const int slots_;
};

// What a block goes through, in the same order twice: rows, tile by tile, or chunks of few long ones.
template <bool Cut>
struct Share {
  const Rows& rows;
  const Chunks& chunks;
  const Task& task;
  template <int N, class F>
  __device__ __forceinline__ void each(F&& f) const {
    const Group g(Cut ? kHeldThreads : kGroup);
    for (int unit = blockIdx.x; unit < task.units; unit += static_cast<int>(gridDim.x)) {
      if constexpr (Cut) f(g, chunk<N>(g, unit));
      else
        for (int i = 0; i < task.run; ++i) f(g, run_of_rows<N>(g, unit, i));
    }
  }

 private:
  template <int N>
  __device__ __forceinline__ Stretch chunk(const Group& g, int64_t unit) const {
    const Spot s = chunk_at(chunks, rows, unit);
    return {s.row, s.slot, static_cast<int>(s.chunk), s.chunk < tiles_of<N>(g, rows.len(s.row)) ? 1 : 0, true, s};
  }
  template <int N>
  __device__ __forceinline__ Stretch run_of_rows(const Group& g, int64_t unit, int64_t i) const {
    int64_t longest = rows.length;  // all threads meet at each tile
    for (int64_t q = 0; rows.cu && q < kHeldThreads / kGroup; ++q) {
      const int64_t r = (unit * (kHeldThreads / kGroup) + q) * task.run + i;
      if (r < rows.count && rows.len(r) > longest) longest = rows.len(r);
    }
    return {g.row(unit) * task.run + i, g.row(unit), 0, static_cast<int>(tiles_of<N>(g, longest)), i == 0, Spot{}};
  }
};

__device__ __forceinline__ Moments joint(Moments x, const Moments& y) {
  x.merge(y);
  return x;
}
// The moments of a stretch, from those of a group's threads. By turns: one barrier a stretch is enough.
__device__ __forceinline__ void leave_moments(const Group& g, const Stretch& s, const Moments& of_thread, int turn, const Task& task) {
  RLKERN_SHARED(Moments, of_warp, 2 * kHeldThreads / kWarp);
  Moments* const room = of_warp + turn * (kHeldThreads / kWarp);
  const Moments mine = warp_fold(of_thread, joint);
  if (threadIdx.x % kWarp == 0) room[threadIdx.x / kWarp] = mine;
  __syncthreads();
  if (g.thread != 0 || s.part >= task.count) return;
  Moments all = s.first ? Moments{} : task.parts[s.part];
  for (int w = g.first_warp; w < g.first_warp + g.warps; ++w) all.merge(room[w]);
  task.parts[s.part] = all;
}

template <class S, bool Gae, bool Cut>
struct Whitening {
  using A = ArithmeticOf<S>;
  using F = Forward<S, Gae>;
  static constexpr int N = F::N;
  const ScanArgs& a;
  const KlRange<A>& range;
  const Chunks& chunks;
  const Task& task;
  Kept<S>& kept;

  // The scan, and what becomes of its results.
  __device__ __forceinline__ void scan() {
    RLKERN_SHARED(OfWarp<A>, of_warp, 2 * kHeldThreads / kWarp);
    int slot = 0;
    int turn = 0;
    Share<Cut>{a.rows, chunks, task}.template each<N>([&](const Group& g, const Stretch& s) {
      const F row(a, g, s.row);
      Carry<A> carry = Cut ? Carry<A>{} : row.first();
      ShiftedSums sums;
      for (int j = s.begin; j < s.begin + s.tiles; ++j, ++slot) {
        typename F::Tile t;
        row.read(row.fetch(j), range, t);
        const OfWarp<A> mine = row.scan(t);
        OfWarp<A>* const by_turns = of_warp + (slot & 1) * (kHeldThreads / kWarp);
        if (threadIdx.x % kWarp == 0) by_turns[threadIdx.x / kWarp] = mine;
        __syncthreads();
        if constexpr (Cut) {
          typename F::Map whole;
          if (threadIdx.x == 0) whole = row.whole(by_turns);
          carry = enter_chunk(chunks, s.spot, whole).after(row.first());
        }
        A y[N];
        row.replay(t, row.enter(by_turns, carry), y);
        row.write(t, tile_piece<N, true>(g, j, row.length()), y, !kept.has(slot));  // its bounds are not held meanwhile
        if (kept.has(slot)) kept.put(slot, y, t.valid, (Gae ? a.advantages : a.returns).dtype);
        add(sums, y, t.valid);
      }
      leave_moments(g, s, sums.moments(), turn, task);
      turn ^= 1;
    });
  }
  __device__ __forceinline__ void write(const Moments& m) const {
    const WhitenScale<A, A> scale(m, a.whiten_options);
    const Operand& from = Gae ? a.advantages : a.returns;
    const bool masks = a.whiten_options.mask_output;
    int slot = 0;
    Share<Cut>{a.rows, chunks, task}.template each<N>([&](const Group& g, const Stretch& s) {
      const F row(a, g, s.row);
      for (int j = s.begin; j < s.begin + s.tiles; ++j, ++slot) {
        const Piece p = tile_piece<N, true>(g, j, row.length());
        unsigned valid = 0;
        Loaded<S> v{};
        if (kept.has(slot)) {
          v = kept.get(slot, valid);
        } else {
          v = load<S>(from, row.base(from), p);
          if (masks) valid = valid_bits<N>(a.mask, row.base(a.mask), p);
        }
        A y[N];
#pragma unroll
        for (int i = 0; i < N; ++i) y[i] = masks && !(valid >> i & 1) ? A(0) : scale(v[i]);
        store<S>(a.advantages, row.base(a.advantages), p, y);
      }
    });
  }

 private:
  static __device__ __forceinline__ void add(ShiftedSums& sums, const A (&y)[N], unsigned valid) {
    Pair of_piece;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (valid >> i & 1) of_piece.a += static_cast<double>(y[i]), of_piece.b += 1;
    if (!sums.centered) sums.center_on(of_piece);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (valid >> i & 1) sums.add(static_cast<double>(y[i]));
  }
};

// plan scan_whiten_kernel: at most as many blocks of 256 threads as the chip holds, launched cooperatively. A group of 128 owns
//   every so many-th row, or, where rows are few and long, a block every so many-th chunk, with look-back as above. The
//   advantages (of GAE) or returns of a block's first tiles stay in shared memory until count, mean and M2 of
//   all are known. Bytes per element: as the scan's without whitening; of what the chip cannot hold, one output is written,
//   read and written again. Numerics: the scan's; float64 moments of the values before they are rounded, of each thread's part
//   of a row, then of rows, merged in an order that the rows' lengths alone decide.
// budget scan_whiten_kernel<S, false, false>: 128 registers, loads 2, stores 1
// budget scan_whiten_kernel<S, true, false>: 128 registers, loads 4, stores 2
// budget scan_whiten_kernel<S, false, true>: 128 registers, loads 2, stores 1
// budget scan_whiten_kernel<S, true, true>: 192 registers, loads 4, stores 2
template <class S, bool Gae, bool Cut>
__global__ void __launch_bounds__(kHeldThreads, Cut&& Gae && !std::is_same_v<S, float> ? 1 : kHeldBlocks)
    scan_whiten_kernel(const ScanArgs a, const KlRange<ArithmeticOf<S>> range, const Chunks chunks, const Task task) {
  RLKERN_DYNAMIC_SHARED(Loaded<S>, room);
  Kept<S> kept(room, task.in_shared);
  Whitening<S, Gae, Cut> whitening{a, range, chunks, task, kept};
  whitening.scan();
  __threadfence();
  grid_barrier();
  const Moments all = fold_parts<kHeldThreads>(task.parts, static_cast<int>(task.count), Moments{}, joint);
  if (task.seen && blockIdx.x == 0 && threadIdx.x == 0) *task.seen = all.count;
  whitening.write(all);
  if constexpr (Cut) leave_chunks(chunks);
}

// Results that the chip can keep, of a thread in shared memory: as many as it may need, of what two blocks a multiprocessor have.
template <class S>
int in_shared(const char* op, const ScanArgs& a, const Chunks& chunks, int64_t units, int64_t run) {
  const int64_t together = device_number(cudaDevAttrMultiProcessorCount, a.place, op) * kHeldBlocks, tile = kGroup * Stored<S>::kPiece;
  const int64_t length = a.rows.cu ? 2 * a.rewards.cols / a.rows.count : a.rows.length, tiles = chunks.slots ? 1 : (length + tile - 1) / tile;
  const int64_t need = (units + together - 1) / together * run * tiles;
  const int64_t most = device_number(cudaDevAttrMaxSharedMemoryPerMultiprocessor, a.place, op) / kHeldBlocks - (3 << 10);  // less the kernel's own
  const int64_t fit = most / static_cast<int64_t>(Kept<S>::kBytes);
  return static_cast<int>(need < 0 ? 0 : need < fit ? need : fit);
}

template <class S, bool Gae>
double whiten_as(const char* op, const ScanArgs& a) {
  if (a.rows.count == 0) return 0;
  const OnDevice device(a.place.device, op);
  const Chunks chunks = chunks_of<S, 1, typename Forward<S, Gae>::Map, Moments>(op, a.place, a.rows, a.rewards);
  constexpr int64_t kRows = kHeldThreads / kGroup;  // of a unit
  const int64_t most_parts = (a.place.bytes - kCounterBytes) / static_cast<int64_t>(sizeof(Moments));
  const auto kernel = chunks.slots ? scan_whiten_kernel<S, Gae, true> : scan_whiten_kernel<S, Gae, false>;
  double seen = 0;
  Task task{};
  task.run = chunks.slots ? 1 : static_cast<int>((a.rows.count + most_parts - 1) / most_parts);
  task.count = chunks.slots ? chunks.slots : (a.rows.count + task.run - 1) / task.run;
  task.units = static_cast<int>(chunks.slots ? chunks.slots : (task.count + kRows - 1) / kRows);
  task.parts = chunks.slots ? static_cast<Moments*>(chunks.parts) : room_for<Moments>(op, a.place, task.count);
  task.seen = kEmulated ? &seen : nullptr;
  task.in_shared = in_shared<S>(op, a, chunks, task.units, task.run);
  const size_t shared = static_cast<size_t>(task.in_shared) * Kept<S>::kBytes;
  const int64_t together = resident_blocks(op, a.place, kernel, kHeldThreads, shared);
  const Grid grid{task.units < together ? task.units : together, kHeldThreads, shared, true};
  launch(op, a.place, grid, kernel, a, KlRange<ArithmeticOf<S>>(a.kl), chunks, task);
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
