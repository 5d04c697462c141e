// SPDX-License-Identifier: Apache-2.0
// Few long rows in one pass: a row is cut into chunks, a tile and a block each, by decoupled look-back (Merrill and Garland
// 2016). A chunk publishes its own map at once. What enters it is folded from a fixed set of maps in a fixed order: those of
// the chunks before it, back to the last one whose number kSpan divides, and that one's map of all up to it. So the bits are
// the same whichever block comes first. Blocks take their chunks by tickets, so that those waited for have started.
#pragma once
#include "compose.cuh"

namespace rlkern {
namespace RLKERN_ISA {

constexpr int kSpan = 128;  // chunks from one that publishes all up to it to the next
static_assert(kSpan % kWarp == 0, "the same number a lane");

// ---- the plan: which rows are cut, and what blocks tell each other ---------------------------------------------------------
// Counters: ticket, blocks done; a bit a slot: its map is there; a bit a slot: so is the map of all up to it; chunks done, of
// each row. Room: a map a slot, again for all up to it, a part a slot.
struct Chunks {
  int64_t slots = 0;    // blocks; 0: rows are not cut
  int64_t per_row = 0;  // slots of a row; 0: packed rows, whose lengths the device alone knows
  int64_t tokens = 0;   // of a chunk
  int64_t lead = 0;     // packed: tokens from 16 bytes' multiple to the first
  unsigned *counters = nullptr, *mapped = nullptr, *summed = nullptr, *row_done = nullptr;
  int used = 0;  // counters
  void *maps = nullptr, *sums = nullptr, *parts = nullptr;
};

struct Empty {};
// The one rule: rows are cut where a block each would leave the chip idle (fewer than two a multiprocessor) and where they
// have two chunks or more, on average. `first` cuts rows into pieces; Part: what a chunk leaves to its row, or Empty.
template <class S, int K, class Map, class Part>
Chunks chunks_of(const char* op, const Place& place, const Rows& rows, const Operand& first) {
  constexpr int N = Stored<S>::kPiece, kTokens = K * N * kScanThreads;
  const int64_t total = rows.cu ? first.cols : rows.count * rows.length;
  if (rows.count == 0 || total < 2 * kTokens * rows.count || rows.count >= 2 * device_number(cudaDevAttrMultiProcessorCount, place, op)) return {};
  Chunks c;
  c.tokens = kTokens;
  if (rows.cu) {
    if (Stored<S>::kSame && first.inner_stride)
      c.lead = static_cast<int64_t>(reinterpret_cast<uintptr_t>(first.data) / static_cast<uintptr_t>(size_of(first.dtype)) % N);
    c.slots = (c.lead + total) / kTokens + rows.count;
  } else {
    c.per_row = (rows.length + N - 1 + kTokens - 1) / kTokens, c.slots = rows.count * c.per_row;
  }
  const int64_t words = (c.slots + 31) / 32, used = 2 + 2 * words + rows.count, bytes = c.slots * static_cast<int64_t>(2 * sizeof(Map) + sizeof(Part));
  if (used * 4 > kCounterBytes || bytes > place.bytes - kCounterBytes) return {};  // of hundreds of millions of tokens
  c.used = static_cast<int>(used), c.counters = counters(place);
  c.mapped = c.counters + 2, c.summed = c.mapped + words, c.row_done = c.summed + words;
  Map* const maps = room_for<Map>(op, place, 2 * c.slots);
  c.maps = maps, c.sums = maps + c.slots, c.parts = maps + 2 * c.slots;
  return c;
}

// ---- a block's chunk --------------------------------------------------------------------------------------------------------
struct Spot {
  int64_t row, chunk, slot;
};
// Of packed rows: each has as many slots as it can need, wherever 16 bytes' multiples cut it.
__device__ __forceinline__ int64_t first_slot(const Chunks& c, const Rows& rows, int64_t r) {
  return rows.cu ? (c.lead + rows.cu[r]) / c.tokens + r : r * c.per_row;
}
// The chunk of a number; those that it waits for have smaller ones. The whole block asks.
__device__ __forceinline__ Spot chunk_at(const Chunks& c, const Rows& rows, int64_t number) {
  if (!rows.cu) return {number % rows.count, number / rows.count, number % rows.count * c.per_row + number / rows.count};  // all rows advance
  RLKERN_SHARED(int64_t, found, 1);
  if (threadIdx.x < kWarp) {
    int64_t begun = 0;
    for (int64_t r = threadIdx.x; r < rows.count; r += kWarp) begun += first_slot(c, rows, r) <= number;
    begun = warp_fold(begun, [](int64_t a, int64_t b) { return a + b; });
    if (threadIdx.x == 0) found[0] = begun - 1;
  }
  __syncthreads();
  const int64_t row = found[0];
  __syncthreads();  // the next question's answer is written where this one is read
  return {row, number - first_slot(c, rows, row), number};
}
__device__ __forceinline__ Spot take_chunk(const Chunks& c, const Rows& rows) {
  RLKERN_SHARED(unsigned, ticket, 1);
  if (threadIdx.x == 0) ticket[0] = atomicAdd(c.counters, 1u);
  __syncthreads();
  return chunk_at(c, rows, ticket[0]);
}
// A value that others read, and its bit once the value is there.
template <class T>
__device__ __forceinline__ void publish(T* values, unsigned* bits, int64_t slot, const T& value) {
  values[slot] = value;
  __threadfence();
  atomicOr(&bits[slot / 32], 1u << (slot % 32));
}
__device__ __forceinline__ bool published(const unsigned* bits, int slot) { return watched(&bits[slot / 32]) >> (slot % 32) & 1; }
// Of N slots, a bit each. The word behind the last one is a counter too.
template <int N>
__device__ __forceinline__ unsigned all_published(const unsigned* bits, int slot) {
  const unsigned *word = bits + slot / 32, low = watched(word), high = watched(word + 1);
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (slot % 32)) & ((1u << N) - 1);
}

// The map of all chunks before this one, in the first warp's lane 0. The first warp asks; its chunk is not the row's first.
template <class Map>
__device__ __forceinline__ Map look_back(const Chunks& c, const Spot& s) {
  constexpr int kEach = kSpan / kWarp;
  const auto op = [](const Map& first, const Map& then) { return compose(first, then); };
  const Map *maps = static_cast<const Map*>(c.maps), *sums = static_cast<const Map*>(c.sums);
  const int chunk = static_cast<int>(s.chunk), origin = static_cast<int>(s.slot) - chunk, fixed = (chunk - 1) / kSpan * kSpan;  // slots have a bit each
  const int mine = (fixed ? fixed + 1 : 0) + static_cast<int>(threadIdx.x) * kEach, left = chunk - mine;
  const unsigned wanted = (1u << (left < 0 ? 0 : left < kEach ? left : kEach)) - 1;
  bool found = false;
  while (!found) {
    __threadfence_block();  // the others' turn, where blocks are emulated
    found = !wanted || (all_published<kEach>(c.mapped, origin + mine) & wanted) == wanted;
    if (fixed && threadIdx.x == 0) found = published(c.summed, origin + fixed) && found;
  }
  __threadfence();
  Map of_lane[kEach], folded;
  if (fixed && threadIdx.x == 0) folded = part(sums, origin + fixed);
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (wanted >> i & 1) of_lane[i] = part(maps, origin + mine + i);
#pragma unroll
  for (int i = 0; i < kEach; ++i) folded = compose(folded, of_lane[i]);
  return warp_fold(folded, op);
}

// Publishes this chunk's map; all threads have the map of all chunks before it.
template <class Map>
__device__ __forceinline__ Map enter_chunk(const Chunks& c, const Spot& s, const Map& whole) {
  RLKERN_SHARED(Map, before, 1);
  if (threadIdx.x == 0) publish(static_cast<Map*>(c.maps), c.mapped, s.slot, whole);
  if (threadIdx.x < kWarp) {
    const Map found = s.chunk == 0 ? Map{} : look_back<Map>(c, s);
    if (threadIdx.x == 0) {
      before[0] = found;
      if (s.chunk && s.chunk % kSpan == 0) publish(static_cast<Map*>(c.sums), c.summed, s.slot, compose(found, whole));
    }
  }
  __syncthreads();
  return before[0];
}

// Leaves this chunk's part. In the row's last chunk to finish, and there alone, it gives true: all its parts are written then.
template <class Part>
__device__ __forceinline__ bool last_of_row(const Chunks& c, const Spot& s, const Part& mine, int64_t chunks) {
  RLKERN_SHARED(bool, last, 1);
  if (threadIdx.x == 0) {
    static_cast<Part*>(c.parts)[s.slot] = mine;
    __threadfence();
    last[0] = atomicAdd(&c.row_done[s.row], 1u) == chunks - 1;
  }
  __syncthreads();
  const bool is_last = last[0];
  if (is_last) __threadfence();
  return is_last;
}

// Every block's end: the last one leaves the counters as it found them.
__device__ __forceinline__ void leave_chunks(const Chunks& c) {
  RLKERN_SHARED(bool, last, 1);
  __syncthreads();  // of all that this block waits for
  if (threadIdx.x == 0) {
    __threadfence();
    last[0] = atomicAdd(c.counters + 1, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last[0])
    for (int i = static_cast<int>(threadIdx.x); i < c.used; i += kScanThreads) c.counters[i] = 0;
}

// The walk of scan_row (compose.cuh) over one chunk. Gives what leaves it.
template <class Body>
__device__ __forceinline__ typename Body::Map::State scan_chunk(Body& body, const Chunks& c, const Spot& s) {
  constexpr int K = Body::kPieces;
  using Map = typename Body::Map;
  typename Body::Held held[K];
  typename Map::State entering[K];
  Map map[K];
#pragma unroll
  for (int j = 0; j < K; ++j) held[j] = body.read(body.walk.template at<K>(s.chunk, j));
#pragma unroll
  for (int j = 0; j < K; ++j) map[j] = body.map(held[j], body.walk.template at<K>(s.chunk, j));
  const TileScan<kScanThreads, K, Map> scan(map, 0);
  const Map before = enter_chunk(c, s, scan.whole());
  const auto left = scan.enter(before.after(body.initial()), entering);
#pragma unroll
  for (int j = 0; j < K; ++j) body.write(held[j], body.walk.template at<K>(s.chunk, j), entering[j]);
  return left;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
