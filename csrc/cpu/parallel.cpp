// SPDX-License-Identifier: Apache-2.0
// A pool whose caller works too and waits only for chunks that another thread has begun. An OpenMP region waits for every
// thread of its team: with a busy neighbour on the core that cost a scheduler quantum a call (docs/performance.md).
#include "parallel.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

namespace rlkern {
namespace {

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

struct Job {
  ChunkFn fn;
  void* context;
  int64_t count, grain, chunks;
  std::atomic<int64_t> next{0}, done{0};
  std::atomic<int> places;  // helpers that may still join

  void work() {
    for (int64_t i = next.fetch_add(1); i < chunks; i = next.fetch_add(1)) {
      const int64_t begin = (chunks - 1 - i) * grain;  // downwards, as the kernels walk
      fn(context, begin, begin + grain < count ? begin + grain : count);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

class Pool {
 public:
  // False if another thread's job is running: the caller then works alone.
  bool run(const std::shared_ptr<Job>& job, int helpers) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; threads_ < helpers; ++threads_) std::thread(&Pool::help, this).detach();
      job_ = job;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job->work();
    for (int spins = 0; job->done.load(std::memory_order_acquire) < job->chunks; ++spins) spins < kSpins ? pause_briefly() : std::this_thread::yield();
    std::lock_guard<std::mutex> lock(mutex_);
    job_.reset();
    return true;
  }

 private:
  static constexpr int kSpins = 2000;  // some tens of microseconds: calls follow each other closely in a trainer's step
  void help() {
    for (uint64_t seen = 0;;) {
      for (int spins = 0; spins < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spins) pause_briefly();
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        job = job_;
      }
      if (job && job->places.fetch_sub(1) > 0) job->work();
    }
  }
  std::mutex turn_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::shared_ptr<Job> job_;
  int threads_ = 0;
};

Pool* const pool = new Pool;  // never destroyed: its threads may outlive main
const pid_t loaded_in = getpid();  // a forked child has none of the threads

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
  if (threads > 1 && getpid() == loaded_in) {
    const auto job = std::make_shared<Job>();
    job->fn = fn, job->context = context, job->count = count, job->grain = grain, job->chunks = chunks;
    job->places = threads - 1;
    if (pool->run(job, threads - 1)) return;
  }
  if (count > 0) fn(context, 0, count);
}

}  // namespace rlkern
