// SPDX-License-Identifier: MIT
// Memory of the emulated GPUs, and the host's pinned memory. What is new and what was freed holds
// all ones: NaN in every floating-point type.
#pragma once

#include <c10/core/Allocator.h>

#include <cstddef>

namespace emulation {

c10::Allocator* device_memory();
c10::Allocator* pinned_memory();

// To the system, at once.
void give_back(void* memory);

// Bytes of device memory, as torch's statistics count them.
size_t allocated();
size_t most_allocated();
void reset_most_allocated();

// While one lives, whoever touches memory of another device ends the process. That of the first
// device stays open.
class OthersMemoryIsClosed {
 public:
  explicit OthersMemoryIsClosed(c10::DeviceIndex device);
  ~OthersMemoryIsClosed();

 private:
  c10::DeviceIndex device_;
};

}  // namespace emulation
