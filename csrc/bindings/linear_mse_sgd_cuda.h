// SPDX-License-Identifier: MIT
// The whole step of one linear layer on CUDA tensors, like linear_mse_sgd.h for the CPU. Work is
// enqueued on the current stream of the weight's device; nothing waits for it. Builds with CUDA
// only.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "bindings/device_scratch.h"
#include "bindings/linear_mse_sgd.h"

namespace fused_step {

// From now on the plan of every step that it serves, "tiny", "one-pass" or "gemm", or again the one
// that policy.h chooses; for tests and benchmarks. TORCH_CHECK_VALUE: there is no such plan.
void use_cuda_plan(std::optional<std::string_view> name);

// The plan for a batch of B rows stored as `input_type`.
const char* cuda_plan_name(const LinearSgdState& state, at::ScalarType input_type, int64_t B);

// Why that plan is no deeper one; empty for the deepest.
std::string why_no_deeper_on_cuda(const LinearSgdState& state, at::ScalarType input_type,
                                  int64_t B);

// As linear_mse_sgd_cpu. While the stream is captured into a graph `scratch` is left alone: a
// replay must not share it with the steps outside.
at::Tensor linear_mse_sgd_cuda(const LinearSgdState& state, const at::Tensor& input,
                               const at::Tensor& target, DeviceScratch& scratch);

// As run_linear_mse_sgd_cpu. Steps that are enqueued count as done; `watch` is polled about every
// 50 ms of the device's time, of which a few are in the queue at most.
at::Tensor run_linear_mse_sgd_cuda(LinearSgdState state, const at::Tensor& inputs,
                                   const at::Tensor& targets, const RunOptions& options,
                                   DeviceScratch& scratch, RunWatch& watch);

}  // namespace fused_step
