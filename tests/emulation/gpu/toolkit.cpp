// SPDX-License-Identifier: MIT
// The functions of the CUDA runtime that bindings call, and what emulated_gpu.py calls by ctypes.
#include <c10/core/DeviceGuard.h>
#include <c10/core/StorageImpl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "cuda_runtime_api.h"
#include "memory.h"
#include "streams.h"

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  emulation::set_current_device(static_cast<c10::DeviceIndex>(device));
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream->is_captured() ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int byte, size_t count, cudaStream_t stream) {
  const bool accepted = emulation::enqueue(stream, [=] {
    std::memset(to, byte, count);
    return true;
  });
  return accepted ? cudaSuccess : cudaErrorInvalidValue;
}

namespace {
using Graph = std::shared_ptr<emulation::Kept>;
}

#pragma GCC visibility push(default)
extern "C" {

int gpu_current_device() { return emulation::current_device(); }
void gpu_set_device(int device) { cudaSetDevice(device); }
void gpu_forbid_waiting(int forbid) { emulation::forbid_waiting(forbid != 0); }
int64_t gpu_launches() { return emulation::launches(); }
size_t gpu_allocated() { return emulation::allocated(); }
size_t gpu_most_allocated() { return emulation::most_allocated(); }
void gpu_reset_most_allocated() { emulation::reset_most_allocated(); }

// Of the current stream.
void gpu_sleep() { emulation::sleep(emulation::current_queue()); }
void gpu_begin_capture() { emulation::begin_capture(emulation::current_queue()); }
void* gpu_end_capture() { return new Graph(emulation::end_capture(emulation::current_queue())); }
void gpu_replay(const void* graph) {
  emulation::enqueue(emulation::current_queue(), [kept = *static_cast<const Graph*>(graph)] {
    kept->run();
    return true;
  });
}
void gpu_forget(void* graph) { delete static_cast<Graph*>(graph); }

void gpu_resize(c10::StorageImpl* storage, size_t bytes) {
  const c10::DeviceGuard guard(storage->device());
  c10::DataPtr to = emulation::device_memory()->allocate(bytes);
  const size_t common = std::min(bytes, storage->nbytes());
  if (common > 0) std::memcpy(to.get(), storage->data(), common);
  storage->set_data_ptr(std::move(to));
  storage->set_nbytes(bytes);
}

}  // extern "C"
#pragma GCC visibility pop
