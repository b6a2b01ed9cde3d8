// SPDX-License-Identifier: MIT
// Which engine serves a device: the CPU's always, CUDA's in builds that have it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <memory>
#include <string>

#include "bindings/device_scratch.h"
#include "bindings/linear_mse.h"
#include "bindings/linear_mse_passes.h"
#include "bindings/linear_mse_sgd.h"
#include "bindings/sgd_items.h"

namespace fused_step {

// Scratch memory that outlives a step, of whichever engine needs it.
struct EngineMemory {
  Workspace cpu;
  DeviceScratch cuda;
};

// Whether an engine of this build runs on `device`.
bool is_served(c10::Device device);

// Before the first operator that a thread of autograd's runs: cuBLAS warns where it is the first on
// its device.
void prepare_thread(c10::Device device);

// Whether the current stream of `device` is being captured into a graph.
bool is_captured(c10::Device device);

// Whether under autocast torch's own operators are the faster ones for a layer of float parameters:
// for its whole step, or for its loss with gradients.
bool is_left_to_autocast(c10::Device device, const LinearShape& shape, at::ScalarType input,
                         bool whole_step);

// What an optimizer keeps of its tensors on CUDA (sgd_cuda.h); null until it has any.
class SgdCuda;
using SgdCudaMemory = std::shared_ptr<SgdCuda>;

// Enqueues the step for the items on CUDA, of which there are some. The norm of all gradients where
// the step asks for it, else undefined.
at::Tensor sgd_cuda(const SgdCudaStep& step, SgdCudaMemory& memory);

// linear_mse.h's, by the engine of the weight's device.
LinearMseSignature linear_mse;

// The plan for B rows of `input`, and why no deeper one: empty for the deepest.
const char* plan_name(const LinearSgdState& state, const at::Tensor& input, int64_t B);
std::string why_no_deeper(const LinearSgdState& state, const at::Tensor& input, int64_t B);

// linear_mse_sgd.h's, by the engine of the weight's device.
at::Tensor linear_mse_sgd(const LinearSgdState& state, const at::Tensor& input,
                          const at::Tensor& target, EngineMemory& memory);
at::Tensor run_linear_mse_sgd(const LinearSgdState& state, const at::Tensor& inputs,
                              const at::Tensor& targets, const RunOptions& options,
                              EngineMemory& memory, RunWatch& watch);

}  // namespace fused_step
