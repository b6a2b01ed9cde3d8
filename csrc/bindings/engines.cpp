// SPDX-License-Identifier: MIT
#include "bindings/engines.h"

#include "bindings/linear_mse_bfloat16.h"
#include "cpu/policy.h"

#ifdef FUSED_STEP_WITH_CUDA
#include <c10/cuda/CUDAStream.h>

#include "bindings/cuda_support.h"
#include "bindings/linear_mse_sgd_cuda.h"
#include "bindings/sgd_cuda.h"
#include "cuda/policy.h"
#endif

namespace fused_step {

namespace {

const char* cpu_plan_name(cpu::Plan plan) {
  return plan == cpu::Plan::kOnePass ? "one-pass" : "gemm";
}

std::string why_no_deeper_on_cpu(cpu::Plan plan, int64_t O) {
  if (plan == cpu::Plan::kOnePass) return "";
  if (O > cpu::kMaxOnePassOutputs) {
    return "one-pass serves up to " + std::to_string(cpu::kMaxOnePassOutputs) +
           " outputs, the layer has " + std::to_string(O);
  }
  return "with few rows, rows too long for the cache, or many weights in bfloat16 on a processor "
         "that multiplies it, two threaded GEMMs are faster than one-pass";
}

}  // namespace

#ifdef FUSED_STEP_WITH_CUDA

bool is_served(c10::Device device) {
  return device.is_cpu() || (device.is_cuda() && is_served_by_cuda(device));
}

void prepare_thread(c10::Device device) {
  if (device.is_cuda()) bind_to_thread(device);
}

bool is_captured(c10::Device device) {
  return device.is_cuda() && is_capturing(c10::cuda::getCurrentCUDAStream(device.index()));
}

// One-pass reads x as it is, once; the GEMMs' arithmetic in float is slower than that in 16 bit.
bool is_left_to_autocast(c10::Device device, const LinearShape& shape, at::ScalarType input,
                         bool whole_step) {
  if (!device.is_cuda()) return is_left_to_autocast_on_cpu(shape, input);
  const auto x_bytes = static_cast<int64_t>(c10::elementSize(input));
  constexpr int64_t kParamBytes = sizeof(float);
  const cuda::Plan plan = whole_step
                              ? cuda::choose_plan(shape, x_bytes, kParamBytes)
                              : cuda::choose_gradient_plan(shape, x_bytes, kParamBytes, false);
  return plan == cuda::Plan::kGemm;
}

at::Tensor sgd_cuda(const SgdCudaStep& step, SgdCudaMemory& memory) {
  if (memory == nullptr) memory = std::make_shared<SgdCuda>();
  return memory->step(step);
}

LinearMseResult linear_mse(const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, const at::Tensor& target,
                           std::string_view reduction, bool need_dinput, bool need_dweight,
                           bool need_dbias, bool need_dy) {
  if (weight.is_cuda()) {
    return linear_mse_cuda(input, weight, bias, target, reduction, need_dinput, need_dweight,
                           need_dbias, need_dy);
  }
  return linear_mse_cpu(input, weight, bias, target, reduction, need_dinput, need_dweight,
                        need_dbias, need_dy);
}

const char* plan_name(const LinearSgdState& state, const at::Tensor& input, int64_t B) {
  if (state.weight.is_cuda()) return cuda_plan_name(state, input.scalar_type(), B);
  return cpu_plan_name(plan_for(state, B));
}

std::string why_no_deeper(const LinearSgdState& state, const at::Tensor& input, int64_t B) {
  if (state.weight.is_cuda()) return why_no_deeper_on_cuda(state, input.scalar_type(), B);
  return why_no_deeper_on_cpu(plan_for(state, B), state.weight.size(0));
}

at::Tensor linear_mse_sgd(const LinearSgdState& state, const at::Tensor& input,
                          const at::Tensor& target, EngineMemory& memory) {
  if (state.weight.is_cuda()) return linear_mse_sgd_cuda(state, input, target, memory.cuda);
  return linear_mse_sgd_cpu(state, input, target, memory.cpu);
}

at::Tensor run_linear_mse_sgd(const LinearSgdState& state, const at::Tensor& inputs,
                              const at::Tensor& targets, const RunOptions& options,
                              EngineMemory& memory, RunWatch& watch) {
  if (state.weight.is_cuda()) {
    return run_linear_mse_sgd_cuda(state, inputs, targets, options, memory.cuda, watch);
  }
  return run_linear_mse_sgd_cpu(state, inputs, targets, options, memory.cpu, watch);
}

#else

bool is_served(c10::Device device) { return device.is_cpu(); }

void prepare_thread(c10::Device /*device*/) {}

bool is_captured(c10::Device /*device*/) { return false; }

bool is_left_to_autocast(c10::Device /*device*/, const LinearShape& shape, at::ScalarType input,
                         bool /*whole_step*/) {
  return is_left_to_autocast_on_cpu(shape, input);
}

at::Tensor sgd_cuda(const SgdCudaStep& /*step*/, SgdCudaMemory& /*memory*/) {
  TORCH_INTERNAL_ASSERT(false, "is_served() allows no CUDA tensor in this build");
}

LinearMseResult linear_mse(const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, const at::Tensor& target,
                           std::string_view reduction, bool need_dinput, bool need_dweight,
                           bool need_dbias, bool need_dy) {
  return linear_mse_cpu(input, weight, bias, target, reduction, need_dinput, need_dweight,
                        need_dbias, need_dy);
}

const char* plan_name(const LinearSgdState& state, const at::Tensor& /*input*/, int64_t B) {
  return cpu_plan_name(plan_for(state, B));
}

std::string why_no_deeper(const LinearSgdState& state, const at::Tensor& /*input*/, int64_t B) {
  return why_no_deeper_on_cpu(plan_for(state, B), state.weight.size(0));
}

at::Tensor linear_mse_sgd(const LinearSgdState& state, const at::Tensor& input,
                          const at::Tensor& target, EngineMemory& memory) {
  return linear_mse_sgd_cpu(state, input, target, memory.cpu);
}

at::Tensor run_linear_mse_sgd(const LinearSgdState& state, const at::Tensor& inputs,
                              const at::Tensor& targets, const RunOptions& options,
                              EngineMemory& memory, RunWatch& watch) {
  return run_linear_mse_sgd_cpu(state, inputs, targets, options, memory.cpu, watch);
}

#endif

}  // namespace fused_step
