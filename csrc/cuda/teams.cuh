// SPDX-License-Identifier: Apache-2.0
// A row and its table of sums: how many warps, or blocks, have one row, and how their sums become its column.
#pragma once
#include "../math/correction.h"
#include "reduce.cuh"
#include "rows.cuh"

namespace rlkern {
namespace RLKERN_ISA {

constexpr int kTeamThreads = 256, kTeamWarps = kTeamThreads / kWarp;
constexpr int kTeamBlocks = 2;         // of a multiprocessor at least: 128 registers a thread
constexpr int kFewPieces = 8;          // of a thread, which need no further warps where rows are many
constexpr int kFullWarps = 32;         // of a multiprocessor that has enough to do
constexpr int kRoomBytes = 44 << 10;  // of shared memory for pieces, of a block: with a table below what a launch must ask for

// `warps` of one block have a row, or `chunks` blocks of a cooperative grid have. held: pieces of a thread in shared memory.
struct Teams {
  Rows rows;
  int warps = 1, chunks = 1, held = 0;
};
struct Team {
  int64_t row = 0, length = 0;
  int first = 0, step = 0;      // the pieces of this thread: first + j * step
  int thread = 0, warp = 0;     // of this thread within its team, in this block; the team's first warp
  int chunk = 0;
  bool there = false;
  int log = 0;  // of the step, of one block: no division
  // How many of so many pieces are this thread's.
  __device__ __forceinline__ int share(int64_t pieces) const {
    const int64_t left = pieces - first + step - 1;
    return left < step ? 0 : static_cast<int>(log ? left >> log : left / step);
  }
};
__device__ __forceinline__ Team team_of(const Teams& t) {
  Team x;
  const int thread = static_cast<int>(threadIdx.x), threads = t.warps * kWarp, log = 31 - __clz(threads), number = thread >> log;
  x.thread = thread - number * threads, x.warp = number * t.warps;
  if (t.chunks > 1) {
    x.row = blockIdx.x / static_cast<unsigned>(t.chunks), x.chunk = static_cast<int>(blockIdx.x % static_cast<unsigned>(t.chunks));
  } else {
    x.row = (static_cast<int64_t>(blockIdx.x) * kTeamThreads + thread) >> log, x.log = log;
  }
  x.there = x.row < t.rows.count;
  x.length = x.there ? t.rows.len(x.row) : 0;
  x.first = x.chunk * threads + x.thread, x.step = threads * t.chunks;
  return x;
}

// Teams for rows of so many pieces: few warps where rows are many, since each warp's fold takes as long as some pieces of
// each thread; blocks of a cooperative grid where rows are long and too few for the chip.
template <class... Parameters>
Grid team_grid(const char* op, const Place& place, Teams& t, const Operand& tokens, int piece, int64_t bytes, void (*kernel)(Parameters...)) {
  Grid grid{0, kTeamThreads};
  const int64_t rows = t.rows.count;
  if (rows == 0) return grid;
  const OnDevice device(place.device, op);
  const int64_t length = t.rows.cu ? (tokens.cols + rows - 1) / rows : t.rows.length, pieces = (length + piece - 1) / piece;
  const int64_t processors = device_number(cudaDevAttrMultiProcessorCount, place, op);
  while (t.warps < kTeamWarps && pieces > t.warps * kWarp && (pieces > t.warps * kWarp * kFewPieces || rows * t.warps < processors * kFullWarps)) t.warps *= 2;
  const int64_t fit = !bytes ? 0 : kEmulated ? 1 : kRoomBytes / (bytes * kTeamThreads);
  const auto hold = [&] {
    const int64_t most = (t.rows.cu ? (tokens.cols + piece - 1) / piece : pieces) + 1;  // a row's lead may add one
    const int64_t share = (most + t.warps * kWarp * t.chunks - 1) / (t.warps * kWarp * t.chunks);
    t.held = static_cast<int>(share < fit ? share : fit);
    grid.shared = static_cast<size_t>(t.held * bytes * kTeamThreads);
  };
  hold();
  grid.blocks = (rows + kTeamWarps / t.warps - 1) / (kTeamWarps / t.warps);
  const int64_t enough = kTeamThreads * (kEmulated ? 1 : kFewPieces / 2);  // pieces of a block
  if (pieces < 2 * enough) return grid;
  const int64_t together = resident_blocks(op, place, kernel, kTeamThreads, grid.shared) / rows, wanted = pieces / enough;
  if (together < 2) return grid;
  t.warps = kTeamWarps, t.chunks = static_cast<int>(together < wanted ? together : wanted);
  hold();  // less
  grid.blocks = rows * t.chunks, grid.cooperative = true;
  return grid;
}

// ---- a column of sums ---------------------------------------------------------------------------------------------------
enum class Fold { sum, most, least };
template <class V>
__device__ __forceinline__ V folded(Fold how, V x, V y) {
  return how == Fold::sum ? x + y : (how == Fold::most ? y > x : y < x) ? y : x;
}
// In shared memory, a column a warp, then a column a team. What nobody leaves is 0.
template <int Fields>
struct Columns {
  double* at;
  __device__ __forceinline__ double& field(int f, int warp) const { return at[f * kTeamWarps + warp]; }
  __device__ __forceinline__ void clear() const {  // a warp its own
    for (int f = static_cast<int>(threadIdx.x) % kWarp; f < Fields; f += kWarp) field(f, static_cast<int>(threadIdx.x) / kWarp) = 0;
    __syncwarp();
  }
  template <Fold How, class V>
  __device__ __forceinline__ void leave(int f, V mine) const {
    mine = warp_fold(mine, [](V x, V y) { return folded(How, x, y); });
    if (threadIdx.x % kWarp == 0) field(f, static_cast<int>(threadIdx.x) / kWarp) = static_cast<double>(mine);
  }
  // All blocks call. Then a team's column lies at its first warp.
  template <class How>
  __device__ __forceinline__ void merge(const Teams& teams, const Team& team, double* parts, How how) const {
    __syncthreads();
    const int threads = teams.warps * kWarp;
    for (int f = team.thread; f < Fields; f += threads) {
      double v = field(f, team.warp);
      for (int w = 1; w < teams.warps; ++w) v = folded(how(f), v, field(f, team.warp + w));
      if (teams.chunks > 1) parts[static_cast<int64_t>(blockIdx.x) * Fields + f] = v;
      else field(f, team.warp) = v;
    }
    if (teams.chunks > 1) {
      grid_barrier();
      const double* const of_row = parts + team.row * teams.chunks * Fields;
      for (int f = team.thread; f < Fields; f += threads) {
        double v = part(of_row, f);
#pragma unroll 4
        for (int c = 1; c < teams.chunks; ++c) v = folded(how(f), v, part(of_row, static_cast<int64_t>(c) * Fields + f));
        field(f, team.warp) = v;
      }
    }
    __syncthreads();
  }
};

// ---- outputs whose dtype is their own -----------------------------------------------------------------------------------
template <class T, int N, class A>
__device__ __forceinline__ void store_elements(T* to, const Piece& p, const A (&value)[N]) {
  T v[N];
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = rounded<T>(value[i]);
  if constexpr (N * sizeof(T) % kWide == 0) {
    if (p.whole && wide(to)) {
#pragma unroll
      for (int i = 0; i < N; i += kVector<T>) {
        uint4 raw;
        memcpy(&raw, v + i, kWide);
        __stwb(reinterpret_cast<uint4*>(to + i), raw);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i >= p.begin && i < p.end) to[i] = v[i];
}
// A piece as it is cut for S.
template <class S>
__device__ __forceinline__ void store_as(const Operand& x, int64_t base, const Piece& p, const ArithmeticOf<S> (&value)[Stored<S>::kPiece]) {
  const int64_t i = base + p.first;
  switch (x.dtype) {
    case Dtype::f32: store_elements(static_cast<float*>(x.data) + i, p, value); break;
    case Dtype::f64: store_elements(static_cast<double*>(x.data) + i, p, value); break;
    case Dtype::f16: store_elements(static_cast<__half*>(x.data) + i, p, value); break;
    default: store_elements(static_cast<__nv_bfloat16*>(x.data) + i, p, value); break;
  }
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
