// SPDX-License-Identifier: MIT
// Stands in for the toolkit's header where bindings and kernels together run on the host.
#pragma once

#include <cstddef>
#include <functional>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

namespace emulation {

struct Queue;

// Does `work`, now or later. False: it was refused.
bool enqueue(Queue* queue, std::function<bool()> work);

}  // namespace emulation

using cudaStream_t = emulation::Queue*;

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaMemsetAsync(void* to, int byte, size_t count, cudaStream_t stream);
