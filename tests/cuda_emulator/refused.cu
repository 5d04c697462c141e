// SPDX-License-Identifier: Apache-2.0
// Launches that cannot be, by their number, for tests/test_cuda_emulator.py: each is an exception, and the next launch runs.
#include <cstdio>
#include <cstdlib>

#include "../../csrc/cuda/reduce.cuh"

using namespace rlkern;
using namespace rlkern::RLKERN_ISA;

enum Refused { kNothing, kThreads, kNoThreads, kShared, kBlocks, kTogether, kRoom, kNoBlocks };

__global__ void count_kernel(int* out) { atomicAdd(out, 1); }
__global__ void half_kernel(int*) {
  if (threadIdx.x < 16) __syncthreads();
}

int main(int, char** argv) {
  const Place here{};
  int found = 0;
  try {
    switch (std::atoi(argv[1])) {
      case kThreads: launch("wide", here, {1, 2048}, count_kernel, &found); break;
      case kNoThreads: launch("narrow", here, {1, 0}, count_kernel, &found); break;
      case kShared: launch("large", here, {1, 32, 1 << 20}, count_kernel, &found); break;
      case kBlocks: launch("long", here, {int64_t(1) << 31, 32}, count_kernel, &found); break;
      case kTogether: launch("grid", here, {resident_blocks("grid", here, count_kernel, 32, 0) + 1, 32, 0, true}, count_kernel, &found); break;
      case kRoom: room_for<double>("parts", here, 1); break;
      case kNoBlocks: launch("none", here, {0, 32}, count_kernel, &found); break;
      default: launch("half", here, {1, 32}, half_kernel, &found);
    }
    std::printf("no exception\n");
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
  }
  if (found != 0) std::printf("it ran\n");
  launch("next", here, {3, 32}, count_kernel, &found);
  std::printf("next: %d\n", found);
  return 0;
}
