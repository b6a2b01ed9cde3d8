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

// Thread k of all writes word k.
template <int kWords>
__global__ void __launch_bounds__(kPutThreads)
    put_kernel(const __grid_constant__ PutArgs<kWords> a) {
  const int k = static_cast<int>(blockIdx.x) * kPutThreads + static_cast<int>(threadIdx.x);
  if (k < a.count) a.to[k] = a.words[k];
}

template <int kWords>
cudaError_t put(uint4* to, const unsigned char* from, int64_t bytes, cudaStream_t stream) {
  constexpr int64_t kBytes = kWords * int64_t{kVectorBytes};
  for (int64_t first = 0; first < bytes; first += kBytes) {
    const int64_t count = at_most(kBytes, bytes - first);
    PutArgs<kWords> a{};
    a.to = to + first / kVectorBytes;
    a.count = ceil_div(count, kVectorBytes);
    __builtin_memcpy(a.words, from + first, static_cast<size_t>(count));
    const auto blocks = static_cast<unsigned>(ceil_div(a.count, kPutThreads));
    const cudaError_t error = launch(put_kernel<kWords>, dim3(blocks), kPutThreads, 0, stream, a);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_put(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  auto* const words = static_cast<uint4*>(to);
  const auto* const begin = static_cast<const unsigned char*>(from);
  return takes_large_arguments() ? put<put_words(kLargeArgumentBytes)>(words, begin, bytes, stream)
                                 : put<put_words(kArgumentBytes)>(words, begin, bytes, stream);
}

}  // namespace fused_step::cuda
