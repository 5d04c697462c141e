// SPDX-License-Identifier: Apache-2.0
// Group statistics over scores, and their gradients.
#include "group.cuh"

namespace rlkern {
namespace RLKERN_ISA {
namespace {

constexpr int kGroupThreads = 128, kGroupBlocks = 8;  // of a multiprocessor: 64 registers a thread
static_assert(kGroupThreads % kWarp == 0, "whole warps");

// This team's group; false past the last one.
template <int Threads>
__device__ __forceinline__ bool group_of_team(const Groups& groups, int64_t& g) {
  g = (static_cast<int64_t>(blockIdx.x) * kGroupThreads + threadIdx.x) / Threads;
  return g < groups.count;
}
// A (B,) operand as its kernel reads it: row by row, as double.
struct Numbers {
  const Operand& x;
  __device__ __forceinline__ double operator()(int64_t r) const { return row_value<double>(x, r); }
};
template <int Threads>
using Scores = Members<Threads, Numbers>;
__device__ __forceinline__ void put(const Operand& x, int64_t r, double v) { set_element(x, r * x.row_stride, v); }

// plan group_mean_std_kernel: a warp owns a group, or a block where groups are large; a thread has every so many-th of its rows.
//   The group's first score, then sums about it, then squared deviations: three rounds over its rows, gathered by order, of
//   which the first row of each thread is loaded once. Bytes per row: its number in the order and its score, once from
//   memory, then from the caches. Numerics: float64, threads folded in order.
// budget group_mean_std_kernel<32>: 64 registers, loads 0, stores 0
// budget group_mean_std_kernel<128>: 64 registers, loads 0, stores 0
template <int Threads>
__global__ void __launch_bounds__(kGroupThreads, kGroupBlocks) group_mean_std_kernel(const GroupMeanStdArgs a) {
  int64_t g;
  if (!group_of_team<Threads>(a.groups, g)) return;
  const Scores<Threads> members(a.groups, g, a.options.omit, Numbers{a.scores});
  const GroupMoments m = moments_of(members, false, Numbers{a.scores});
  if (threadIdx.x % Threads != 0) return;
  put(a.mean, g, mean_of(m, a.options.singleton));
  put(a.std, g, std_of(m, a.options));
}

// plan group_mean_std_bwd_kernel: as the statistics, with a fourth round that writes a gradient a row.
// budget group_mean_std_bwd_kernel<32>: 64 registers, loads 0, stores 0
// budget group_mean_std_bwd_kernel<128>: 64 registers, loads 0, stores 0
template <int Threads>
__global__ void __launch_bounds__(kGroupThreads, kGroupBlocks) group_mean_std_bwd_kernel(const GroupMeanStdGradArgs a) {
  int64_t g;
  if (!group_of_team<Threads>(a.groups, g)) return;
  const Scores<Threads> members(a.groups, g, a.options.omit, Numbers{a.scores});
  const GroupMoments m = moments_of(members, false, Numbers{a.scores});
  const double through_mean = row_value<double>(a.grad_mean, g) * mean_grad(m, a.options.singleton), grad_std = row_value<double>(a.grad_std, g);
  members.each([&](int64_t r, double s, int64_t) {
    put(a.d_scores, r, members.left_out(s) ? 0.0 : through_mean + grad_std * std_grad(m, s, a.options, a.options.eps));
  });
}

// plan group_normalize_kernel: as the statistics, with the lengths where they weigh, and a round that writes a number a row.
// budget group_normalize_kernel<32>: 64 registers, loads 0, stores 0
// budget group_normalize_kernel<128>: 64 registers, loads 0, stores 0
template <int Threads>
__global__ void __launch_bounds__(kGroupThreads, kGroupBlocks) group_normalize_kernel(const GroupNormalizeArgs a) {
  int64_t g;
  if (!group_of_team<Threads>(a.groups, g)) return;
  const Scores<Threads> members(a.groups, g, a.options.omit, Numbers{a.scores});
  const GroupScale scale(moments_of(members, static_cast<bool>(a.lengths), Numbers{a.lengths}), a.options);
  members.each([&](int64_t r, double s, int64_t) { put(a.advantages, r, members.left_out(s) ? s : scale(s)); });
}

struct Cotangents {  // d and e of normalize_grad
  double d = 0, e = 0;
};
// plan group_normalize_bwd_kernel: as the forward, with a round that sums the cotangents and one that writes a gradient a row.
// budget group_normalize_bwd_kernel<32>: 64 registers, loads 0, stores 0
// budget group_normalize_bwd_kernel<128>: 64 registers, loads 0, stores 0
template <int Threads>
__global__ void __launch_bounds__(kGroupThreads, kGroupBlocks) group_normalize_bwd_kernel(const GroupNormalizeGradArgs a) {
  int64_t g;
  if (!group_of_team<Threads>(a.groups, g)) return;
  const Scores<Threads> members(a.groups, g, a.options.omit, Numbers{a.scores});
  const Numbers lengths{a.lengths}, grad{a.grad};
  const GroupMoments m = moments_of(members, static_cast<bool>(a.lengths), lengths);
  const double stretch = stretch_of(m, a.options.baseline);
  Cotangents sums;
  members.each_there([&](int64_t r, double s, int64_t) {
    const double c = grad(r);
    sums.d += c, sums.e += c * stretch * ((s - m.shift) - m.baseline);
  });
  sums = team_fold<Threads>(sums, [](const Cotangents& x, const Cotangents& y) { return Cotangents{x.d + y.d, x.e + y.e}; });
  members.each([&](int64_t r, double s, int64_t) {
    const double weight = a.lengths ? lengths(r) : 1.0;
    put(a.d_scores, r, members.left_out(s) ? 0.0 : normalize_grad(m, a.options, s, grad(r), weight, sums.d, sums.e));
  });
}

template <class Args>
double by_group(const char* op, const Args& a, void (*of_warp)(Args), void (*of_block)(Args)) {
  const bool large = large_groups(a.groups, a.scores.rows);
  const int64_t a_block = kGroupThreads / kWarp, blocks = large ? a.groups.count : (a.groups.count + a_block - 1) / a_block;
  launch(op, a.place, {blocks, kGroupThreads}, large ? of_block : of_warp, a);
  return 0;
}

}  // namespace

double group_mean_std(const GroupMeanStdArgs& a) { return by_group("group_mean_std", a, group_mean_std_kernel<kWarp>, group_mean_std_kernel<kGroupThreads>); }
double group_mean_std_bwd(const GroupMeanStdGradArgs& a) {
  return by_group("group_mean_std", a, group_mean_std_bwd_kernel<kWarp>, group_mean_std_bwd_kernel<kGroupThreads>);
}
double group_normalize(const GroupNormalizeArgs& a) {
  return by_group("group_normalize", a, group_normalize_kernel<kWarp>, group_normalize_kernel<kGroupThreads>);
}
double group_normalize_bwd(const GroupNormalizeGradArgs& a) {
  return by_group("group_normalize", a, group_normalize_bwd_kernel<kWarp>, group_normalize_bwd_kernel<kGroupThreads>);
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
