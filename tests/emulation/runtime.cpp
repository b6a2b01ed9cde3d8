// SPDX-License-Identifier: MIT
// The scheduler of fibers and the checks. Never compiled with -fsanitize=thread: its own state is
// shared by fibers between which nothing is ordered.
#include "emulation/runtime.h"

#include <malloc.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "sanitizers.h"

#if !defined(__x86_64__)
#error "the emulation switches stacks in x86-64 assembly; another processor needs its own few lines"
#endif

namespace emulation {

constinit thread_local Thread* current = nullptr;

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

// What only this file needs to know of a thread.
struct Fiber : Thread {
  void* stack_pointer = nullptr;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
  void* sanitizer = nullptr;
  unsigned warp_syncs = 0;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  bool releases = false;  // a fence came after the last atomic
  int atomics_read = 0;
  const void* atomics[4] = {};
};

struct Warp {
  Fiber* lanes = nullptr;
  unsigned live = 0;
  unsigned waiting = 0;  // in a shuffle or a warp's barrier
  SyncPoint points[2];
};

// What a launch shares.
struct Grid {
  dim3 size, block;
  int64_t shared_bytes = 0;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  SyncPoint end;
  std::vector<void*> fibers;  // destroyed at the end: ThreadSanitizer reuses their numbers
};

struct Block {
  Grid* grid = nullptr;
  uint3 index{};
  std::unique_ptr<unsigned char[]> shared;
  std::vector<Fiber> threads;
  std::vector<Warp> warps;
  unsigned barriers = 0;
  // By parity: a fast thread's next arrival must not reach a slow one's present departure.
  SyncPoint points[2];
  void* scheduler_stack_pointer = nullptr;
  void* scheduler_fake_stack = nullptr;
  void* scheduler_fiber = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};

namespace {

constexpr size_t kStackBytes = 96 * 1024;  // below what malloc takes from the system each time
constexpr int64_t kSharedWithoutAsking = 48 * 1024;
constexpr int kMaxBlockThreads = 1024;

[[noreturn]] void fail(const char* message, Site site = {"", 0}) {
  std::fprintf(stderr, "EMULATION: %s", message);
  if (current != nullptr) {
    const uint3& b = current->block->index;
    std::fprintf(stderr, ", block %u,%u,%u thread %d", b.x, b.y, b.z, current->number);
  }
  if (site.line != 0) std::fprintf(stderr, ", %s:%d", site.file, site.line);
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  std::_Exit(70);
}

bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

Fiber& self() { return *static_cast<Fiber*>(current); }

// noipa: gcc would otherwise see that the body touches no other register, and keep values there.
__attribute__((naked, noipa)) void swap_stacks(void** /*rdi: kept*/, void* /*rsi: next*/) {
  asm volatile(
      "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15;"
      "mov %rsp, (%rdi); mov %rsi, %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

void to_scheduler(bool last) {
  Fiber& t = self();
  Block& b = *t.block;
  start_switch(last ? nullptr : &t.fake_stack, b.scheduler_stack, b.scheduler_stack_bytes);
  switch_fiber(b.scheduler_fiber);
  swap_stacks(&t.stack_pointer, b.scheduler_stack_pointer);
  finish_switch(t.fake_stack, nullptr, nullptr);
}

void fiber_main() {
  Fiber& t = self();
  Block& b = *t.block;
  finish_switch(nullptr, &b.scheduler_stack, &b.scheduler_stack_bytes);
  b.grid->body(b.grid->argument);
  if (!t.open.empty()) fail("a thread ends with a copy that it never committed");
  for (const auto& group : t.groups) {
    if (!group.empty()) fail("a thread ends without waiting for its copies");
  }
  t.done = true;
  release(&b.grid->end);
  to_scheduler(true);
  __builtin_trap();
}

void prepare(Fiber& t) {
  t.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(t.stack.get()) + kStackBytes) &
                                        ~uintptr_t{15});
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  t.stack_pointer = top;
  t.sanitizer = create_fiber();
  t.block->grid->fibers.push_back(t.sanitizer);
}

void run(Fiber& t) {
  Block& b = *t.block;
  current = &t;
  start_switch(&b.scheduler_fake_stack, t.stack.get(), kStackBytes);
  switch_fiber(t.sanitizer);
  swap_stacks(&b.scheduler_stack_pointer, t.stack_pointer);
  finish_switch(b.scheduler_fake_stack, nullptr, nullptr);
  current = nullptr;
}

void do_together(Warp& w, const Fiber& last) {
  if (w.live != 0xffffffffu) fail("a lane is missing where all of a warp are needed", last.site);
  // Copies: of what lanes write themselves ThreadSanitizer would say that nothing orders it.
  Given given;
  Taken taken{};
  for (int lane = 0; lane < 32; ++lane) {
    __builtin_memcpy(given.lanes[lane], w.lanes[lane].given, kGivenBytes);
  }
  last.instruction(given, taken);
  for (int lane = 0; lane < 32; ++lane) {
    __builtin_memcpy(w.lanes[lane].taken, taken.lanes[lane], kTakenBytes);
  }
}

// Lets the lanes of a warp go on if all that `t` names have come to the same place.
bool complete(Fiber& t) {
  Warp& w = *t.warp;
  const unsigned expected = t.mask & w.live;
  if ((w.waiting & expected) != expected) return false;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(expected >> lane & 1)) continue;
    const Fiber& other = w.lanes[lane];
    if (other.wait != t.wait || other.mask != t.mask || !same(other.site, t.site)) {
      fail("lanes of a warp meet in different places or with different masks", t.site);
    }
  }
  if (t.wait == Wait::kTogether) do_together(w, t);
  for (int lane = 0; lane < 32; ++lane) {
    if (!(expected >> lane & 1)) continue;
    Fiber& to = w.lanes[lane];
    if (to.wait == Wait::kShuffle) {
      // A lane that takes no part has nothing to give: all ones, a NaN.
      if (expected >> to.source & 1) {
        __builtin_memcpy(to.taken, w.lanes[to.source].given, kTakenBytes);
      } else {
        __builtin_memset(to.taken, 0xff, kTakenBytes);
      }
    }
    to.wait = Wait::kNothing;
  }
  w.waiting &= ~expected;
  return true;
}

void meet_warp(Wait wait, unsigned mask, Site site) {
  Fiber& t = self();
  if (!(mask >> t.lane() & 1)) fail("a lane is not in its own mask", site);
  t.wait = wait;
  t.mask = mask;
  t.site = site;
  t.warp->waiting |= 1u << t.lane();
  if (!complete(t)) to_scheduler(false);
}

// After a thread has ended: others may wait for no more than it.
void leave(Fiber& t) {
  Warp& w = *t.warp;
  w.live &= ~(1u << t.lane());
  for (int lane = 0; lane < 32; ++lane) {
    if (w.waiting >> lane & 1) complete(w.lanes[lane]);
  }
}

void arrive(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
}

class Schedule {
 public:
  explicit Schedule(const std::string& name) {
    reverse_ = name == "reverse";
    random_ = name.rfind("random:", 0) == 0;
    if (random_) generator_.seed(static_cast<unsigned>(std::stoul(name.substr(7))));
    if (!reverse_ && !random_ && name != "forward") fail("unknown schedule");
  }
  bool early_copies() const { return reverse_; }
  bool random() const { return random_; }
  std::vector<unsigned> order(unsigned n) {
    std::vector<unsigned> order(n);
    for (unsigned k = 0; k < n; ++k) order[k] = reverse_ ? n - 1 - k : k;
    if (random_) shuffle(order);
    return order;
  }
  void shuffle(std::vector<unsigned>& order) {
    for (size_t k = order.size(); k > 1; --k) std::swap(order[k - 1], order[generator_() % k]);
  }

 private:
  bool reverse_ = false, random_ = false;
  std::minstd_rand generator_;
};

Schedule& schedule() {
  static Schedule s("forward");
  return s;
}

const char* const kWaitNames[] = {"nothing", "__syncthreads", "a shuffle",
                                  "an instruction of the whole warp", "__syncwarp"};

[[noreturn]] void report_deadlock(const Block& b) {
  int shown = 0;
  for (const Fiber& t : b.threads) {
    if (t.done || ++shown > 8) continue;
    std::fprintf(stderr, "EMULATION: deadlock: block %u thread %d waits in %s, mask %08x, %s:%d\n",
                 b.index.x, t.number, kWaitNames[static_cast<int>(t.wait)], t.mask, t.site.file,
                 t.site.line);
  }
  fail("deadlock");
}

// All live threads wait in a barrier: at the same one?
void pass_barrier(Block& b) {
  const Fiber* first = nullptr;
  for (Fiber& t : b.threads) {
    if (t.done) continue;
    if (first == nullptr) first = &t;
    if (!same(first->site, t.site)) fail("divergent __syncthreads", t.site);
  }
  ++b.barriers;
  for (Fiber& t : b.threads) t.wait = Wait::kNothing;
}

void run_block(Block& b) {
  b.scheduler_fiber = current_fiber();
  for (Fiber& t : b.threads) prepare(t);
  std::vector<unsigned> order = schedule().order(static_cast<unsigned>(b.threads.size()));
  size_t done = 0;
  while (done < b.threads.size()) {
    if (schedule().random()) schedule().shuffle(order);
    bool ran = false;
    for (const unsigned k : order) {
      Fiber& t = b.threads[k];
      if (t.done || t.wait != Wait::kNothing) continue;
      ran = true;
      run(t);
      if (t.done) {
        ++done;
        leave(t);
      }
    }
    if (ran) continue;
    for (const Fiber& t : b.threads) {
      if (!t.done && t.wait != Wait::kBarrier) report_deadlock(b);
    }
    pass_barrier(b);
  }
}

// A block's stacks are freed at its end. The system would get their pages, and the next block would
// fault for each anew, which was two thirds of a run's time.
void keep_freed_memory() {
  [[maybe_unused]] static const int set = mallopt(M_TRIM_THRESHOLD, 1 << 30) +
                                          mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the most it takes
}

void make_and_run_block(Grid& grid, unsigned number) {
  [[maybe_unused]] const Unwatched unwatched;
  // On the heap: ThreadSanitizer forgets what was synchronised there when it is freed. On a stack
  // that the next block's thread gets again, one block's barriers would order the next one.
  const auto block = std::make_unique<Block>();
  Block& b = *block;
  b.grid = &grid;
  b.index = {number % grid.size.x, number / grid.size.x % grid.size.y,
             number / (grid.size.x * grid.size.y)};
  b.shared =
      std::make_unique_for_overwrite<unsigned char[]>(static_cast<size_t>(grid.shared_bytes));
  std::memset(b.shared.get(), 0xff, static_cast<size_t>(grid.shared_bytes));
  const int n = static_cast<int>(grid.block.x);
  b.threads = std::vector<Fiber>(static_cast<size_t>(n));
  b.warps.resize(static_cast<size_t>((n + 31) / 32));
  for (int k = 0; k < n; ++k) {
    Fiber& t = b.threads[static_cast<size_t>(k)];
    t.index = {static_cast<unsigned>(k), 0, 0};
    t.number = k;
    t.block = &b;
    t.warp = &b.warps[static_cast<size_t>(k / 32)];
    if (k % 32 == 0) t.warp->lanes = &t;
    t.warp->live |= 1u << k % 32;
  }
  run_block(b);
}

std::map<const void*, int64_t>& allowed_shared() {
  static std::map<const void*, int64_t> allowed;
  return allowed;
}

}  // namespace

const dim3& block_size() { return current->block->grid->block; }
const dim3& grid_size() { return current->block->grid->size; }
const uint3& block_index() { return current->block->index; }
unsigned char* dynamic_shared() { return current->block->shared.get(); }

void use_schedule(const char* name) { schedule() = Schedule(name); }

bool allow_shared(const void* kernel, int64_t bytes) {
  if (bytes > most_shared) return false;
  allowed_shared()[kernel] = bytes;
  return true;
}

bool launch(const void* kernel, dim3 grid_size, int threads, int64_t shared_bytes,
            void (*body)(const void*), const void* argument) {
  const auto allowed = allowed_shared().find(kernel);
  const int64_t most =
      std::max(kSharedWithoutAsking, allowed == allowed_shared().end() ? 0 : allowed->second);
  const bool empty = grid_size.x == 0 || grid_size.y == 0 || grid_size.z == 0;
  if (empty || grid_size.y > 65535 || grid_size.z > 65535 || grid_size.x > 0x7fffffffu)
    return false;
  if (threads < 1 || threads > kMaxBlockThreads || shared_bytes > most) return false;
  keep_freed_memory();
  Grid grid;
  grid.size = grid_size;
  grid.block = dim3(static_cast<unsigned>(threads));
  grid.shared_bytes = shared_bytes;
  grid.body = body;
  grid.argument = argument;
  for (const unsigned k : schedule().order(grid_size.x * grid_size.y * grid_size.z)) {
    if (kTsan) {
      std::thread(make_and_run_block, std::ref(grid), k).join();
    } else {
      make_and_run_block(grid, k);
    }
  }
  for (void* fiber : grid.fibers) destroy_fiber(fiber);
  acquire(&grid.end);  // what follows the launch sees what it wrote
  return true;
}

void barrier(Site site) {
  Fiber& t = self();
  SyncPoint& point = t.block->points[t.block->barriers % 2];
  release(&point);
  t.wait = Wait::kBarrier;
  t.site = site;
  to_scheduler(false);
  acquire(&point);
}

void sync_warp(unsigned mask, Site site) {
  Fiber& t = self();
  SyncPoint& point = t.warp->points[t.warp_syncs++ % 2];
  release(&point);
  meet_warp(Wait::kWarpSync, mask, site);
  acquire(&point);
}

void shuffle(unsigned mask, int source, Site site) {
  self().source = source & 31;
  meet_warp(Wait::kShuffle, mask, site);
}

void all_lanes(Instruction instruction, Site site) {
  self().instruction = instruction;
  meet_warp(Wait::kTogether, 0xffffffffu, site);
}

void fence() {
  Fiber& t = self();
  for (int k = 0; k < t.atomics_read; ++k) acquire(t.atomics[k]);
  t.atomics_read = 0;
  t.releases = true;
}

void before_atomic(const void* p) {
  Fiber& t = self();
  if (t.releases) release(p);
  t.releases = false;
}

void after_atomic(const void* p) {
  Fiber& t = self();
  if (t.atomics_read == 4) fail("more atomics without a fence than the emulation follows");
  t.atomics[t.atomics_read++] = p;
}

void copy_async(void* shared, const void* global, int bytes) {
  check_aligned(shared, static_cast<uint64_t>(bytes), "cp.async");
  check_aligned(global, static_cast<uint64_t>(bytes), "cp.async");
  const unsigned char* const begin = current->block->shared.get();
  const unsigned char* const to = static_cast<unsigned char*>(shared);
  if (to < begin || to + bytes > begin + current->block->grid->shared_bytes) {
    fail("cp.async beside the dynamic shared memory");
  }
  self().open.push_back({shared, global, bytes});
}

void copy_async_commit() {
  Fiber& t = self();
  if (schedule().early_copies()) arrive(t.open);
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

void copy_async_wait(int pending) {
  Fiber& t = self();
  const size_t keep = static_cast<size_t>(pending);
  while (t.groups.size() > keep) {
    if (!schedule().early_copies()) arrive(t.groups.front());
    t.groups.erase(t.groups.begin());
  }
}

void check_aligned(const void* p, uint64_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes == 0) return;
  char message[64];
  std::snprintf(message, sizeof(message), "%s: misaligned", what);
  fail(message);
}

}  // namespace emulation
