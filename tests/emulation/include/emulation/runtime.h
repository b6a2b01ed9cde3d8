// SPDX-License-Identifier: MIT
// Runs a kernel on the host: a fiber for each thread, one block after the other. What it notices
// (divergent barriers, lanes outside their mask, deadlocks, bad alignment, too much shared memory)
// ends the program with a line that begins "EMULATION:".
#pragma once

#include <cstdint>

#include "emulation/vector_types.h"

namespace emulation {

struct Block;
struct Warp;

enum class Wait : int8_t { kNothing, kBarrier, kShuffle, kTogether, kWarpSync };

// What the lanes of a warp bring to an instruction that they do together, and what they get of it.
constexpr int kGivenBytes = 48;
constexpr int kTakenBytes = 16;
struct Given {
  alignas(16) unsigned char lanes[32][kGivenBytes];

  template <typename T>
  T as(int lane) const {
    T value;
    __builtin_memcpy(&value, lanes[lane], sizeof(T));
    return value;
  }
};
struct Taken {
  alignas(16) unsigned char lanes[32][kTakenBytes];
};
using Instruction = void (*)(const Given&, Taken&);

// What happens-before can be made of: ThreadSanitizer's acquire and release take an address.
struct SyncPoint {
  char at = 0;
};

struct Site {
  const char* file;
  int line;
};

struct Thread {
  uint3 index{};
  int number = 0;  // in the block
  Block* block = nullptr;
  Warp* warp = nullptr;
  Wait wait = Wait::kNothing;
  bool done = false;
  Site site{};
  unsigned mask = 0;
  int source = 0;  // lane that a shuffle reads
  Instruction instruction = nullptr;
  alignas(16) unsigned char given[kGivenBytes]{};
  alignas(16) unsigned char taken[kTakenBytes]{};

  int lane() const { return number % 32; }
};

// The running CUDA thread.
extern constinit thread_local Thread* current;

const dim3& block_size();
const dim3& grid_size();
const uint3& block_index();
unsigned char* dynamic_shared();

// The order of blocks, and of the threads in them, from now on: "forward", "reverse" or
// "random:<seed>". Under `reverse` asynchronous copies arrive when they are started, otherwise when
// they are waited for.
void use_schedule(const char* name);

// False, and nothing run, where CUDA would refuse.
bool allow_shared(const void* kernel, int64_t bytes);
bool launch(const void* kernel, dim3 grid, int threads, int64_t shared_bytes,
            void (*body)(const void*), const void* argument);

// What a block may ask for: from now on that of the smallest supported GPUs, sm_86 and sm_89.
constexpr int64_t kLeastShared = 99 * 1024;
inline int64_t most_shared = kLeastShared;

// Whether a launch takes more than 4 KiB by value, as newer drivers have it.
inline bool large_arguments = true;

void barrier(Site site);
void sync_warp(unsigned mask, Site site);
// Exchanges current->given for current->taken.
void shuffle(unsigned mask, int source, Site site);
// Makes current->taken of all lanes' current->given; every lane of the warp must come.
void all_lanes(Instruction instruction, Site site);
template <typename From, typename To>
void together(const From& given, To& taken, Instruction instruction, Site site) {
  static_assert(sizeof(From) <= kGivenBytes && sizeof(To) <= kTakenBytes);
  __builtin_memcpy(current->given, &given, sizeof(From));
  all_lanes(instruction, site);
  __builtin_memcpy(&taken, current->taken, sizeof(To));
}
// A fence makes the next atomic a release, and an acquire of those before it.
void fence();
void before_atomic(const void* p);
void after_atomic(const void* p);
void copy_async(void* shared, const void* global, int bytes);
void copy_async_commit();
void copy_async_wait(int pending);
void check_aligned(const void* p, uint64_t bytes, const char* what);

}  // namespace emulation
