// SPDX-License-Identifier: Apache-2.0
// Which tokens clip-cov and kl-cov treat apart: by the covariance of advantage and log-prob, in float64 whatever the inputs
// are, since a choice has no error budget.
#include "../math/math.h"
#include "select.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

// ---- clip-cov -----------------------------------------------------------------------------------------------------------
// plan clip_cov_kernel: a cooperative grid of at most as many blocks as the chip holds; a block owns a run of pieces of 16
//   bytes. Means behind a barrier of the grid, then the choice; the last block to finish adds up the candidates. Bytes per
//   element: advantages, log_prob and mask read once as far as shared memory holds them, else twice, old_log_prob once, a byte
//   written once. Numerics: means and covariances in float64, the ratio by csrc/math/math.h as the losses' own.
// budget clip_cov_kernel<S>: 128 registers, loads 3, stores 0
template <class S>
__global__ void __launch_bounds__(kSelectThreads, kSelectBlocks)
    clip_cov_kernel(const PolicySelectArgs a, const Tiling tiling, const int in_shared, SelectSums* parts, unsigned* finished) {
  using A = ArithmeticOf<S>;
  constexpr int N = Stored<S>::kPiece;
  RLKERN_DYNAMIC_SHARED(Loaded<S>, held);
  const SelectWalk<S> walk(a, tiling, in_shared, held);
  const SelectMeans means = means_of(walk, parts);
  const double above = a.numbers[0], below = a.numbers[1];
  const A low = A(1 - a.numbers[2]), high = A(1 + a.numbers[3]);
  double chosen = 0;
  for (int64_t j = 0; j < walk.steps; ++j) {
    const auto s = walk.at(j);
    if (!s.there) continue;
    const auto old = load<S>(a.old_log_prob, tiling.base(a.old_log_prob, s.row), s.piece);
    const Seen<S> x = walk.look(j, s);
    unsigned found = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const double c = means.covariance(x, i);
      const A ratio = exp_of(x.log_prob[i] - old[i]), advantage = x.advantage[i];
      const bool clipped = (ratio > high && advantage > A(0)) || (ratio < low && advantage < A(0));
      if ((x.valid >> i & 1) && c > above && c < below && !clipped && ratio == ratio) found |= 1u << i;  // a NaN stays in the loss
    }
    store_bits<N>(a.selected, tiling.base(a.selected, s.row), s.piece, found);
    chosen += __popc(found);
  }
  const auto op = [](double x, double y) { return x + y; };
  double* const counts = reinterpret_cast<double*>(parts + gridDim.x);
  if (!last_to_finish(block_fold<kSelectThreads>(chosen, op), counts, finished)) return;
  const double all = fold_parts<kSelectThreads>(counts, static_cast<int>(gridDim.x), 0.0, op);
  if (threadIdx.x == 0) put_counts(a, all, means.tokens);
}

// ---- kl-cov -------------------------------------------------------------------------------------------------------------
constexpr int kDigit = 10, kBins = 1 << kDigit;  // what one look at the keys tells of the threshold
constexpr int kDigits = (64 + kDigit - 1) / kDigit;
using Counter = unsigned long long;
static_assert(kDigits * kBins * sizeof(Counter) + sizeof(unsigned) <= kCounterBytes, "a histogram a digit, and a count of blocks");
static_assert(kBins % kSelectThreads == 0, "bins a thread");
static_assert(kEmulated || kBins * sizeof(unsigned) + (3 << 10) <= kSelectRoom, "a histogram, the sums of its bins, folds");

// Float64 as integers of the same order: a NaN above all, both zeros one.
__device__ __forceinline__ Counter key_of(double x) {
  if (x != x) return ~Counter(0);
  x += 0.0;
  Counter bits;
  memcpy(&bits, &x, 8);
  return bits >> 63 ? ~bits : bits | Counter(1) << 63;
}

// The bin of the `need`-th largest key, by the counts of all keys in each: how many lie above it, and in it.
struct Bin {
  unsigned digit = 0;
  Counter above = 0, inside = 0;
};
__device__ __forceinline__ Bin bin_of(const Counter* bins, Counter need) {
  constexpr int kShare = kBins / kSelectThreads;
  RLKERN_SHARED(Counter, sums, kSelectThreads);
  RLKERN_SHARED(Bin, found, 1);
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kShare;  // of this thread, from which it goes down
  Counter count[kShare], mine = 0;
#pragma unroll
  for (int i = 0; i < kShare; ++i) count[i] = __ldcg(bins + top - i), mine += count[i];
  sums[threadIdx.x] = mine;
  __syncthreads();
  Counter above = 0;
  for (int t = 0; t < static_cast<int>(threadIdx.x); ++t) above += sums[t];
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    if (above < need && need <= above + count[i]) found[0] = {static_cast<unsigned>(top - i), above, count[i]};
    above += count[i];
  }
  __syncthreads();
  return found[0];
}

// Where the largest end: the keys whose leading bits are `prefix`, of which `need` are among them, and how many this block has.
struct Threshold {
  Counter prefix = 0, need = 0, inside = 0;
  int shift = 0, digits = 0;
  unsigned of_block = 0;
};
template <class S>
__device__ __forceinline__ Threshold threshold_of(const SelectWalk<S>& walk, const SelectMeans& means, Counter need, Counter* bins) {
  RLKERN_SHARED(unsigned, mine, kBins);
  Threshold t;
  t.need = need, t.shift = 64;
  do {
    const int known = t.shift;
    t.shift = known > kDigit ? known - kDigit : 0;
    const unsigned digit = (1u << (known - t.shift)) - 1;
    for (int b = threadIdx.x; b < kBins; b += kSelectThreads) mine[b] = 0;
    __syncthreads();
    for (int64_t j = 0; j < walk.steps; ++j) {
      const auto s = walk.at(j);
      if (!s.there) continue;
      const Seen<S> x = walk.look(j, s);
#pragma unroll
      for (int i = 0; i < SelectWalk<S>::N; ++i) {
        if (!(x.valid >> i & 1)) continue;
        const Counter key = key_of(means.covariance(x, i));
        if (known == 64 || key >> known == t.prefix) atomicAdd(mine + (key >> t.shift & digit), 1u);
      }
    }
    __syncthreads();
    Counter* const all = bins + t.digits++ * kBins;
    for (int b = threadIdx.x; b < kBins; b += kSelectThreads)
      if (mine[b]) atomicAdd(all + b, Counter(mine[b]));
    grid_barrier();
    const Bin found = bin_of(all, t.need);
    t.prefix = (known == 64 ? 0 : t.prefix << (known - t.shift)) | found.digit;
    t.need -= found.above, t.inside = found.inside, t.of_block = mine[found.digit];
    __syncthreads();  // the next digit's counts begin where this one's were read
  } while (t.shift && t.need != t.inside);
  return t;
}

// How many of the values of a block's threads come before this thread's; `all` grows by their sum.
__device__ __forceinline__ Counter counted_before(unsigned mine, Counter& all) {
  constexpr int kWarps = kSelectThreads / kWarp;
  RLKERN_SHARED(unsigned, of_warp, kWarps);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  unsigned upto = mine;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const unsigned below = from_below(upto, distance);
    if (lane >= distance) upto += below;
  }
  if (lane == kWarp - 1) of_warp[warp] = upto;
  __syncthreads();
  Counter before = all + upto - mine;
  for (int w = 0; w < kWarps; ++w) all += of_warp[w], before += w < warp ? of_warp[w] : 0;
  __syncthreads();
  return before;
}

// plan kl_cov_kernel: as clip_cov_kernel, with a radix select behind the means: ten bits of the threshold a look at the keys,
//   from the top, until the keys that share them are all wanted; each look ends in integer histograms that the grid adds up. Of
//   keys that are equal in all bits the first by position are taken: blocks own runs in order, so that a count of them a block
//   says where they end. Bytes per element: advantages, log_prob and mask read once as far as shared memory holds them; what
//   it does not, once for the means, once a digit (three or four, at most seven) and once for the choice; a byte written once.
//   Numerics: covariances in float64, a NaN the largest.
// budget kl_cov_kernel<S>: 128 registers, loads 2, stores 0
template <class S>
__global__ void __launch_bounds__(kSelectThreads, kSelectBlocks)
    kl_cov_kernel(const PolicySelectArgs a, const Tiling tiling, const int in_shared, SelectSums* parts, unsigned* finished, Counter* bins) {
  constexpr int N = Stored<S>::kPiece;
  RLKERN_DYNAMIC_SHARED(Loaded<S>, held);
  const SelectWalk<S> walk(a, tiling, in_shared, held);
  const SelectMeans means = means_of(walk, parts);
  const double share = floor(means.tokens * a.numbers[0]), wanted = share < 1 ? 1 : share > means.tokens ? means.tokens : share;
  const double most = means.tokens > 0 ? wanted : 0;
  Threshold t;
  if (most > 0) t = threshold_of(walk, means, static_cast<Counter>(most), bins);
  const bool ties = t.need != t.inside;
  Counter before = 0;  // tied keys of the blocks and steps before
  Counter* const of_blocks = reinterpret_cast<Counter*>(parts + gridDim.x);
  if (ties) {
    if (threadIdx.x == 0) of_blocks[blockIdx.x] = t.of_block;
    grid_barrier();
    before = fold_parts<kSelectThreads>(of_blocks, static_cast<int>(blockIdx.x), Counter(0), [](Counter x, Counter y) { return x + y; });
  }
  for (int64_t j = 0; j < walk.steps; ++j) {
    const auto s = walk.at(j);
    unsigned found = 0, tied = 0;
    if (s.there) {
      const Seen<S> x = walk.look(j, s);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (!(x.valid >> i & 1)) continue;
        const Counter leading = key_of(means.covariance(x, i)) >> t.shift;
        if (leading == t.prefix) tied |= 1u << i;
        else if (leading > t.prefix) found |= 1u << i;
      }
    }
    if (ties) {
      Counter rank = counted_before(static_cast<unsigned>(__popc(tied)), before);
#pragma unroll
      for (int i = 0; i < N; ++i)
        if ((tied >> i & 1) && rank++ < t.need) found |= 1u << i;
    } else {
      found |= tied;
    }
    if (s.there) store_bits<N>(a.selected, tiling.base(a.selected, s.row), s.piece, found);
  }
  if (!last_to_finish(Counter(0), of_blocks + gridDim.x, finished)) return;
  for (int b = threadIdx.x; b < t.digits * kBins; b += kSelectThreads) bins[b] = 0;
  if (threadIdx.x == 0) put_counts(a, most, means.tokens);
}

template <class S>
void select_as(const PolicySelectArgs& a) {
  const char* const op = "policy_loss";
  const SelectGrid g = a.largest ? select_grid<S>(op, a, kl_cov_kernel<S>) : select_grid<S>(op, a, clip_cov_kernel<S>);
  SelectSums* const parts = room_for<SelectSums>(op, a.place, 2 * g.grid.blocks);  // the second half: counts of blocks
  Counter* const bins = reinterpret_cast<Counter*>(counters(a.place));
  unsigned* const finished = reinterpret_cast<unsigned*>(bins + kDigits * kBins);
  if (a.largest) launch(op, a.place, g.grid, kl_cov_kernel<S>, a, g.tiling, g.in_shared, parts, finished, bins);
  else launch(op, a.place, g.grid, clip_cov_kernel<S>, a, g.tiling, g.in_shared, parts, finished);
}

}  // namespace

double policy_select(const PolicySelectArgs& a) {
  with_storage([&](auto s) { select_as<decltype(s)>(a); }, a.log_prob, a.old_log_prob, a.advantages);
  return 0;
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
