// SPDX-License-Identifier: Apache-2.0
// The optimal token baseline: rewards to go less the weighted mean of a group's column, in one launch.
#include "token_baseline.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

// ---- between the sweeps: sums of chunks, then what lies around each -----------------------------------------------------
template <class S>
__device__ __forceinline__ void sum_chunks(const TokenBaselineArgs& a, const Work& work) {
#pragma unroll 1
  for (int64_t task = blockIdx.x; task < a.rows.count * work.a_row; task += gridDim.x) {
    const Row<S> row(a, work, task / work.a_row);
#pragma unroll 1
    for (int64_t q = task % work.a_row; q < row.chunks; q += work.a_row) {
      Tokens<S> t;
      t.template read<true>(a, row, q);
      const Sums s = block_fold<Shape<S>::kThreads>(t.sums(), added);
      if (threadIdx.x == 0) work.chunks[row.first + q] = s;
    }
  }
}
// A warp a row, a lane a run of its chunks.
template <class S>
__device__ __forceinline__ void scan_chunks(const TokenBaselineArgs& a, const Work& work) {
  constexpr int64_t kWarps = Shape<S>::kThreads / kWarp;
#pragma unroll 1
  for (int64_t r = (threadIdx.x / kWarp) * static_cast<int64_t>(gridDim.x) + blockIdx.x; r < a.rows.count; r += kWarps * gridDim.x) {
    const Row<S> row(a, work, r);
    const int64_t share = (row.chunks + kWarp - 1) / kWarp, begin = threadIdx.x % kWarp * share;
    const int64_t end = begin + share < row.chunks ? begin + share : row.chunks;
    Sums x, all;
    for (int64_t q = begin; q < end; ++q) x = added(x, part(work.chunks, row.first + q));
    around_lane(x, all);
    if (threadIdx.x % kWarp == kWarp - 1) work.valid[r] = all.valid;
    double after = x.reward;
    for (int64_t q = end - 1; q >= begin; --q) {
      Sums& s = work.chunks[row.first + q];
      const double reward = s.reward;
      s.reward = after, after += reward;
    }
    for (int64_t q = begin; q < end; ++q) {
      Sums& s = work.chunks[row.first + q];
      const Sums own = s;
      s.variance = x.variance, s.valid = x.valid;
      x.variance += own.variance, x.valid += own.valid;
    }
  }
}

// ---- the columns of a group ---------------------------------------------------------------------------------------------
struct Lengths {
  TwoLongest of;
  int64_t tokens = 0;  // of the longest row
};
template <class S>
__device__ __forceinline__ Lengths lengths_of(const TokenBaselineArgs& a, const Work& work, int64_t begin, int64_t end) {
  Lengths mine;
  for (int64_t i = begin + threadIdx.x; i < end; i += Shape<S>::kThreads) {
    const int64_t r = a.groups.order[i], tokens = a.rows.len(r);
    mine.of.add(part(work.valid, r), a.by_token);
    mine.tokens = tokens > mine.tokens ? tokens : mine.tokens;
  }
  return block_fold<Shape<S>::kThreads>(mine, [](Lengths x, const Lengths& y) {
    x.of.merge(y.of), x.tokens = x.tokens > y.tokens ? x.tokens : y.tokens;
    return x;
  });
}

// A block's view of the columns [c K, (c + 1) K) of a group. A token belongs to its column, a masked one, by token, to that of
// the next valid one: so each is visited by one block.
template <class S>
struct Columns {
  static constexpr int N = Stored<S>::kPiece, kThreads = Shape<S>::kThreads;
  static constexpr int64_t K = Shape<S>::kChunk;
  using A = ArithmeticOf<S>;
  const TokenBaselineArgs& a;
  const Work& work;
  int64_t c;
  double *total, *weight;

  // The first chunk of a row that has some of these columns.
  __device__ __forceinline__ int64_t first_chunk(const Row<S>& row) const {
    if (!a.by_token) return c;
    if (c == 0 || !work.chunks) return 0;
    int before = 0;
    for (int64_t q = threadIdx.x; q < row.chunks; q += kThreads) {
      const int64_t next = q + 1 < row.chunks ? part(work.chunks, row.first + q + 1).valid : part(work.valid, row.r);
      before += next < c * K;
    }
    return block_fold<kThreads>(before, [](int x, int y) { return x + y; });
  }
  // f(row, tokens, valid tokens of the row) for each chunk of row r with some of these columns.
  template <bool Variance, class F>
  __device__ __forceinline__ void visit(int64_t r, F&& f) const {
    const Row<S> row(a, work, r);
#pragma unroll 1
    for (int64_t q = first_chunk(row); q < row.chunks && (a.by_token || q == c); ++q) {
      const Sums carry = work.chunks ? part(work.chunks, row.first + q) : Sums{};
      if (a.by_token && carry.valid >= (c + 1) * K) break;
      Tokens<S> t;
      t.template read<Variance>(a, row, q);
      int64_t valid = 0;
      Sums at = added(around_thread<kThreads>(t.sums(), valid), carry);
      if (work.chunks) valid = part(work.valid, r);
#pragma unroll
      for (int i = N - 1; i >= 0; --i) at.reward += static_cast<double>(t.reward[i]), t.reward[i] = A(at.reward);
#pragma unroll
      for (int i = 0; i < N; ++i) at.variance += static_cast<double>(t.variance[i]), t.variance[i] = A(at.variance);
      t.packed = a.by_token, t.column = static_cast<int>((a.by_token ? at.valid : t.p.first) - c * K);
      if (a.by_token) {  // of others' columns: others'
        int begin = t.p.begin, end = t.p.end;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (t.column_of(i) < 0 && begin <= i) begin = i + 1;
          if (t.column_of(i) >= K && end > i) end = i;
        }
        t.clip(begin, end);
      }
      f(row, t, valid);
    }
  }
  // G of the rows, and their columns' sums, row after row.
  __device__ __forceinline__ void sum(int64_t begin, int64_t end, TwoLongest& of) {
    for (int t = static_cast<int>(threadIdx.x); t < K; t += kThreads) total[t] = 0, weight[t] = 0;
#pragma unroll 1
    for (int64_t i = begin; i < end; ++i) {
      int64_t valid = 0;
      visit<true>(a.groups.order[i], [&](const Row<S>& row, const Tokens<S>& t, int64_t n) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
          if (k < t.p.begin || k >= t.p.end || !(t.valid >> k & 1)) continue;
          const int column = t.column_of(k);
          const double w = static_cast<double>(t.variance[k]);
          total[column] = fused(static_cast<double>(t.reward[k]), w, total[column]), weight[column] += w;
        }
        store<S>(a.returns, a.rows.base(a.returns, row.r), t.p, t.reward);
        valid = n;
      });
      if (!work.chunks) of.add(valid, a.by_token);
    }
    __syncthreads();
    for (int t = static_cast<int>(threadIdx.x); t < K; t += kThreads) total[t] = of.members > 1 ? total[t] / (weight[t] + a.eps) : 0.0;
    __syncthreads();
  }
  __device__ __forceinline__ void write(int64_t begin, int64_t end, const TwoLongest& of) const {
#pragma unroll 1
    for (int64_t i = begin; i < end; ++i)
      visit<false>(a.groups.order[i], [&](const Row<S>& row, Tokens<S>& t, int64_t n) {
        const int64_t last = a.zero_tail && of.cuts(n) ? of.second - c * K : K;  // column without a baseline
#pragma unroll
        for (int k = 0; k < N; ++k) {
          if (k < t.p.begin || k >= t.p.end) continue;
          const int column = t.column_of(k);
          const A y = t.reward[k];
          t.reward[k] = A(0);
          if (t.valid >> k & 1) t.reward[k] = column < last ? y - A(total[column]) : y;
        }
        store<S>(a.advantages, a.rows.base(a.advantages, row.r), t.p, t.reward);
      });
    __syncthreads();  // the next columns are zeroed where these are read
  }
};

// plan token_baseline_kernel: a block owns some columns of a group, as many as a chunk has tokens, and walks the group's rows twice:
//   the first time it scans each row's chunk (rewards to go from behind, path variances from the front, numbers of valid
//   tokens), writes the returns and adds both to the columns in shared memory; the second time it takes the columns' means off.
//   Where rows have more than one chunk the launch is cooperative, and before that: sums of chunks, a block each; barrier; what
//   lies around each chunk, a warp a row; barrier. By token a column is a number among the valid tokens: the block finds its
//   chunks by their counts. Bytes per element: rows of one chunk: rewards and mask, old_log_prob, sum_pi_squared and weights
//   read once, both results written once, rewards and mask again from the L2 cache; longer rows: all inputs once more.
//   Numerics: path variances in the arithmetic type, scans and columns in float64, rows in the order of the group.
// budget token_baseline_kernel<S>: 128 registers, loads 9, stores 2
template <class S>
__global__ void __launch_bounds__(Shape<S>::kThreads, Shape<S>::kBlocks) token_baseline_kernel(const TokenBaselineArgs a, const Work work) {
  constexpr int64_t K = Shape<S>::kChunk;
  RLKERN_DYNAMIC_SHARED(double, columns);
  if (work.chunks) {
    sum_chunks<S>(a, work);
    grid_barrier();
    scan_chunks<S>(a, work);
    grid_barrier();
  }
#pragma unroll 1
  for (int64_t task = blockIdx.x; task < a.groups.count * work.a_group; task += gridDim.x) {
    const int64_t g = task / work.a_group, begin = a.groups.offsets[g], end = a.groups.offsets[g + 1];
    Lengths lengths;
    int64_t chunks = 1;
    if (work.chunks) {
      lengths = lengths_of<S>(a, work, begin, end);
      chunks = a.by_token ? (lengths.of.longest > 0 ? lengths.of.longest : 0) / K + 1 : (lengths.tokens + K - 1) / K;
    }
#pragma unroll 1
    for (int64_t c = task % work.a_group; c < chunks; c += work.a_group) {
      Columns<S> view{a, work, c, columns, columns + K};
      view.sum(begin, end, lengths.of);
      view.write(begin, end, lengths.of);
    }
  }
}

template <class S>
void token_baseline_as(const TokenBaselineArgs& a) {
  using F = Shape<S>;
  const char* const op = "optimal_token_baseline";
  const int64_t rows = a.rows.count, length = a.rows.cu ? a.rewards.cols : a.rows.length, a_row = (length + F::kChunk - 1) / F::kChunk;
  Work work;
  Grid grid{a.groups.count, F::kThreads, F::kShared, a_row > 1};
  const int64_t together = resident_blocks(op, a.place, token_baseline_kernel<S>, F::kThreads, F::kShared);
  if (grid.cooperative) {
    const int64_t fair = (2 * together + rows - 1) / rows;  // blocks that share a packed row: only the device knows its length
    work.a_row = a.rows.cu && fair < a_row ? fair : a_row;
    work.a_group = a.rows.cu && 2 * together < a_row ? 2 * together : a_row + (a.by_token && length % F::kChunk == 0);
    const int64_t count = a.rows.cu ? length / F::kChunk + rows + 1 : rows * a_row;
    work.chunks = room_for<Sums>(op, a.place, count + (rows + 2) / 3);
    work.valid = reinterpret_cast<int64_t*>(work.chunks + count);
    static_assert(sizeof(Sums) == 3 * sizeof(int64_t), "three numbers");
    const int64_t tasks = rows * work.a_row > a.groups.count * work.a_group ? rows * work.a_row : a.groups.count * work.a_group;
    grid.blocks = tasks < together ? tasks : together;
  }
  launch(op, a.place, grid, token_baseline_kernel<S>, a, work);
}

}  // namespace

double token_baseline(const TokenBaselineArgs& a) {
  if (!a.advantages) return 0;
  with_storage([&](auto s) { token_baseline_as<decltype(s)>(a); }, a.rewards, a.old_log_prob, a.sum_pi_squared, a.weights, a.advantages, a.returns);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
