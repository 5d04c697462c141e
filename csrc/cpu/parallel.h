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

}  // namespace rlkern
