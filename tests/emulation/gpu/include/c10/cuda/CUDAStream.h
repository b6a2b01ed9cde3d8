// SPDX-License-Identifier: MIT
// Stands in for torch's header, as far as our bindings use it.
#pragma once

#include <c10/core/Stream.h>
#include <c10/cuda/CUDAException.h>

#include "streams.h"

namespace c10::cuda {

class CUDAStream {
 public:
  explicit CUDAStream(Stream stream) : stream_(stream) {}

  Stream unwrap() const { return stream_; }
  StreamId id() const { return stream_.id(); }
  Device device() const { return stream_.device(); }
  operator cudaStream_t() const { return emulation::queue_of(stream_); }

 private:
  Stream stream_;
};

// Of the current device where `index` is -1.
inline CUDAStream getCurrentCUDAStream(DeviceIndex index = -1) {
  return CUDAStream(emulation::current_stream(index));
}

}  // namespace c10::cuda
