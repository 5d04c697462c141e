// SPDX-License-Identifier: Apache-2.0
#include "parallel.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

namespace rlkern {
namespace {
// OpenMP's pool does not survive fork(): a parallel region in a child waits for threads that do not exist there.
const pid_t loaded_in = getpid();
}  // namespace

void out_of_memory() { throw std::bad_alloc(); }

void advise_huge_pages(uintptr_t address, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (address + kHuge - 1) & ~(kHuge - 1), end = (address + bytes) & ~(kHuge - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

void parallel_chunks(int64_t count, int64_t grain, int threads, ChunkFn fn, void* context) {
  const int64_t chunks = (count + grain - 1) / grain;
  if (threads > chunks) threads = static_cast<int>(chunks);
  if (threads <= 1 || getpid() != loaded_in) {
    if (count > 0) fn(context, 0, count);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t begin = (chunks - 1 - i) * grain;  // downwards, as the kernels walk
    fn(context, begin, begin + grain < count ? begin + grain : count);
  }
}

}  // namespace rlkern
