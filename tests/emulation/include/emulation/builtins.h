// SPDX-License-Identifier: MIT
// CUDA's keywords, variables and functions, as far as the kernels use them.
#pragma once

#include <atomic>
#include <cstdint>

#include "emulation/runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
// Under ThreadSanitizer each block has an operating-system thread of its own and so memory of its
// own; elsewhere blocks follow each other, and AddressSanitizer sees the ends of static arrays.
#if defined(__SANITIZE_THREAD__)
#define __shared__ static thread_local
#else
#define __shared__ static
#endif

#define threadIdx (::emulation::current->index)
#define blockIdx (::emulation::block_index())
#define blockDim (::emulation::block_size())
#define gridDim (::emulation::grid_size())

#define EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATION_SITE) { ::emulation::barrier({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_SITE) {
  ::emulation::sync_warp(mask, {file, line});
}
inline void __threadfence() { ::emulation::fence(); }

namespace emulation {

template <typename T>
T exchange(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 16);
  __builtin_memcpy(current->given, &value, sizeof(T));
  shuffle(mask, source, site);
  __builtin_memcpy(&value, current->taken, sizeof(T));
  return value;
}

template <typename T>
T checked_load(const T* p, const char* what) {
  check_aligned(p, sizeof(T), what);
  return *p;
}

}  // namespace emulation

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int with, EMULATION_SITE) {
  const int source = ::emulation::current->lane() ^ with;
  return ::emulation::exchange(mask, value, source, {file, line});
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, EMULATION_SITE) {
  return ::emulation::exchange(mask, value, source, {file, line});
}

template <typename T>
T __ldcs(const T* p) {
  return ::emulation::checked_load(p, "__ldcs");
}
template <typename T>
T __ldcg(const T* p) {
  return ::emulation::checked_load(p, "__ldcg");
}

inline unsigned atomicInc(unsigned* p, unsigned limit) {
  ::emulation::before_atomic(p);
  std::atomic_ref<unsigned> at(*p);
  unsigned old = at.load(std::memory_order_relaxed);
  while (!at.compare_exchange_weak(old, old >= limit ? 0 : old + 1, std::memory_order_relaxed)) {
  }
  ::emulation::after_atomic(p);
  return old;
}
