// SPDX-License-Identifier: MIT
// What every binding of the CUDA engine needs: the devices it serves, scratch memory, and a
// GEMM with float32 sums. Builds with CUDA only.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/device_scratch.h"
#include "cuda/launch.h"

namespace fused_step {

// What the kernels were compiled for: "8.0", …, "12.0+PTX".
std::vector<std::string> cuda_archs();

// Whether one of those runs on the device. Asks the driver once for each device.
bool is_served_by_cuda(c10::Device device);

// Makes the device's context the calling thread's, as a launch does by itself.
void bind_to_thread(c10::Device device);

bool is_capturing(c10::cuda::CUDAStream stream);

// `bytes` of workspace and the tickets, from `kept` where it may be used and has enough. Memory
// that is replaced goes back to the caching allocator on the stream it was used on.
cuda::Scratch reserve_scratch(DeviceScratch& kept, c10::cuda::CUDAStream stream, int64_t bytes);

// out [M, N] = scale a b of a [M, K] and b [K, N] of one dtype; `out` may have another. Of 16-bit
// factors a wider result is not rounded on its way.
void gemm_into(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double scale = 1.0);

}  // namespace fused_step
