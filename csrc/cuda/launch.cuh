// SPDX-License-Identifier: Apache-2.0
// How a kernel is launched: one function, one macro for shared memory, errors that name the op. tests/cuda_emulator reads
// the same files as C++, so nothing here or below is spelled <<<>>> or __shared__.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

#include "../kernels.h"

// RLKERN_SHARED(type, name, count): an array of a block, its contents unknown. RLKERN_DYNAMIC_SHARED(type, name): the one
// whose bytes the launch gives.
#if defined(__CUDACC__)
#define RLKERN_SHARED(type, name, count)                                        \
  __shared__ __align__(16) unsigned char rlkern_##name[sizeof(type) * (count)]; \
  type* const name = reinterpret_cast<type*>(rlkern_##name)
#define RLKERN_DYNAMIC_SHARED(type, name)                        \
  extern __shared__ __align__(16) unsigned char rlkern_shared[]; \
  type* const name = reinterpret_cast<type*>(rlkern_shared)
#endif

namespace rlkern {
namespace RLKERN_ISA {

#if defined(__CUDACC__)
constexpr bool kEmulated = false;
#else
constexpr bool kEmulated = true;  // the host reads what a kernel wrote
#endif
constexpr int kWarp = 32;
constexpr int kWide = 16;  // bytes of the widest access of a thread
// Elements of T in the widest access.
template <class T>
constexpr int kVector = kWide / static_cast<int>(sizeof(T));
static_assert(kVector<float> == 4 && kVector<double> == 2, "128-bit accesses");

inline void check(cudaError_t found, const char* op) {
  if (found == cudaSuccess) return;
  cudaGetLastError();  // an error of the launch is the caller's now, not of whoever asks next
  throw std::runtime_error(std::string("rlkern.") + op + ": the CUDA kernel must run; got " + cudaGetErrorString(found) +
                           ". An earlier kernel may be at fault (CUDA_LAUNCH_BLOCKING=1); rlkern.use_backend(\"triton\") avoids this one.");
}

// The device of the call, for as long as this lives.
class OnDevice {
 public:
  OnDevice(int device, const char* op) {
    check(cudaGetDevice(&before_), op);
    if (device != before_) check(cudaSetDevice(device), op);
    moved_ = device != before_;
  }
  ~OnDevice() {
    if (moved_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool moved_ = false;
};

struct Grid {
  int64_t blocks = 0;
  int threads = 0;
  size_t shared = 0;         // bytes of RLKERN_DYNAMIC_SHARED
  bool cooperative = false;  // all blocks at once: the grid may wait for itself
};

// The one place that launches: on the stream and device of `place`. No blocks, no launch.
template <class... Parameters, class... Arguments>
void launch(const char* op, const Place& place, const Grid& grid, void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (grid.blocks == 0) return;
  if (grid.blocks > 0x7fffffff) throw std::runtime_error(std::string("rlkern.") + op + ": the tensors must fit one grid; split the batch.");
  const OnDevice device(place.device, op);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared;
  config.stream = static_cast<cudaStream_t>(place.stream);
  config.attrs = &attribute;
  config.numAttrs = grid.cooperative ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), op);
}

// ---- what the chip holds ------------------------------------------------------------------------------------------------
inline int device_number(cudaDeviceAttr attribute, const Place& place, const char* op) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, place.device), op);
  return value;
}

// How many blocks of a kernel run at once. Asked of the driver once per kernel, block and device.
template <class... Parameters>
int resident_blocks(const char* op, const Place& place, void (*kernel)(Parameters...), int threads, size_t shared) {
  static std::mutex mutex;
  static std::unordered_map<std::string, int> known;
  static std::unordered_map<std::string, size_t> allowed;  // once allowed, always: another size asks for less
  const std::string which = std::to_string(reinterpret_cast<size_t>(kernel)) + ' ' + std::to_string(place.device);
  const std::string key = which + ' ' + std::to_string(threads) + ' ' + std::to_string(shared);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  const OnDevice device(place.device, op);
  if (size_t& most = allowed[which]; shared > most) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), op);
    most = shared;
  }
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared), op);
  return known[key] = blocks * device_number(cudaDevAttrMultiProcessorCount, place, op);
}

// The memory between blocks: counters that are 0 before a launch and after it, then room that nobody clears.
constexpr int64_t kCounterBytes = 64 << 10;
inline unsigned* counters(const Place& place) { return static_cast<unsigned*>(place.memory); }
template <class T>
T* room_for(const char* op, const Place& place, int64_t count) {
  if (kCounterBytes + count * static_cast<int64_t>(sizeof(T)) > place.bytes)
    throw std::runtime_error(std::string("rlkern.") + op + ": the memory between blocks must hold this launch; it is too small.");
  return reinterpret_cast<T*>(static_cast<char*>(place.memory) + kCounterBytes);
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
