// SPDX-License-Identifier: Apache-2.0
// The machinery under cuda_runtime.h: fibers, their random order, barriers, and a wait that cannot end.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x_) : x(x_) {}
};

namespace emulator {

// A small chip, so that small tensors exceed it.
constexpr int kMultiprocessors = 3, kBlocks = 2;
constexpr size_t kSharedBytes = 16 << 10, kStack = 128 << 10;
constexpr uint64_t kPatience = 1'000'000;  // steps without a thread that ends or passes a barrier

// swapcontext asks the system for the signal mask each time, which takes longer than most threads run.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
__attribute__((naked, noinline)) inline void switch_stacks(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
inline void go(Context& from, Context& to) { switch_stacks(&from.stack_pointer, to.stack_pointer); }
inline void make(Context& c, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes) - 1;  // aligned as if `entry` had been called
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  c.stack_pointer = top;
}
#else
using Context = ucontext_t;
inline void go(Context& from, Context& to) { swapcontext(&from, &to); }
inline void make(Context& c, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&c);
  c.uc_stack.ss_sp = stack, c.uc_stack.ss_size = bytes, c.uc_link = nullptr;
  makecontext(&c, entry, 0);
}
#endif

struct Grid {
  dim3 blocks, threads;
  size_t shared = 0;
  unsigned waiting = 0;  // threads at the grid's barrier
  bool together = false;
  const std::function<void()>* body = nullptr;
};
struct Fiber;
struct Warp {
  unsigned arrived = 0, threads = 0;
  uint64_t round = 0;
  uint64_t words[2][32] = {};  // of even and odd rounds: who is late still reads the last one
  std::vector<Fiber*> waiting;
};
struct Block {
  Grid* grid = nullptr;
  uint3 index;
  unsigned alive = 0;
  std::vector<Warp> warps;
  std::vector<Fiber*> waiting;  // at the block's barrier
  std::map<const void*, std::unique_ptr<char[]>> shared;
};
struct Fiber {
  Block* block = nullptr;
  uint3 thread_index;
  Context context;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  bool done = false;
};

struct State {
  std::mutex one_launch;
  std::string failed = "no error";
  uint64_t random = 0x9e3779b97f4a7c15u, steps = 0;
  Fiber* running = nullptr;
  Context scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  std::vector<Fiber*> ready, at_grid_barrier;
  std::vector<char*> stacks;  // free ones

  uint64_t draw(uint64_t below) {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    return (random >> 11) % below;
  }
};
inline State& state() {
  static State* const one = [] {
    auto* s = new State;
    if (const char* seed = std::getenv("EMULATOR_SEED")) s->random += static_cast<uint64_t>(std::atoll(seed)) * 0x2545f4914f6cdd1du;
    return s;
  }();
  return *one;
}
inline std::string& failure() { return state().failed; }
inline Fiber& self() { return *state().running; }

// ---- switching ----------------------------------------------------------------------------------------------------------
inline void to_scheduler(Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(f.done ? nullptr : &f.fake_stack, state().scheduler_stack, state().scheduler_stack_size);
#endif
  go(f.context, state().scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, &state().scheduler_stack, &state().scheduler_stack_size);
#endif
}
inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &state().scheduler_stack, &state().scheduler_stack_size);
#endif
  Fiber& f = self();
  (*f.block->grid->body)();
  f.done = true;
  to_scheduler(f);
}
inline void resume(Fiber& f) {
  state().running = &f;
#if defined(__SANITIZE_ADDRESS__)
  void* mine = nullptr;
  __sanitizer_start_switch_fiber(&mine, f.stack, kStack);
#endif
  go(state().scheduler, f.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(mine, nullptr, nullptr);
#endif
}
inline void start(Fiber& f) {
  State& s = state();
  if (s.stacks.empty()) {
    f.stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (f.stack == MAP_FAILED) std::abort();
  } else {
    f.stack = s.stacks.back();
    s.stacks.pop_back();
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(f.stack, kStack);  // of frames that were left without a return
#endif
  make(f.context, f.stack, kStack, entry);
}

// ---- what a thread can do -------------------------------------------------------------------------------------------------
inline void release(std::vector<Fiber*>& waiting) {
  state().steps = 0;
  state().ready.insert(state().ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}
// Others may run first.
inline void overtake() {
  State& s = state();
  if (s.draw(4) == 0 && s.steps < kPatience / 2) return;
  s.ready.push_back(s.running);
  to_scheduler(*s.running);
}
inline void block_barrier() {
  Block& b = *self().block;
  b.waiting.push_back(&self());
  if (b.waiting.size() == b.grid->threads.x) release(b.waiting);
  to_scheduler(self());
}
inline void grid_barrier() {
  State& s = state();
  Grid& g = *self().block->grid;
  s.at_grid_barrier.push_back(&self());
  if (!g.together) s.at_grid_barrier.clear();  // a grid that cannot wait for itself: nobody ever returns
  else if (++g.waiting == g.blocks.x * g.threads.x) g.waiting = 0, release(s.at_grid_barrier);
  to_scheduler(self());
}
// What every thread of the warp brings. Two rounds share no memory, so one barrier is enough.
inline const uint64_t* warp_exchange(unsigned mask, uint64_t mine) {
  Block& b = *self().block;
  const unsigned t = self().thread_index.x;
  Warp& w = b.warps[t / 32];
  const uint64_t parity = w.round & 1;
  w.words[parity][t % 32] = mine;
  w.waiting.push_back(&self());
  if (mask != (w.threads == 32 ? 0xffffffffu : (1u << w.threads) - 1)) w.arrived = 64;  // a mask of some: never complete
  if (++w.arrived == w.threads) {
    w.arrived = 0, ++w.round;
    release(w.waiting);
  }
  to_scheduler(self());
  return w.words[parity];
}
inline void* shared_array(const void* site, size_t bytes) {
  auto& found = self().block->shared[site];
  if (!found) {
    found.reset(new char[bytes]);
    std::memset(found.get(), 0xff, bytes);  // NaN
  }
  return found.get();
}
inline void* dynamic_array() {
  static const char site = 0;
  return shared_array(&site, self().block->grid->shared);
}

// ---- a launch -------------------------------------------------------------------------------------------------------------
inline std::unique_ptr<Block> block_of(Grid& grid, unsigned index, std::vector<std::unique_ptr<Fiber>>& fibers) {
  auto b = std::make_unique<Block>();
  b->grid = &grid, b->index.x = index, b->alive = grid.threads.x;
  b->warps.resize((grid.threads.x + 31) / 32);
  for (unsigned t = 0; t < grid.threads.x; ++t) {
    ++b->warps[t / 32].threads;
    auto f = std::make_unique<Fiber>();
    f->block = b.get(), f->thread_index.x = t;
    start(*f);
    state().ready.push_back(f.get());
    fibers.push_back(std::move(f));
  }
  return b;
}

inline int fail(const std::string& why) {
  state().failed = "emulator: " + why;
  return 1;
}

// Runs every block to its end; at most as many at once as the chip holds.
inline int run(dim3 blocks, dim3 threads, size_t shared, bool together, const std::function<void()>& body) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.one_launch);
  const unsigned resident = kMultiprocessors * kBlocks;
  if (threads.x == 0 || threads.x > 1024 || blocks.x == 0) return fail("a launch of no threads, or of too many");
  if (shared > kSharedBytes) return fail("more shared memory than a multiprocessor has");
  if (together && blocks.x > resident) return fail("a cooperative grid that the chip cannot hold");
  Grid grid{blocks, threads, shared, 0, together, &body};
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::map<Block*, std::unique_ptr<Block>> at_work;
  std::vector<unsigned> order(blocks.x);
  for (unsigned i = 0; i < blocks.x; ++i) order[i] = i;
  for (unsigned i = blocks.x; i > 1; --i) std::swap(order[i - 1], order[s.draw(i)]);
  s.ready.clear(), s.at_grid_barrier.clear(), s.steps = 0;
  std::string why;
  while (true) {
    while (!order.empty() && at_work.size() < resident) {
      auto b = block_of(grid, order.back(), fibers);
      order.pop_back();
      Block* const address = b.get();
      at_work[address] = std::move(b);
    }
    if (at_work.empty()) break;
    if (s.ready.empty()) why = "threads wait where not all of their block, warp or grid arrive";
    if (++s.steps > kPatience) why = "threads wait for a write that nobody makes";
    if (!why.empty()) break;
    std::swap(s.ready[s.draw(s.ready.size())], s.ready.back());
    Fiber& f = *s.ready.back();
    s.ready.pop_back();
    resume(f);
    if (!f.done) continue;
    s.steps = 0;
    s.stacks.push_back(f.stack);
    f.stack = nullptr;
    if (--f.block->alive == 0) at_work.erase(f.block);
  }
  for (const auto& f : fibers)
    if (f->stack) s.stacks.push_back(f->stack);
  return why.empty() ? 0 : fail(why);
}

}  // namespace emulator
