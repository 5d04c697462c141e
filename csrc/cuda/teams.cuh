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
  int row = 0;
  int first = 0, step = 0;  // the pieces of this thread: first + j * step
  int warp = 0;             // the team's first, in this block
  int64_t length = 0;
  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x) - warp * kWarp; }  // within the team, in this block
  __device__ __forceinline__ bool leads() const { return first < kTeamThreads; }                          // of a row's blocks, the first
  __device__ __forceinline__ bool there(const Teams& t) const { return row < t.rows.count; }
  // How many of so many pieces are this thread's.
  __device__ __forceinline__ int share(const Teams& t, int64_t pieces) const {
    const int64_t left = pieces - first + step - 1;
    if (left < step) return 0;
    return static_cast<int>(t.chunks == 1 ? left >> (31 - __clz(step)) : left / step);
  }
};
__device__ __forceinline__ Team team_of(const Teams& t) {
  Team x;
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x), threads = t.warps * kWarp, log = 31 - __clz(threads);
  x.row = t.chunks > 1 ? block / t.chunks : block * (kTeamThreads >> log) + (thread >> log);
  x.warp = (thread >> log) * t.warps;
  x.first = t.chunks > 1 ? (block - x.row * t.chunks) * kTeamThreads + thread : thread & (threads - 1);
  x.step = threads * t.chunks;
  x.length = x.there(t) ? t.rows.len(x.row) : 0;
  return x;
}

// Teams for rows of so many pieces: few warps where rows are many, since each warp's fold takes as long as some pieces of
// each thread; blocks of a cooperative grid where rows are long and too few for the chip.
template <class... Parameters>
Grid team_grid(const char* op, const Place& place, Teams& t, const Operand& tokens, int piece, int64_t bytes, void (*kernel)(Parameters...)) {
  Grid grid{0, kTeamThreads};
  const int64_t rows = t.rows.count;
  if (rows == 0) return grid;
  if (rows > 0x7fffff00) throw std::runtime_error(std::string("rlkern.") + op + ": the rows must fit one grid; split the batch.");
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
    for (int f = team.thread(); f < Fields; f += threads) {
      double v = field(f, team.warp);
      for (int w = 1; w < teams.warps; ++w) v = folded(how(f), v, field(f, team.warp + w));
      if (teams.chunks > 1) parts[static_cast<int64_t>(blockIdx.x) * Fields + f] = v;
      else field(f, team.warp) = v;
    }
    if (teams.chunks > 1) {
      grid_barrier();
      const double* const of_row = parts + static_cast<int64_t>(team.row) * teams.chunks * Fields;
      for (int f = team.thread(); f < Fields; f += threads) {
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
// A whole piece of so many bytes, as wide as may be; false where it goes by element.
template <int Bytes>
__device__ __forceinline__ bool store_whole(void* to, const void* from, const Piece& p) {
  constexpr int kStep = Bytes < kWide ? Bytes : kWide;
  if (!p.whole || reinterpret_cast<uintptr_t>(to) % kStep != 0) return false;
#pragma unroll
  for (int i = 0; i < Bytes; i += kStep) {
    char* const there = static_cast<char*>(to) + i;
    const char* const here = static_cast<const char*>(from) + i;
    if constexpr (kStep == 16) {
      uint4 raw;
      memcpy(&raw, here, 16);
      __stwb(reinterpret_cast<uint4*>(there), raw);  // an assignment may be split
    } else if constexpr (kStep == 8) {
      uint2 raw;
      memcpy(&raw, here, 8);
      *reinterpret_cast<uint2*>(there) = raw;
    } else if constexpr (kStep == 4) {
      unsigned raw;
      memcpy(&raw, here, 4);
      *reinterpret_cast<unsigned*>(there) = raw;
    } else {
      return false;
    }
  }
  return true;
}
template <class T, int N, class A>
__device__ __forceinline__ void store_elements(T* to, const Piece& p, const A (&value)[N]) {
  T v[N];
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = rounded<T>(value[i]);
  if (store_whole<N* static_cast<int>(sizeof(T))>(to, v, p)) return;
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i >= p.begin && i < p.end) to[i] = v[i];
}
// Tokens [from, from + N) of a piece.
template <int N, class A>
__device__ __forceinline__ void store_as(const Operand& x, int64_t base, Piece p, const A (&value)[N], int from = 0) {
  p.begin -= from, p.end -= from;
  const int64_t i = base + p.first + from;
  switch (x.dtype) {
    case Dtype::f32: store_elements(static_cast<float*>(x.data) + i, p, value); break;
    case Dtype::f64: store_elements(static_cast<double*>(x.data) + i, p, value); break;
    case Dtype::f16: store_elements(static_cast<__half*>(x.data) + i, p, value); break;
    default: store_elements(static_cast<__nv_bfloat16*>(x.data) + i, p, value); break;
  }
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
