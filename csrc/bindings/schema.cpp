// SPDX-License-Identifier: MIT
// The ops as the dispatcher knows them: schemas, what holds on every device, and the CPU's; those
// of CUDA are in ops_cuda.cpp, where the build has it.
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "bindings/linear_mse.h"
#include "bindings/linear_mse_sgd_op.h"
#include "bindings/schema.h"

namespace fused_step {
namespace {

// Under fake tensors and on meta: the shape of the result and nothing else.
at::Tensor linear_mse_sgd_meta(at::Tensor& weight, const std::optional<at::Tensor>& /*bias*/,
                               const std::optional<at::Tensor>& /*weight_momentum_buffer*/,
                               const std::optional<at::Tensor>& /*bias_momentum_buffer*/,
                               const at::Tensor& /*input*/, const at::Tensor& /*target*/,
                               double /*lr*/, double /*momentum*/, double /*dampening*/,
                               double /*weight_decay*/, bool /*nesterov*/, bool /*maximize*/,
                               std::string_view /*reduction*/, bool /*first_step*/) {
  return at::empty({}, weight.options().requires_grad(false));
}

LinearMseResult linear_mse_meta(const at::Tensor& input, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias, const at::Tensor& target,
                                std::string_view reduction, bool need_dinput, bool need_dweight,
                                bool need_dbias, bool need_dy) {
  check_reduction(reduction);
  check_linear_mse(input, weight, bias, target);
  const bool none = reduction == "none";
  const at::TensorOptions options = weight.options().requires_grad(false);
  const at::TensorOptions sums = options.dtype(accum_dtype(weight.scalar_type()));
  const auto make = [](bool needed, c10::SymIntArrayRef sizes, const at::TensorOptions& like) {
    return needed ? at::empty_symint(sizes, like) : at::empty({0}, like);
  };
  return {none ? at::empty_symint(target.sym_sizes(), options) : at::empty({}, options),
          make(need_dinput && !none, input.sym_sizes(),
               options.dtype(unscaled_dtype(input.scalar_type()))),
          make(need_dweight && !none, weight.sym_sizes(), sums),
          make(need_dbias && !none, weight.sym_sizes().slice(0, 1), sums),
          make(need_dy, target.sym_sizes(), options.dtype(unscaled_dtype(target.scalar_type())))};
}

}  // namespace
}  // namespace fused_step

TORCH_LIBRARY(fused_step, m) {
  m.def(fused_step::kLinearMseSgdSchema, {at::Tag::pt2_compliant_tag});
  m.def(fused_step::kLinearMseLossSchema, {at::Tag::pt2_compliant_tag});
  m.def(fused_step::kLinearMseSchema, {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fused_step, Meta, m) {
  m.impl("linear_mse_sgd_", &fused_step::linear_mse_sgd_meta);
  m.impl("linear_mse", &fused_step::linear_mse_meta);
}

TORCH_LIBRARY_IMPL(fused_step, CPU, m) {
  m.impl("linear_mse_sgd_", &fused_step::linear_mse_sgd_op);
  m.impl("linear_mse", &fused_step::linear_mse_cpu);
}

// The step has no derivative: a parameter that requires grad is an error outside no_grad, and a
// gradient that would flow through it says that it is not implemented.
TORCH_LIBRARY_IMPL(fused_step, Autograd, m) {
  m.impl("linear_mse_sgd_", torch::autograd::autogradNotImplementedFallback());
}
