// SPDX-License-Identifier: MIT
// Bytes to device memory by way of a launch's arguments.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/policy.h"

namespace fused_step::cuda {
namespace {

template <int kWords>
struct PutArgs {
  uint4* to;  // [count]
  int64_t count;
  uint4 words[kWords];
};

// Thread k writes word k.
template <int kWords>
__global__ void __launch_bounds__(kWords) put_kernel(const __grid_constant__ PutArgs<kWords> a) {
  const int k = static_cast<int>(threadIdx.x);
  if (k < a.count) a.to[k] = a.words[k];
}

}  // namespace

cudaError_t launch_put(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  const int64_t words = bytes / kVectorBytes;
  for (int64_t first = 0; first < words; first += kPutWords) {
    PutArgs<kPutWords> a{};
    a.to = static_cast<uint4*>(to) + first;
    a.count = at_most(kPutWords, words - first);
    __builtin_memcpy(a.words, static_cast<const uint4*>(from) + first,
                     static_cast<size_t>(a.count) * sizeof(uint4));
    const cudaError_t error = launch(put_kernel<kPutWords>, dim3(1), kPutWords, 0, stream, a);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fused_step::cuda
