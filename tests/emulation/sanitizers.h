// SPDX-License-Identifier: MIT
// What the sanitizers have to be told of fibers; nothing where they are not compiled in.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
// runtime.cpp itself is never instrumented for threads: EMULATION_TSAN says whether its users are.
#if defined(EMULATION_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace emulation {

#if defined(EMULATION_TSAN)
constexpr bool kTsan = true;
inline void acquire(const void* p) { __tsan_acquire(const_cast<void*>(p)); }
inline void release(const void* p) { __tsan_release(const_cast<void*>(p)); }
// The scheduler frees what unordered fibers used.
struct Unwatched {
  Unwatched() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
};
inline void* current_fiber() { return __tsan_get_current_fiber(); }
inline void* create_fiber() { return __tsan_create_fiber(0); }
inline void destroy_fiber(void* fiber) { __tsan_destroy_fiber(fiber); }
// Without synchronisation: that two threads run in turn here orders nothing on a GPU.
inline void switch_fiber(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }
#else
constexpr bool kTsan = false;
inline void acquire(const void*) {}
inline void release(const void*) {}
struct Unwatched {};
inline void* current_fiber() { return nullptr; }
inline void* create_fiber() { return nullptr; }
inline void destroy_fiber(void*) {}
inline void switch_fiber(void*) {}
#endif

#if defined(__SANITIZE_ADDRESS__)
inline void start_switch(void** keep, const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(keep, stack, bytes);
}
inline void finish_switch(void* kept, const void** stack, size_t* bytes) {
  __sanitizer_finish_switch_fiber(kept, stack, bytes);
}
#else
inline void start_switch(void**, const void*, size_t) {}
inline void finish_switch(void*, const void**, size_t*) {}
#endif

}  // namespace emulation
