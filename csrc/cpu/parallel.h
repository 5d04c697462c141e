// SPDX-License-Identifier: Apache-2.0
// The one place where threads are made: chunks of rows, handed out as threads come for them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace rlkern {

[[noreturn]] void out_of_memory();  // throws std::bad_alloc

// Fresh 4 KiB pages cost more than a kernel: asks for 2 MiB ones where they fit inside. A hint, never an error.
void advise_huge_pages(uintptr_t address, size_t bytes);

using ChunkFn = void (*)(void* context, int64_t begin, int64_t end);

// Calls fn on [0, count) in chunks of `grain`. Which thread takes a chunk is not fixed, so a chunk may only write what
// belongs to its own rows; sums are merged by the caller in row order, and bits do not depend on the thread count.
void parallel_chunks(int64_t count, int64_t grain, int threads, ChunkFn fn, void* context);

// Rows of about `work` elements each; short jobs stay on the calling thread (a fork costs more than they do).
template <class F>
inline void parallel_rows(int64_t rows, int64_t total, int threads, F&& f) {
  constexpr int64_t kSerial = 1 << 17, kChunk = 1 << 15;  // elements; measured in docs/performance.md
  const int64_t per_row = rows > 0 ? total / rows + 1 : 1;
  const int64_t grain = kChunk / per_row > 1 ? kChunk / per_row : 1;
  auto call = [](void* g, int64_t begin, int64_t end) { (*static_cast<F*>(g))(begin, end); };
  parallel_chunks(rows, grain, total < kSerial ? 1 : threads, call, const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace rlkern
