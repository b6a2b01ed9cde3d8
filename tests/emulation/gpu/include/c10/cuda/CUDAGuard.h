// SPDX-License-Identifier: MIT
// Stands in for torch's header, as far as our bindings use it.
#pragma once

#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace c10::cuda {

class CUDAGuard {
 public:
  explicit CUDAGuard(Device device) : guard_(device) {}
  explicit CUDAGuard(DeviceIndex index) : guard_(Device(kCUDA, index)) {}

 private:
  DeviceGuard guard_;
};

}  // namespace c10::cuda
