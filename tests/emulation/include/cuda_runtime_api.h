// SPDX-License-Identifier: MIT
// Stands in for the toolkit's header where kernels run on the host: what launchers name.
#pragma once

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;

namespace emulation {

// There is one stream, and what is launched runs at once.
template <typename Work>
bool enqueue(cudaStream_t, const Work& work) {
  return work();
}

}  // namespace emulation
