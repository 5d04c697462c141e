// SPDX-License-Identifier: Apache-2.0
// Kernels for tests/test_cuda_emulator.py: right ones, and the same with a fault planted by its number.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cuda/reduce.cuh"

using namespace rlkern;
using namespace rlkern::RLKERN_ISA;

enum Fault { kNone, kNoBarrier, kOffByOne, kSharedOffByOne, kHalfWarp, kHalfBarrier, kSpin, kTooManyBlocks, kMisaligned };
constexpr int kThreads = 64;

// Each thread reads what its mirror image in the block has written.
__global__ void mirror_kernel(const int* in, int* out, int fault) {
  RLKERN_SHARED(int, of_block, kThreads);
  const unsigned t = threadIdx.x, i = blockIdx.x * kThreads + t;
  of_block[t + (fault == kSharedOffByOne)] = in[i + (fault == kOffByOne)];
  if (fault == kHalfBarrier && t >= kThreads / 2) return;
  if (fault != kNoBarrier) __syncthreads();
  out[i] = of_block[kThreads - 1 - t];
}
struct Sum {
  double total;
};
// The sum of all: in the last block to finish, from the blocks' parts.
__global__ void sum_kernel(const int* in, Sum* parts, unsigned* counter, double* out, int fault) {
  const auto plus = [](Sum a, Sum b) { return Sum{a.total + b.total}; };
  if (fault == kHalfWarp && threadIdx.x % 32 < 16) return;
  const Sum mine = block_fold<kThreads>(Sum{static_cast<double>(in[blockIdx.x * kThreads + threadIdx.x])}, plus);
  if (!last_to_finish(mine, parts, counter)) return;
  const Sum all = fold_parts<kThreads>(parts, static_cast<int>(gridDim.x), Sum{0}, plus);
  if (threadIdx.x == 0) *out = all.total;
}
// Blocks in the order of their tickets, each from the one before: waits only for blocks that run already.
__global__ void chain_kernel(unsigned* ticket, unsigned* flags, int* out, int fault) {
  RLKERN_SHARED(unsigned, mine, 1);
  if (threadIdx.x == 0) {
    mine[0] = atomicAdd(ticket, 1u);
    while (mine[0] && atomicAdd(&flags[mine[0] - (fault == kSpin ? 0 : 1)], 0u) == 0) {
    }
    out[mine[0]] = mine[0] ? out[mine[0] - 1] + 1 : 1;
    __threadfence();
    atomicExch(&flags[mine[0]], 1u);
  }
}
__global__ void grid_kernel(int* in, int* out) {  // every block reads what the next one wrote before the barrier
  if (threadIdx.x == 0) in[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
  grid_barrier();
  if (threadIdx.x == 0) out[blockIdx.x] = in[(blockIdx.x + 1) % gridDim.x];
}
__global__ void wide_kernel(const int* in, int* out, int fault) {
  const uint4 four = *reinterpret_cast<const uint4*>(in + 4 * threadIdx.x + (fault == kMisaligned));
  out[threadIdx.x] = static_cast<int>(four.x + four.w);
}

#define EXPECT(what)                                               \
  if (!(what)) {                                                   \
    std::printf("wrong: %s, line %d\n", #what, __LINE__), exit(3); \
  }

int main(int, char** argv) {
  const int fault = std::atoi(argv[1]), blocks = 9;
  const Place here{};
  try {
    std::vector<int> in(blocks * kThreads), out(in.size());
    for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i * i % 97);
    launch("mirror", here, {blocks, kThreads}, mirror_kernel, in.data(), out.data(), fault);
    for (int b = 0; b < blocks; ++b)
      for (int t = 0; t < kThreads; ++t) EXPECT(out[b * kThreads + t] == in[b * kThreads + kThreads - 1 - t]);

    std::vector<Sum> parts(blocks);
    unsigned counter = 0;
    double sum = 0, expected = 0;
    for (int x : in) expected += x;
    launch("sum", here, {blocks, kThreads}, sum_kernel, in.data(), parts.data(), &counter, &sum, fault);
    EXPECT(sum == expected && counter == 0);

    unsigned ticket = 0;
    std::vector<unsigned> flags(blocks);
    std::vector<int> chain(blocks);
    launch("chain", here, {blocks, 32}, chain_kernel, &ticket, flags.data(), chain.data(), fault);
    for (int b = 0; b < blocks; ++b) EXPECT(chain[b] == b + 1);

    const int together = fault == kTooManyBlocks ? blocks : resident_blocks("grid", here, grid_kernel, 32, 0);
    launch("grid", here, {together, 32, 0, true}, grid_kernel, in.data(), out.data());
    for (int b = 0; b < together; ++b) EXPECT(out[b] == (b + 1) % together + 1);

    launch("wide", here, {1, 32}, wide_kernel, in.data(), out.data(), fault);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
  std::printf("right\n");
  return 0;
}
