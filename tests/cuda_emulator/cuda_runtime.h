// SPDX-License-Identifier: Apache-2.0
// A CUDA device for a C++ compiler, small enough to read: csrc/cuda compiles against this header unchanged, and its kernels
// run on the CPU. Each thread is a fiber; which one runs next is drawn from a seeded generator, at each point where the
// threads of a GPU could overtake one another. What a barrier does not order comes out of order sooner or later, shared
// memory starts as NaN, a wait that cannot end is an error, and under AddressSanitizer an access outside an array stops the
// program. A test tool: no part of the package.
//
// What it does not show: memory that becomes visible late (every write is seen at once, a forgotten __threadfence passes),
// warps that run in lockstep, bank conflicts, anything about time.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __align__(n) alignas(n)
#define __grid_constant__

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

namespace emulator {
enum class Asked { thread, block, threads, blocks };
template <Asked what>
struct Coordinates {
  struct {
    operator unsigned() const {
      const Fiber& f = self();
      if constexpr (what == Asked::thread) return f.thread_index.x;
      else if constexpr (what == Asked::block) return f.block->index.x;
      else if constexpr (what == Asked::threads) return f.block->grid->threads.x;
      else return f.block->grid->blocks.x;
    }
  } x;
};
}  // namespace emulator
inline constexpr emulator::Coordinates<emulator::Asked::thread> threadIdx{};
inline constexpr emulator::Coordinates<emulator::Asked::block> blockIdx{};
inline constexpr emulator::Coordinates<emulator::Asked::threads> blockDim{};
inline constexpr emulator::Coordinates<emulator::Asked::blocks> gridDim{};

// A place in the code has one array per block, in a heap block of its own so that AddressSanitizer knows its ends.
#define RLKERN_SHARED(type, name, count)    \
  static const char rlkern_site_##name = 0; \
  type* const name = static_cast<type*>(emulator::shared_array(&rlkern_site_##name, sizeof(type) * (count)))
#define RLKERN_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(emulator::dynamic_array())

// ---- within a warp: its threads meet; a mask names all of them ----------------------------------------------------------
namespace emulator {
template <class T>
T exchanged(unsigned mask, T mine, int from) {  // out of the warp: one's own
  uint64_t word = 0;
  std::memcpy(&word, &mine, sizeof(T));
  const uint64_t* all = warp_exchange(mask, word);
  std::memcpy(&mine, &all[from], sizeof(T));
  return mine;
}
inline int lane() { return static_cast<int>(self().thread_index.x % 32); }
}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T mine, int from) {
  return emulator::exchanged(mask, mine, from & 31);
}
template <class T>
T __shfl_down_sync(unsigned mask, T mine, unsigned distance) {
  const int from = emulator::lane() + static_cast<int>(distance);
  return emulator::exchanged(mask, mine, from < 32 ? from : emulator::lane());
}
template <class T>
T __shfl_up_sync(unsigned mask, T mine, unsigned distance) {
  const int from = emulator::lane() - static_cast<int>(distance);
  return emulator::exchanged(mask, mine, from >= 0 ? from : emulator::lane());
}
template <class T>
T __shfl_xor_sync(unsigned mask, T mine, int bits) {
  return emulator::exchanged(mask, mine, emulator::lane() ^ bits);
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  const uint64_t* all = emulator::warp_exchange(mask, vote != 0);
  unsigned found = 0;
  for (int i = 0; i < 32; ++i) found |= static_cast<unsigned>(all[i]) << i;
  return found;
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == 0xffffffffu; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::warp_exchange(mask, 0); }

// ---- within a block, and beyond -----------------------------------------------------------------------------------------
inline void __syncthreads() { emulator::block_barrier(); }
inline void __threadfence() { emulator::overtake(); }
inline void __threadfence_block() { emulator::overtake(); }
inline void __nanosleep(unsigned) { emulator::overtake(); }

template <class T, class Make>
T emulated_atomic(T* address, Make make) {  // whole: no fiber is interrupted
  static_assert(std::is_integral_v<T>, "floats are never added atomically");
  emulator::overtake();
  const T before = *address;
  *address = make(before);
  emulator::overtake();
  return before;
}
template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  return emulated_atomic(address, [&](T x) { return static_cast<T>(x + value); });
}
template <class T>
T atomicMax(T* address, std::common_type_t<T> value) {
  return emulated_atomic(address, [&](T x) { return x > value ? x : value; });
}
template <class T>
T atomicOr(T* address, std::common_type_t<T> value) {
  return emulated_atomic(address, [&](T x) { return static_cast<T>(x | value); });
}
template <class T>
T atomicExch(T* address, std::common_type_t<T> value) {
  return emulated_atomic(address, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return emulated_atomic(address, [&](T x) { return x == expected ? value : x; });
}
template <class T>
T __ldcg(const T* address) {
  emulator::overtake();
  return *address;
}
template <class T>
void __stwb(T* address, T value) {
  *address = value;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}

inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

// ---- the runtime: one device of kMultiprocessors, whose launches are done when they return -------------------------------
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMaxSharedMemoryPerMultiprocessor };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return emulator::failure().c_str(); }
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulator::kMultiprocessors : static_cast<int>(emulator::kSharedBytes);
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t shared) {
  *blocks = shared > emulator::kSharedBytes ? 0 : shared * emulator::kBlocks > emulator::kSharedBytes ? 1 : emulator::kBlocks;
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const bool together = config->numAttrs && config->attrs->val.cooperative;
  return emulator::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, together, [&] { kernel(Parameters(arguments)...); });
}
