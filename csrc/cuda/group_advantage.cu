// SPDX-License-Identifier: Apache-2.0
// Outcome advantages: row sums, their groups, one value broadcast over each row's mask, in one launch.
#include "group.cuh"
#include "held.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

constexpr int kThreads = 256, kBlocks = 3;  // of a multiprocessor: 80 registers a thread
constexpr int kWarps = kThreads / kWarp;
constexpr int kAhead = 4;                // pieces that a thread loads before the first is used
constexpr int64_t kLeast = 128;          // pieces of a strip at least
constexpr int64_t kOtherShared = 3 << 10;  // bytes of a block: what folds and the system take
static_assert(kThreads % kWarp == 0 && kLeast % kWarp == 0, "whole warps");

// A row in `parts` strips, each a warp's; a warp has every so many-th of them.
struct Strips {
  int64_t count = 0, parts = 1;
  int in_shared = 0;  // pieces of a thread whose mask stays in shared memory
};
template <class S>
struct Strip {
  static constexpr int N = Stored<S>::kPiece;
  int64_t row, length, begin, end;  // pieces
  int lead;
  __device__ __forceinline__ Strip(const GroupAdvantageArgs& a, const Strips& strips, int64_t u) {
    row = strips.parts == 1 ? u : u / strips.parts;
    length = a.rows.len(row), lead = lead_of<S>(a.rewards, a.rows.base(a.rewards, row));
    const int64_t pieces = pieces_of<N>(lead, length), i = u - row * strips.parts;
    begin = pieces * i / strips.parts, end = pieces * (i + 1) / strips.parts;
  }
};
// Warps are numbered through the blocks first: few of them are on as many multiprocessors.
__device__ __forceinline__ int64_t team_number(int threads) { return static_cast<int64_t>(threadIdx.x / threads) * gridDim.x + blockIdx.x; }
__device__ __forceinline__ int64_t slot_of(int j) { return static_cast<int64_t>(j) * kThreads + threadIdx.x; }

// Of each strip the sum of the rewards and the number of valid tokens; the mask's bits stay as far as they fit.
template <class S>
__device__ __forceinline__ void sum_strips(const GroupAdvantageArgs& a, const Strips& strips, unsigned char* bits, Pair* sums) {
  constexpr int N = Stored<S>::kPiece;
  const bool read = !a.components;  // they stand for the rewards
  int j = 0;
#pragma unroll 1
  for (int64_t u = team_number(kWarp); u < strips.count; u += static_cast<int64_t>(gridDim.x) * kWarps) {
    const Strip<S> s(a, strips, u);
    const int64_t base = a.rows.base(a.rewards, s.row), mask = a.rows.base(a.mask, s.row);
    Pair mine;
#pragma unroll 1
    for (int64_t k = s.begin + threadIdx.x % kWarp; k < s.end; k += kAhead * kWarp) {
      Loaded<S> v[kAhead] = {};
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (read && k + i * kWarp < s.end) v[i] = load<S>(a.rewards, base, piece_of<N>(k + i * kWarp, s.lead, s.length));
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (k + i * kWarp >= s.end) break;
        const unsigned valid = valid_bits<N>(a.mask, mask, piece_of<N>(k + i * kWarp, s.lead, s.length));
        if (j < strips.in_shared) bits[slot_of(j)] = static_cast<unsigned char>(valid);
        mine.b += __popc(valid), ++j;
#pragma unroll
        for (int n = 0; n < N; ++n) mine.a += static_cast<double>(v[i][n]);
      }
    }
    mine = warp_fold(mine, plus);
    if (threadIdx.x % kWarp == 0) sums[u] = mine;
  }
}
// A warp a row.
__device__ __forceinline__ void merge_strips(const GroupAdvantageArgs& a, const Strips& strips, const Pair* sums, Pair* rows) {
#pragma unroll 1
  for (int64_t r = team_number(kWarp); r < a.rows.count; r += static_cast<int64_t>(gridDim.x) * kWarps) {
    Pair mine;
    for (int64_t i = threadIdx.x % kWarp; i < strips.parts; i += kWarp) mine = plus(mine, part(sums, r * strips.parts + i));
    mine = warp_fold(mine, plus);
    if (threadIdx.x % kWarp == 0) rows[r] = mine;
  }
}

// ---- between the sweeps -------------------------------------------------------------------------------------------------
// Of all rows: the moments of their tokens, which are as many as are valid; how many scores are not 0, how many groups have one row.
struct Totals {
  Moments tokens;
  double nonzero = 0, lone = 0;
};
__device__ __forceinline__ Totals merged(Totals x, const Totals& y) {
  x.tokens.merge(y.tokens), x.nonzero += y.nonzero, x.lone += y.lone;
  return x;
}
struct RowSums {
  const Pair* rows;
  __device__ __forceinline__ double operator()(int64_t r) const { return part(rows, r).a; }
};
struct RowCounts {
  const Pair* rows;
  __device__ __forceinline__ double operator()(int64_t r) const { return part(rows, r).b; }
};
struct Component {
  const Operand& x;
  int64_t k;
  __device__ __forceinline__ double operator()(int64_t r) const { return element<double>(x, r * x.row_stride + k * x.inner_stride); }
};
// A team a group: the value of each row in the place of its sum.
template <int Threads>
__device__ __forceinline__ void values_of_groups(const GroupAdvantageArgs& a, Pair* rows, int& nonzero, int& lone) {
  const bool weighs = a.options.baseline == Baseline::length_weighted;
#pragma unroll 1
  for (int64_t g = team_number(Threads); g < a.groups.count; g += static_cast<int64_t>(gridDim.x) * (kThreads / Threads)) {
    const int64_t K = a.components.cols;
#pragma unroll 1
    for (int64_t k = 0; a.components && k < K; ++k) {
      const Members<Threads, Component> members(a.groups, g, false, Component{a.components, k});
      const GroupScale scale(moments_of(members, false, RowCounts{rows}), a.options);
      const double weight = row_value<double>(a.component_weights, k);
      members.each([&](int64_t r, double s, int64_t) {
        const double value = (k ? rows[r].a : 0.0) + weight * scale(s);
        rows[r].a = value, nonzero += k + 1 == K && value != 0;
      });
    }
    if (a.components) continue;
    const Members<Threads, RowSums> members(a.groups, g, false, RowSums{rows});
    const GroupMoments m = moments_of(members, weighs, RowCounts{rows});
    if (a.options.baseline == Baseline::second_best) {
      BestTwo two;
      members.each([&](int64_t r, double s, int64_t) { two.add(s, r); });
      two = team_fold<Threads>(two, [](BestTwo x, const BestTwo& y) {
        x.merge(y);
        return x;
      });
      const double lead = two.lead() * inverse_scale(m, a.options);
      members.each([&](int64_t r, double s, int64_t) { rows[r].a = r == two.row ? lead : 0.0, nonzero += s != 0; });
      if (threadIdx.x % Threads == 0) lone += m.count == 1;
    } else {
      const GroupScale scale(m, a.options);
      members.each([&](int64_t r, double s, int64_t) { rows[r].a = scale(s), nonzero += s != 0; });
    }
  }
}
// Of the same rows again, each by the thread that has written it.
template <int Threads>
__device__ __forceinline__ Moments tokens_of_groups(const GroupAdvantageArgs& a, const Pair* rows) {
  Moments m;
#pragma unroll 1
  for (int64_t g = team_number(Threads); g < a.groups.count; g += static_cast<int64_t>(gridDim.x) * (kThreads / Threads))
    for (int64_t i = a.groups.offsets[g] + threadIdx.x % Threads; i < a.groups.offsets[g + 1]; i += Threads) {
      const Pair row = part(rows, a.groups.order[i]);
      m.merge({row.b, row.a, 0});
    }
  return m;
}
template <int Threads>
__device__ __forceinline__ Totals values_and_totals(const GroupAdvantageArgs& a, Pair* rows) {
  int nonzero = 0, lone = 0;
  values_of_groups<Threads>(a, rows, nonzero, lone);
  return {a.whiten ? tokens_of_groups<Threads>(a, rows) : Moments{}, static_cast<double>(nonzero), static_cast<double>(lone)};
}
// What becomes of a row's value: times a factor, then whitened.
struct Finish {
  double factor = 1, mean = 0, rstd = 1, add = 0;
  __device__ __forceinline__ Finish(const GroupAdvantageArgs& a, const Totals& totals) {
    if (a.f_norm != 0) factor = static_cast<double>(a.rows.count) / (totals.nonzero > 1 ? totals.nonzero : 1) / a.f_norm;
    if (!a.whiten) return;
    Moments m = totals.tokens;
    m.mean *= factor, m.m2 *= factor * factor;
    mean = m.mean, rstd = reciprocal_std(m, a.whiten_options), add = a.whiten_options.shift_mean ? 0 : m.mean;
  }
  __device__ __forceinline__ double operator()(double v) const { return (v * factor - mean) * rstd + add; }
};

template <class S>
__device__ __forceinline__ void write_strips(const GroupAdvantageArgs& a, const Strips& strips, const unsigned char* bits, const Pair* rows,
                                             const Finish& finish) {
  using A = ArithmeticOf<S>;
  constexpr int N = Stored<S>::kPiece;
  int j = 0;
#pragma unroll 1
  for (int64_t u = team_number(kWarp); u < strips.count; u += static_cast<int64_t>(gridDim.x) * kWarps) {
    const Strip<S> s(a, strips, u);
    const int64_t out = a.rows.base(a.advantages, s.row), mask = a.rows.base(a.mask, s.row);
    const A value = A(finish(part(rows, s.row).a));
#pragma unroll 1
    for (int64_t k = s.begin + threadIdx.x % kWarp; k < s.end; k += kWarp, ++j) {
      const Piece p = piece_of<N>(k, s.lead, s.length);
      const unsigned valid = j < strips.in_shared ? bits[slot_of(j)] : valid_bits<N>(a.mask, mask, p);
      A y[N];
#pragma unroll
      for (int n = 0; n < N; ++n) y[n] = valid >> n & 1 ? value : A(0);
      store<S>(a.advantages, out, p, y);
    }
  }
}

// plan group_advantage_kernel: a cooperative grid of at most as many blocks as the chip holds. A warp owns every so many-th strip,
//   a row or a part of one; a team (a warp, or a block where groups are large) every so many-th group. Sums of strips; barrier;
//   where rows are in parts, sums of rows; barrier; the value of each row from its group, with the grid's totals in the same
//   look; barrier; the values over the mask. A piece's mask stays in shared memory as a byte until then. Bytes per element:
//   rewards and mask read once, the result written once; of a mask that shared memory cannot hold, read twice. Two numbers a
//   row go through the caches. Numerics: float64, in a fixed order; the tokens of a row are equal, so whitening needs its value
//   and their number only.
// budget group_advantage_kernel<S>: 80 registers, loads 4, stores 1
template <class S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    group_advantage_kernel(const GroupAdvantageArgs a, const Strips strips, const bool large, Pair* sums, Pair* rows, Totals* parts, double* judged) {
  RLKERN_DYNAMIC_SHARED(unsigned char, bits);
  sum_strips<S>(a, strips, bits, sums);
  grid_barrier();
  if (strips.parts > 1) {
    merge_strips(a, strips, sums, rows);
    grid_barrier();
  }
  Totals totals = large ? values_and_totals<kThreads>(a, rows) : values_and_totals<kWarp>(a, rows);
  const bool asked = a.whiten || a.f_norm != 0 || judged;
  if (asked) {
    totals = block_fold<kThreads>(totals, merged);
    if (threadIdx.x == 0) parts[blockIdx.x] = totals;
  }
  grid_barrier();
  if (asked) totals = fold_parts<kThreads>(parts, static_cast<int>(gridDim.x), Totals{}, merged);
  if (judged && blockIdx.x == 0 && threadIdx.x == 0) *judged = a.whiten ? totals.tokens.count : totals.lone;
  if (a.advantages) write_strips<S>(a, strips, bits, rows, Finish(a, totals));
}

template <class S>
void advantage_as(const char* op, const GroupAdvantageArgs& a, double* judged) {
  const OnDevice device(a.place.device, op);
  const int64_t rows = a.rows.count, tokens = a.rows.cu ? a.rewards.cols : rows * a.rows.length;
  const int64_t pieces = tokens / rows / Stored<S>::kPiece + 2;  // of a row; of packed ones the mean
  const int64_t warps = static_cast<int64_t>(device_number(cudaDevAttrMultiProcessorCount, a.place, op)) * kBlocks * kWarps;
  Strips strips;
  const int64_t most = pieces / kLeast;
  strips.parts = rows < warps ? warps / rows : 1;
  strips.parts = most < 1 ? 1 : strips.parts < most ? strips.parts : most;
  strips.count = rows * strips.parts;
  const int64_t of_warp = (strips.count + warps - 1) / warps, of_strip = ((pieces + strips.parts - 1) / strips.parts + kWarp - 1) / kWarp;
  const int64_t slots = of_warp * of_strip * (a.rows.cu ? 2 : 1);  // packed rows are of unlike lengths
  const int64_t fit = (device_number(cudaDevAttrMaxSharedMemoryPerMultiprocessor, a.place, op) / kBlocks - kOtherShared) / kThreads;
  strips.in_shared = static_cast<int>(slots < fit ? slots : fit > 0 ? fit : 0);
  Grid grid{0, kThreads, static_cast<size_t>(strips.in_shared) * kThreads, true};
  const int64_t blocks = (strips.count + kWarps - 1) / kWarps, together = resident_blocks(op, a.place, group_advantage_kernel<S>, kThreads, grid.shared);
  grid.blocks = blocks < together ? blocks : together;
  constexpr int64_t kOfTotals = (sizeof(Totals) + sizeof(Pair) - 1) / sizeof(Pair);
  const int64_t more = strips.parts > 1 ? rows : 0;
  Pair* const sums = room_for<Pair>(op, a.place, strips.count + more + kOfTotals * grid.blocks);
  Pair* const of_rows = more ? sums + strips.count : sums;
  Totals* const parts = reinterpret_cast<Totals*>(of_rows + rows);
  launch(op, a.place, grid, group_advantage_kernel<S>, a, strips, large_groups(a.groups, rows), sums, of_rows, parts, judged);
}

}  // namespace

// Emulated, the number that the caller judges.
double group_advantage(const GroupAdvantageArgs& a) {
  if (a.rows.count == 0) return 0;
  double judged = 0;
  with_storage([&](auto s) { advantage_as<decltype(s)>("group_advantage", a, kEmulated ? &judged : nullptr); }, a.rewards, a.advantages);
  return judged;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
