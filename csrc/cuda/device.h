// SPDX-License-Identifier: MIT
// What the kernels use beyond C++ and CUDA's own functions: dynamic shared memory, launches and
// every line of PTX. Builds that run the kernels on the host put a header of this name in front.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/float16.h"

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

// The most dynamic shared memory that a block may ask for on the current device, 0 if none answers.
inline int64_t most_shared() {
  int device = 0, bytes = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                            device) == cudaSuccess;
  return known ? bytes : 0;
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

// Brings what lies at an address of global memory into L2, 32 bytes at least.
__device__ __forceinline__ void prefetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Four matrices of 8 x 8 16-bit elements from shared memory, by all lanes of a warp together. Lane
// 8 m + r names row r of matrix m: 16 adjacent bytes, aligned to 16. Word m of lane 4 g + t is then
// elements 2 t and 2 t + 1 of row g of matrix m, or, transposed, of its column g; the first is in
// the low half.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], const void* row) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  }
}

// One such word of each lane, of the transposed matrix, by all lanes of a warp together.
__device__ __forceinline__ unsigned transposed(unsigned word) {
  unsigned result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(word));
  return result;
}

// d[16, 8] += a[16, 16] b[16, 8], in float, by all lanes of a warp together; X is BFloat16 or
// Float16. Lane 4 g + t holds of d: row g, columns 2 t and 2 t + 1, then the same of row g + 8; of
// a, two elements to a word: row g, columns 2 t and 2 t + 1, row g + 8 likewise, then both of
// columns further on by 8; of b: column g, rows 2 t and 2 t + 1, then rows further on by 8.
#define FUSED_STEP_MMA(type)                                                 \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
template <typename X>
__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned (&a)[4],
                                             const unsigned (&b)[2]) {
  static_assert(sizeof(X) == 2);
  if constexpr (kIsFloat16<X>) {
    FUSED_STEP_MMA("f16");
  } else {
    FUSED_STEP_MMA("bf16");
  }
}
#undef FUSED_STEP_MMA

}  // namespace fused_step::cuda
