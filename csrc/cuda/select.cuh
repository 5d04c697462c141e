// SPDX-License-Identifier: Apache-2.0
// The tokens among which clip-cov and kl-cov choose, held on the chip between the looks at them, and their means.
#pragma once
#include "reduce.cuh"
#include "rows.cuh"

namespace rlkern {
namespace RLKERN_ISA {

constexpr int kSelectThreads = 128;
constexpr int kSelectBlocks = kEmulated ? 2 : 4;  // of a multiprocessor: 128 registers a thread
// Bytes of a block's shared memory that hold no tokens: the histogram, what folds and the system take. The emulated chip has
// few, and counts none of these.
constexpr int64_t kSelectRoom = kEmulated ? 0 : 8 << 10;

struct SelectSums {
  double tokens = 0, advantage = 0, log_prob = 0;
};
__device__ __forceinline__ SelectSums plus(const SelectSums& x, const SelectSums& y) {
  return {x.tokens + y.tokens, x.advantage + y.advantage, x.log_prob + y.log_prob};
}

// Bits as bytes of 0 and 1.
template <int N>
__device__ __forceinline__ void store_bits(const Operand& x, int64_t base, const Piece& p, unsigned bits) {
  uint8_t* to = static_cast<uint8_t*>(x.data) + base + p.first;
  uint8_t v[N];
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = static_cast<uint8_t>(bits >> i & 1);
  if (N > 1 && p.whole && reinterpret_cast<uintptr_t>(to) % N == 0) {
    using Word = std::conditional_t<N == 8, uint64_t, std::conditional_t<N == 4, uint32_t, uint16_t>>;
    Word word = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) word |= static_cast<Word>(v[i]) << 8 * i;
    *reinterpret_cast<Word*>(to) = word;
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i >= p.begin && i < p.end) to[i] = v[i];
}

// A piece of one long row whose packed rows hold a value each: the row is looked up.
template <class S>
__device__ __forceinline__ Loaded<S> load_of_rows(const Operand& x, const Rows& rows, const Piece& p) {
  Loaded<S> found{};
  int64_t low = 0, high = rows.count - 1;
  while (low < high) {  // the last row that begins here or before
    const int64_t middle = low + (high - low + 1) / 2;
    if (rows.cu[middle] <= p.first + p.begin) low = middle;
    else high = middle - 1;
  }
  if constexpr (Stored<S>::kSame) {
    using T = typename Stored<S>::Element;
    constexpr int N = Stored<S>::kPiece;
    T v[N];
    memcpy(v, &found.raw, kWide);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < p.begin || i >= p.end) continue;
      while (rows.cu[low + 1] <= p.first + i) ++low;
      v[i] = at<T>(x, low * x.row_stride);
    }
    memcpy(&found.raw, v, kWide);
  } else {
    found.value = row_value<ArithmeticOf<S>>(x, low);
  }
  return found;
}

// The tokens of a block: a run of pieces, in order, 128 at a step. The first steps' stay in shared memory.
template <class S>
struct Seen {
  Loaded<S> advantage, log_prob;
  unsigned valid = 0;
};
template <class S>
struct SelectWalk {
  static constexpr int N = Stored<S>::kPiece;
  const PolicySelectArgs& a;
  const Tiling& tiling;
  const int in_shared;
  Loaded<S>* held;
  int64_t begin, steps;
  struct Spot {
    int64_t row = 0;
    Piece piece;
    bool there = false;
  };
  __device__ __forceinline__ SelectWalk(const PolicySelectArgs& args, const Tiling& t, int slots, Loaded<S>* memory)
      : a(args), tiling(t), in_shared(slots), held(memory) {
    const int64_t pieces = t.rows.count * t.pieces, share = (pieces + gridDim.x - 1) / gridDim.x;
    begin = blockIdx.x * share;
    const int64_t end = begin + share < pieces ? begin + share : pieces;
    steps = end > begin ? (end - begin + kSelectThreads - 1) / kSelectThreads : 0;
    last = end;
  }
  __device__ __forceinline__ Spot at(int64_t j) const {
    Spot s;
    int64_t k = 0;
    const int64_t i = begin + j * kSelectThreads + threadIdx.x;
    if (i >= last || !spread(tiling, static_cast<uint64_t>(i), s.row, k)) return s;
    const int lead = lead_of<S>(a.log_prob, tiling.base(a.log_prob, s.row));
    s.there = k < pieces_of<N>(lead, tiling.rows.length);
    s.piece = piece_of<N>(k, lead, tiling.rows.length);
    return s;
  }
  __device__ __forceinline__ Seen<S> read(const Spot& s) const {
    Seen<S> x;
    x.log_prob = load<S>(a.log_prob, tiling.base(a.log_prob, s.row), s.piece);
    if (a.rows.cu && !a.advantages.inner_stride) x.advantage = load_of_rows<S>(a.advantages, a.rows, s.piece);
    else x.advantage = load<S>(a.advantages, tiling.base(a.advantages, s.row), s.piece);
    x.valid = valid_bits<N>(a.mask, tiling.base(a.mask, s.row), s.piece);
    return x;
  }
  __device__ __forceinline__ Seen<S> first_look(int64_t j, const Spot& s) const {
    const Seen<S> x = read(s);
    if (j < in_shared) {
      const int64_t slot = j * kSelectThreads + threadIdx.x, all = int64_t{in_shared} * kSelectThreads;
      held[slot] = x.advantage, held[all + slot] = x.log_prob;
      reinterpret_cast<uint8_t*>(held + 2 * all)[slot] = static_cast<uint8_t>(x.valid);
    }
    return x;
  }
  __device__ __forceinline__ Seen<S> look(int64_t j, const Spot& s) const {
    if (j >= in_shared) return read(s);
    const int64_t slot = j * kSelectThreads + threadIdx.x, all = int64_t{in_shared} * kSelectThreads;
    return {held[slot], held[all + slot], reinterpret_cast<const uint8_t*>(held + 2 * all)[slot]};
  }

 private:
  int64_t last;
};

struct SelectMeans {
  double tokens, advantage, log_prob;
  template <class S>
  __device__ __forceinline__ double covariance(const Seen<S>& x, int i) const {
    return (static_cast<double>(x.advantage[i]) - advantage) * (static_cast<double>(x.log_prob[i]) - log_prob);
  }
};
template <class S>
__device__ __forceinline__ SelectMeans means_of(const SelectWalk<S>& walk, SelectSums* parts) {
  SelectSums mine;
  for (int64_t j = 0; j < walk.steps; ++j) {
    const auto s = walk.at(j);
    if (!s.there) continue;
    const Seen<S> x = walk.first_look(j, s);
#pragma unroll
    for (int i = 0; i < SelectWalk<S>::N; ++i)
      if (x.valid >> i & 1) mine.tokens += 1, mine.advantage += static_cast<double>(x.advantage[i]), mine.log_prob += static_cast<double>(x.log_prob[i]);
  }
  const auto op = [](const SelectSums& x, const SelectSums& y) { return plus(x, y); };
  const SelectSums of_block = block_fold<kSelectThreads>(mine, op);
  if (threadIdx.x == 0) parts[blockIdx.x] = of_block;
  grid_barrier();
  const SelectSums all = fold_parts<kSelectThreads>(parts, static_cast<int>(gridDim.x), SelectSums{}, op);
  return {all.tokens, all.advantage / all.tokens, all.log_prob / all.tokens};
}
__device__ __forceinline__ void put_counts(const PolicySelectArgs& a, double chosen, double tokens) {
  set_element(a.counts, 0, chosen), set_element(a.counts, a.counts.inner_stride, tokens);
}

// ---- the grid -----------------------------------------------------------------------------------------------------------
struct SelectGrid {
  Tiling tiling;
  Grid grid;
  int in_shared = 0;
};
template <class S, class... Parameters>
SelectGrid select_grid(const char* op, const PolicySelectArgs& a, void (*kernel)(Parameters...)) {
  const OnDevice device(a.place.device, op);
  const bool looked_up = a.rows.cu && !a.advantages.inner_stride;
  const Rows rows = a.rows.cu ? Rows{1, a.log_prob.cols, nullptr} : a.rows;
  SelectGrid g;
  g.tiling = tiling_of<S>(rows, a.log_prob, a.old_log_prob, looked_up ? Operand{} : a.advantages, a.mask, a.selected);
  const int64_t pieces = g.tiling.rows.count * g.tiling.pieces, bytes = (2 * sizeof(Loaded<S>) + 1) * kSelectThreads;
  const int64_t step = int64_t{kSelectThreads} * kSelectBlocks * device_number(cudaDevAttrMultiProcessorCount, a.place, op);
  const int64_t share = (pieces + step - 1) / step;
  const int64_t room = device_number(cudaDevAttrMaxSharedMemoryPerMultiprocessor, a.place, op) / kSelectBlocks - kSelectRoom;
  const int64_t fit = room > 0 ? room / bytes : 0, blocks = (pieces + kSelectThreads - 1) / kSelectThreads;
  g.in_shared = static_cast<int>(share < fit ? share : fit);
  g.grid.threads = kSelectThreads, g.grid.shared = g.in_shared * bytes, g.grid.cooperative = true;
  const int64_t together = resident_blocks(op, a.place, kernel, kSelectThreads, g.grid.shared);
  g.grid.blocks = blocks < 1 ? 1 : blocks < together ? blocks : together;
  return g;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
