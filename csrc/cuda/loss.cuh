// SPDX-License-Identifier: Apache-2.0
// What the losses share: rows cut into sections, the mask counted beforehand where the aggregation asks for it, and totals of
// which the last block to finish makes the results.
#pragma once
#include "../math/loss.h"
#include "reduce.cuh"
#include "rows.cuh"

namespace rlkern {
namespace RLKERN_ISA {

constexpr int kLossThreads = 256, kLossWarps = kLossThreads / kWarp;
constexpr int kGroup = 16;                           // tokens whose mask is kept as one word
constexpr int kKeptBytes = kEmulated ? 512 : 12288;  // of a block, at most
constexpr int64_t kRowCounters = (kCounterBytes - kWide) / static_cast<int64_t>(sizeof(unsigned long long));
constexpr int kSectionsOfWarp = 8;  // about as many, so that warps end together
static_assert(kKeptBytes % (kLossWarps * sizeof(uint16_t)) == 0 && kWarp * kVector<double> % kGroup == 0, "a section begins with a group");

struct MaskCount {
  unsigned long long tokens = 0, sequences = 0;
};
__device__ __forceinline__ MaskCount plus(const MaskCount& x, const MaskCount& y) { return {x.tokens + y.tokens, x.sequences + y.sequences}; }

// ---- sections: a warp has one at a time ---------------------------------------------------------------------------------
// Each row is cut into so many sections of whole strips, a strip 32 pieces; those of a short row may be empty.
struct Cut {
  Rows rows;
  int64_t sections = 1;        // of a row
  bool first = false;          // the mask is counted before the sweep
  int kept = 0;                // words of mask that a warp keeps
  unsigned* counter = nullptr;             // of blocks that have finished
  unsigned long long* of_row = nullptr;    // where sections > 1: the valid tokens of each row
  MaskCount* counts = nullptr;             // a block each
};
struct Section {
  int64_t row = 0, length = 0;
  int lead = 0;
  int64_t begin = 0, end = 0;  // pieces
  int64_t word = 0;            // where its mask begins in what the warp keeps
};
__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
// f(section) for those of this warp, empty ones too: its 32 threads call together. `first`: rows are cut at its addresses.
template <class S, class F>
__device__ __forceinline__ void each_section(const Cut& cut, const Operand& first, F&& f) {
  constexpr int N = Stored<S>::kPiece;
  const uint64_t per = static_cast<uint64_t>(cut.sections), all = static_cast<uint64_t>(cut.rows.count) * per;
  Section s;
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * kLossWarps + threadIdx.x / kWarp; i < all; i += static_cast<uint64_t>(gridDim.x) * kLossWarps) {
    const uint64_t row = per == 1 ? i : all <= 0xffffffffu ? static_cast<uint32_t>(i) / static_cast<uint32_t>(per) : i / per;
    s.row = static_cast<int64_t>(row), s.length = cut.rows.len(s.row);
    const char* start = static_cast<const char*>(first.data) + cut.rows.base(first, s.row) * bytes_of(first.dtype);
    s.lead = first.inner_stride ? static_cast<int>(reinterpret_cast<uintptr_t>(start) / static_cast<uintptr_t>(bytes_of(first.dtype)) % kGroup) : 0;
    const int64_t pieces = pieces_of<N>(s.lead, s.length), strips = (pieces + kWarp - 1) / kWarp;
    const int64_t share = (per == 1 ? strips : (strips + cut.sections - 1) / cut.sections) * kWarp;
    s.begin = static_cast<int64_t>(i - row * per) * share;
    s.end = s.begin + share < pieces ? s.begin + share : pieces;
    f(s);
    s.word += share * N / kGroup;
  }
}

// ---- the mask -----------------------------------------------------------------------------------------------------------
// Valid bits as a warp keeps them: a word for each group of a section.
struct KeptMask {
  const Operand& mask;
  const Cut& cut;
  uint16_t* words;
  __device__ __forceinline__ KeptMask(const Operand& mask_, const Cut& cut_, uint16_t* of_block)
      : mask(mask_), cut(cut_), words(of_block + static_cast<int>(threadIdx.x) / kWarp * cut_.kept) {}
  // Of piece k.
  template <int N>
  __device__ __forceinline__ unsigned bits(const Section& s, int64_t k) const {
    const uint64_t t = static_cast<uint64_t>(k - s.begin) * N, word = static_cast<uint64_t>(s.word) + t / kGroup;
    if (word < static_cast<uint64_t>(cut.kept)) return words[word] >> (t % kGroup) & ((1u << N) - 1);
    return valid_bits<N>(mask, cut.rows.base(mask, s.row), piece_of<N>(k, s.lead, s.length));
  }
  // What this thread has seen of a section of pieces of N, by M tokens at once.
  template <int N, int M>
  __device__ __forceinline__ int64_t look(const Section& s) const {
    static_assert(M == kGroup || M * 4 == kGroup, "a group is of one thread or of four");
    const int64_t base = cut.rows.base(mask, s.row), end = s.end * N;
    int64_t tokens = 0;
    for (int64_t t = s.begin * N; t < end; t += kWarp * M) {
      const int64_t mine = t + lane() * M;
      unsigned valid = mine < end ? valid_bits<M>(mask, base, piece_of<M>(mine / M, s.lead, s.length)) : 0;
      tokens += __popc(valid);
      if constexpr (M < kGroup) valid |= from_above(valid, 1) << M, valid |= from_above(valid, 2) << (2 * M);
      const int64_t word = s.word + (mine - s.begin * N) / kGroup;
      if (lane() % (kGroup / M) == 0 && mine < end && word < cut.kept) words[word] = static_cast<uint16_t>(valid);
    }
    return tokens;
  }
};
// By lane 0 of a warp: a section's valid tokens. A row counts as a sequence once.
__device__ __forceinline__ void note(const Cut& cut, int64_t row, int64_t tokens, MaskCount& seen) {
  if (tokens == 0) return;
  seen.tokens += static_cast<unsigned long long>(tokens);
  seen.sequences += cut.sections == 1 || atomicAdd(cut.of_row + row, static_cast<unsigned long long>(tokens)) == 0 ? 1 : 0;
}
__device__ __forceinline__ int64_t add_tokens(int64_t x, int64_t y) { return x + y; }
// The same by a warp that has swept a section, unless the mask was counted first.
__device__ __forceinline__ void note_section(const Cut& cut, const Section& s, unsigned tokens, MaskCount& seen) {
  if (cut.first) return;
  const int64_t all = warp_fold(static_cast<int64_t>(tokens), add_tokens);
  if (lane() == 0) note(cut, s.row, all, seen);
}

// All of the mask, counted and, as far as a block has room, kept; the grid is cooperative. `mine`: what this thread has seen.
template <class S>
__device__ __forceinline__ MaskCount count_first(const Cut& cut, const Operand& first, const KeptMask& kept, MaskCount& mine) {
  constexpr int N = Stored<S>::kPiece;
  each_section<S>(cut, first, [&](const Section& s) {
    const int64_t seen = bytes_of(kept.mask.dtype) == 1 ? kept.look<N, kGroup>(s) : kept.look<N, kGroup / 4>(s);
    const int64_t tokens = warp_fold(seen, add_tokens);
    if (lane() == 0) note(cut, s.row, tokens, mine);
  });
  const auto op = [](const MaskCount& x, const MaskCount& y) { return plus(x, y); };
  const MaskCount of_block = block_fold<kLossThreads>(mine, op);
  if (threadIdx.x == 0) cut.counts[blockIdx.x] = of_block;
  grid_barrier();
  return fold_parts<kLossThreads>(cut.counts, static_cast<int>(gridDim.x), MaskCount{}, op);
}
// The valid tokens of a section's row, once all are counted.
template <int N>
__device__ __forceinline__ double tokens_of_row(const Section& s, const KeptMask& kept) {
  if (kept.cut.sections > 1) return static_cast<double>(__ldcg(kept.cut.of_row + s.row));
  int64_t tokens = 0;
  for (int64_t k = s.begin + lane(); k < s.end; k += kWarp) tokens += __popc(kept.bits<N>(s, k));
  return static_cast<double>(__shfl_sync(kWholeWarp, warp_fold(tokens, add_tokens), 0));
}

// ---- aggregation --------------------------------------------------------------------------------------------------------
// Its numbers, of which a tensor may hold some.
__device__ __forceinline__ AggOptions with_counts(AggOptions o) {
  double* const n[] = {&o.dp_size, &o.tokens, &o.sequences, &o.scale};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (o.counts && *n[i] == -__builtin_inf()) *n[i] = o.counts[i];
  return o;
}

// ---- the end ------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ double larger(double x, double y) { return x < y ? y : x; }
__device__ __forceinline__ PolicyTotals plus(PolicyTotals x, const PolicyTotals& y) {
  x.tokens += y.tokens, x.sequences += y.sequences, x.clipped += y.clipped, x.lower += y.lower, x.neg_log_ratio += y.neg_log_ratio;
  x.loss += y.loss, x.kl += y.kl, x.entropy += y.entropy, x.nonfinite += y.nonfinite;
  x.high = larger(x.high, y.high), x.far = larger(x.far, y.far);
  return x;
}
__device__ __forceinline__ ValueTotals plus(ValueTotals x, const ValueTotals& y) {
  x.tokens += y.tokens, x.sequences += y.sequences, x.clipped += y.clipped, x.predictions += y.predictions;
  x.loss += y.loss, x.nonfinite += y.nonfinite, x.far = larger(x.far, y.far);
  return x;
}
// What each thread has, folded over the grid in one order; finish(all) in one thread. `parts`: a block each.
template <class Totals, class Finish>
__device__ __forceinline__ void finish_loss(const Cut& cut, const Totals& mine, Totals* parts, Finish&& finish) {
  const auto op = [](const Totals& x, const Totals& y) { return plus(x, y); };
  const Totals of_block = block_fold<kLossThreads>(mine, op);
  if (!last_to_finish(of_block, parts, cut.counter)) return;
  const Totals all = fold_parts<kLossThreads>(parts, static_cast<int>(gridDim.x), Totals{}, op);
  if (cut.sections > 1)  // as they were found
    for (int64_t r = threadIdx.x; r < cut.rows.count; r += kLossThreads) cut.of_row[r] = 0;
  if (threadIdx.x == 0) finish(all);
}
struct PutNumber {
  __device__ __forceinline__ void operator()(const Operand& x, int64_t i, double v) const {
    if (x) set_element(x, i, v);
  }
};

// ---- operands of a section ------------------------------------------------------------------------------------------------
// A row of an operand, nothing of which is 0. OrRow: it may be one number, read once. Keep: what a piece needs is found out
// once, for which it takes two registers more.
template <class S, bool OrRow = false, bool Keep = true>
struct Column {
  using A = ArithmeticOf<S>;
  const Operand& x;
  const Rows& rows;
  int64_t row;
  const char* first = nullptr;  // of piece 0, where whole pieces may be loaded as such
  A of_row = A(0);
  __device__ __forceinline__ Column(const Operand& x_, const Rows& rows_, const Section& s) : x(x_), rows(rows_), row(s.row) {
    if (!x || s.begin >= s.end) return;
    const int64_t base = rows.base(x, row);
    if constexpr (OrRow) {
      if (!x.inner_stride) of_row = element<A>(x, base);
    }
    if constexpr (Keep && Stored<S>::kSame) {
      const char* start = static_cast<const char*>(x.data) + (base - s.lead) * static_cast<int64_t>(sizeof(typename Stored<S>::Element));
      if (x.inner_stride && wide(start)) first = start;
    }
  }
  __device__ __forceinline__ Loaded<S> piece(int64_t k, const Piece& p) const {
    if constexpr (Keep && Stored<S>::kSame) {
      if (first && p.whole) return {*reinterpret_cast<const uint4*>(first + k * kWide)};
    }
    return OrRow && !x.inner_stride ? Loaded<S>{} : load<S>(x, rows.base(x, row), p);
  }
  __device__ __forceinline__ A value(const Loaded<S>& v, int i) const {
    if constexpr (OrRow) return x.inner_stride ? v[i] : of_row;
    else return v[i];
  }
};
// For with_storage: what is one number a row has no say.
inline Operand tokens_of(const Operand& x) { return x.inner_stride ? x : Operand{}; }

// A row of a gradient, in the dtype of S or, of a half, in float32.
template <class S>
struct GradColumn {
  using A = ArithmeticOf<S>;
  static constexpr int N = Stored<S>::kPiece;
  const Operand& x;
  const Rows& rows;
  int64_t row;
  __device__ __forceinline__ GradColumn(const Operand& x_, const Rows& rows_, const Section& s) : x(x_), rows(rows_), row(s.row) {}
  __device__ __forceinline__ void put(const Piece& p, const A (&d)[N]) const {
    if constexpr (Stored<S>::kSame && sizeof(typename Stored<S>::Element) == 2) {
      if (x.dtype == Dtype::f32) return put_wide(p, d);
    }
    store<S>(x, rows.base(x, row), p, d);
  }

 private:
  __device__ __forceinline__ void put_wide(const Piece& p, const A (&d)[N]) const {
    float* to = static_cast<float*>(x.data) + rows.base(x, row) + p.first;
    if (p.whole && wide(to)) {
#pragma unroll
      for (int i = 0; i < N; i += kVector<float>) {
        uint4 raw;
        memcpy(&raw, &d[i], kWide);
        __stwb(reinterpret_cast<uint4*>(to + i), raw);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i >= p.begin && i < p.end) to[i] = static_cast<float>(d[i]);
  }
};

// ---- the grid -----------------------------------------------------------------------------------------------------------
// How such a kernel is launched; `parts` is room for a Totals of each block.
template <class Totals>
struct LossGrid {
  Grid grid;
  Cut cut;
  Totals* parts = nullptr;
};
// `count`: the mask, before the sweep. `first`: rows are cut at its addresses.
template <class S, class Totals, class... Parameters>
LossGrid<Totals> loss_grid(const char* op, const Place& place, const Rows& rows, const Operand& first, bool count, void (*kernel)(Parameters...)) {
  constexpr int64_t kStrip = kWarp * Stored<S>::kPiece, kWords = kStrip / kGroup;
  LossGrid<Totals> g;
  const int64_t longest = rows.cu ? first.cols : rows.length, group = kGroup * size_of(first.dtype);
  const bool even =
      !rows.cu && reinterpret_cast<uintptr_t>(first.data) % static_cast<size_t>(group) == 0 && first.row_stride * size_of(first.dtype) % group == 0;
  const int64_t strips = (longest + (even ? 0 : kGroup - 1) + kStrip - 1) / kStrip;
  const int64_t together = resident_blocks(op, place, kernel, kLossThreads, count ? kKeptBytes : 0), wanted = together * kLossWarps * kSectionsOfWarp;
  g.cut.rows = rows, g.cut.first = count;
  int64_t share = strips < 1 ? 1 : strips;
  if (rows.count > 0 && rows.count <= kRowCounters) {
    const int64_t sections = (wanted + rows.count - 1) / rows.count;
    if (sections < share) share = (share + sections - 1) / sections;
    else share = 1;
  }
  g.cut.sections = strips < 1 ? 1 : (strips + share - 1) / share;
  const int64_t all = rows.count * g.cut.sections, blocks = (all + kLossWarps - 1) / kLossWarps;
  g.grid.threads = kLossThreads, g.grid.cooperative = count;
  g.grid.blocks = blocks < 1 ? 1 : blocks < together ? blocks : together;
  const int64_t warps = g.grid.blocks * kLossWarps, words = (all + warps - 1) / warps * share * kWords;
  constexpr int64_t kMost = kKeptBytes / kLossWarps / static_cast<int64_t>(sizeof(uint16_t));
  g.cut.kept = static_cast<int>(!count ? 0 : words < kMost ? words : kMost);
  g.grid.shared = static_cast<size_t>(g.cut.kept) * kLossWarps * sizeof(uint16_t);
  g.cut.counter = counters(place), g.cut.of_row = reinterpret_cast<unsigned long long*>(counters(place) + kWide / sizeof(unsigned));
  g.parts = room_for<Totals>(op, place, 2 * g.grid.blocks);
  static_assert(sizeof(MaskCount) <= sizeof(Totals), "the second half holds the counts");
  g.cut.counts = reinterpret_cast<MaskCount*>(g.parts + g.grid.blocks);
  return g;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
