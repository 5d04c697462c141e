// SPDX-License-Identifier: Apache-2.0
// Pieces that a block holds on the chip between two looks at them: the first in registers, further ones in shared memory, and
// what neither holds is read again. A scope is what shares one result: a block with its row, or a grid with everything.
#pragma once
#include "../math/whiten.h"
#include "reduce.cuh"
#include "rows.cuh"

namespace rlkern {
namespace RLKERN_ISA {

constexpr int kHeldThreads = 256, kHeldBlocks = 2;  // of a multiprocessor at least: 128 registers a thread
constexpr int kInRegisters = 4;                     // pieces of a thread

// The pieces that a thread owns, number j = 0, 1, ...: every so many-th of its row, or of the grid's.
template <class S, bool ByRow>
struct Walk {
  static constexpr int N = Stored<S>::kPiece;
  const Tiling& tiling;
  const Operand& first;  // rows are cut at its addresses
  struct Spot {
    int64_t row = 0;
    Piece piece;
    bool there = false;
    bool past = false;  // all pieces of the thread. Rows that start unevenly have one piece less than others: not there, not past
  };
  __device__ __forceinline__ int64_t base(const Operand& x, int64_t r) const { return ByRow ? tiling.rows.base(x, r) : tiling.base(x, r); }
  __device__ __forceinline__ Spot at(int64_t j) const {
    Spot s;
    int64_t k = 0, length = 0;
    if constexpr (ByRow) {
      s.row = blockIdx.x, length = tiling.rows.len(s.row), k = j * kHeldThreads + threadIdx.x;
    } else {
      const uint64_t i = (static_cast<uint64_t>(j) * gridDim.x + blockIdx.x) * kHeldThreads + threadIdx.x;
      if (!spread(tiling, i, s.row, k)) return s.past = true, s;
      length = tiling.rows.length;
    }
    const int lead = lead_of<S>(first, base(first, s.row));
    s.there = k < pieces_of<N>(lead, length), s.past = ByRow && !s.there;
    s.piece = piece_of<N>(k, lead, length);
    return s;
  }
};

// One result of all threads of the scope, the same in each of them: op folds in a fixed order. A grid's is launched
// cooperatively; each call takes the next `parts`.
template <bool ByRow, class T, class Op>
__device__ __forceinline__ T scope_fold(const T& mine, T* parts, T none, Op op) {
  const T of_block = block_fold<kHeldThreads>(mine, op);
  if constexpr (ByRow) return of_block;
  if (threadIdx.x == 0) parts[blockIdx.x] = of_block;
  grid_barrier();
  return fold_parts<kHeldThreads>(parts, static_cast<int>(gridDim.x), none, op);
}

// ---- two sums; moments as (rows or 1, 3) float64 ------------------------------------------------------------------------
struct Pair {
  double a = 0, b = 0;
};
__device__ __forceinline__ Pair plus(const Pair& x, const Pair& y) { return {x.a + y.a, x.b + y.b}; }

__device__ __forceinline__ Moments moments_at(const Operand& x, int64_t r) {
  const double* p = static_cast<const double*>(x.data) + r * x.row_stride;
  return {p[0], p[1], p[2]};
}
__device__ __forceinline__ void put_moments(const Operand& x, int64_t r, const Moments& m) {
  if (!x) return;
  double* p = static_cast<double*>(x.data) + r * x.row_stride;
  p[0] = m.count, p[1] = m.mean, p[2] = m.m2;
}

// ---- the grid -----------------------------------------------------------------------------------------------------------
// How such a kernel is launched: `in_shared` pieces of each operand a thread, of `bytes` each with their mask's.
struct HeldGrid {
  Grid grid;
  int in_shared = 0;
};
template <bool ByRow, class... Parameters>
HeldGrid held_grid(const char* op, const Place& place, const Tiling& t, size_t bytes, void (*kernel)(Parameters...), int in_registers = kInRegisters) {
  HeldGrid h;
  h.grid.threads = kHeldThreads, h.grid.cooperative = !ByRow;
  if (ByRow) return h.grid.blocks = t.rows.count, h;
  const OnDevice device(place.device, op);
  const int64_t pieces = t.rows.count * t.pieces, processors = device_number(cudaDevAttrMultiProcessorCount, place, op);
  const int64_t share = (pieces + processors * kHeldBlocks * kHeldThreads - 1) / (processors * kHeldBlocks * kHeldThreads);
  const int64_t most = device_number(cudaDevAttrMaxSharedMemoryPerMultiprocessor, place, op) / kHeldBlocks - (2 << 10);  // what folds and the system take
  const int64_t fit = bytes ? most / static_cast<int64_t>(bytes * kHeldThreads) : 0;
  h.in_shared = static_cast<int>(share <= in_registers ? 0 : share - in_registers < fit ? share - in_registers : fit);
  h.grid.shared = h.in_shared * bytes * kHeldThreads;
  const int64_t blocks = (pieces + kHeldThreads - 1) / kHeldThreads, together = resident_blocks(op, place, kernel, kHeldThreads, h.grid.shared);
  h.grid.blocks = blocks < 1 ? 1 : blocks < together ? blocks : together;
  return h;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
