// SPDX-License-Identifier: MIT
// What the kernels use beyond C++ and CUDA's own functions: dynamic shared memory, launches and
// every line of PTX. Builds that run the kernels on the host put a header of this name in front.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// An array in dynamic shared memory, aligned to 16.
#define FUSED_STEP_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace fused_step::cuda {

// Without it a block may ask for no more than 48 KiB.
template <typename... Params>
cudaError_t allow_shared(void (*kernel)(Params...), int64_t bytes) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

template <typename... Params>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, int64_t shared_bytes,
                   cudaStream_t stream, const Params&... params) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&params))...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid,
                          dim3(static_cast<unsigned>(threads)), pointers,
                          static_cast<size_t>(shared_bytes), stream);
}

// What a launch can take by value, and what it can where takes_large_arguments().
constexpr int64_t kArgumentBytes = 4096;
constexpr int64_t kLargeArgumentBytes = CUDART_VERSION >= 12010 ? 32764 : kArgumentBytes;

// From CUDA 12.1 on, toolkit and driver.
inline bool takes_large_arguments() {
  int driver = 0;
  return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12010;
}

// The same value, of which the compiler forgets what it knows: what was computed from it before is
// computed again rather than kept in registers.
__device__ __forceinline__ void forget(unsigned short& word) { asm volatile("" : "+h"(word)); }
__device__ __forceinline__ void forget(unsigned& word) { asm volatile("" : "+r"(word)); }
__device__ __forceinline__ void forget(uint2& word) {
  asm volatile("" : "+r"(word.x), "+r"(word.y));
}
__device__ __forceinline__ void forget(uint4& word) {
  asm volatile("" : "+r"(word.x), "+r"(word.y), "+r"(word.z), "+r"(word.w));
}

// Starts to copy 4, 8 or 16 bytes, both addresses aligned to that.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes)
                 : "memory");
  }
}

// Ends a group of copies.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most kPending of the calling thread's groups are under way. The others' bytes are then
// there for this thread, for no other.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace fused_step::cuda
