// SPDX-License-Identifier: MIT
// One step of SGD over all CUDA tensors of all param groups: a launch for each device, group and
// storage, from a table of pointers in device memory. Builds with CUDA only.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>
#include <deque>
#include <vector>

#include "bindings/device_scratch.h"
#include "bindings/sgd_items.h"
#include "cuda/launch.h"

namespace fused_step {

// The tables of one optimizer, kept from one step to the next.
class SgdCuda {
 public:
  // Enqueues the step on each device's current stream; nothing waits for it. The norm that
  // max_norm asks for, [] on its device, else undefined.
  at::Tensor step(const SgdCudaStep& step);

 private:
  // What a table's chunks and launches follow from.
  struct Shape {
    SgdStorage storage;
    int32_t group;
    int64_t n;

    bool operator==(const Shape&) const = default;
  };
  struct Launch {
    SgdStorage storage;
    int32_t group;
    int64_t first;  // chunk
    int64_t count;
  };
  // What one device needs. `rows` is what its memory holds.
  struct Table {
    c10::DeviceIndex device = -1;
    c10::StreamId stream = 0;
    std::vector<Shape> shapes;
    std::vector<Launch> launches;
    std::vector<cuda::SgdTensor> rows;
    int64_t chunk_count = 0;
    at::Tensor rows_memory;    // bytes
    at::Tensor chunks_memory;  // bytes
    DeviceScratch scratch;
  };
  // A device's part of a step, ready to be launched.
  struct Ready {
    Table* table;
    c10::cuda::CUDAStream stream;
    cuda::Scratch scratch;  // for the norm
    at::Tensor grad_scale;
    at::Tensor found_inf;
    at::Tensor norm;
  };

  Table& table_of(c10::DeviceIndex device);
  static Ready prepare(const SgdCudaStep& step, Table& table, bool capturing);
  static void fill(const SgdCudaStep& step, Table& table, bool capturing);
  static void launch_norm(const SgdCudaStep& step, const Ready& ready);
  static void launch_updates(const SgdCudaStep& step, const Ready& ready);

  std::deque<Table> tables_;  // they stay where they are
};

}  // namespace fused_step
