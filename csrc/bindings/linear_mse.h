// SPDX-License-Identifier: MIT
// The differentiable loss of a linear layer: its argument checks, common to every device, and how
// the op behind it is called.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "bindings/checks.h"
#include "bindings/dtypes.h"

namespace fused_step {

constexpr const char* kLinearMse = "fused_step::linear_mse";

// loss, then dinput, dweight, dbias and dy; [0] what was not asked for. With r = y - t the loss is
// s_l * sum r^2, dy = 2 * s_l * r, the gradients are dy W, dy^T x and the sum of dy's rows: all as
// they are where dL/dloss is 1. Under "none" the loss is r^2, dy = 2 * r, and there are no others.
// The loss has the dtype of linear_weight and target, dinput that of input, dy that of target; of
// 16-bit parameters dweight and dbias are float32, and so is whatever would be float16: rounded to
// it before a GradScaler's factor comes in, they would lose what it makes visible again.
using LinearMseResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using LinearMseSignature = LinearMseResult(const at::Tensor& input, const at::Tensor& linear_weight,
                                           const std::optional<at::Tensor>& linear_bias,
                                           const at::Tensor& target, std::string_view reduction,
                                           bool need_dinput, bool need_dweight, bool need_dbias,
                                           bool need_dy);

// Each engine's.
LinearMseSignature linear_mse_cpu;
LinearMseSignature linear_mse_cuda;  // builds with CUDA only

// The loss with its derivative: fused_step::linear_mse_loss where something may require grad.
at::Tensor linear_mse_loss_autograd(const at::Tensor& input, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias, const at::Tensor& target,
                                    std::string_view reduction);

inline void check_reduction(std::string_view reduction) {
  TORCH_CHECK_VALUE(reduction == "mean" || reduction == "sum" || reduction == "none", kLinearMse,
                    ": reduction must be 'mean', 'sum' or 'none', got '", reduction, "'");
}

// Sizes may be symbolic. Rank is checked before sizes.
inline void check_linear_mse(const at::Tensor& input, const at::Tensor& weight,
                             const std::optional<at::Tensor>& bias, const at::Tensor& target) {
  check_given(kLinearMse, "input", input);
  check_given(kLinearMse, "linear_weight", weight);
  check_given(kLinearMse, "target", target);
  const at::ScalarType dtype = weight.scalar_type();
  TORCH_CHECK_TYPE(is_fused_dtype(dtype), kLinearMse, ": linear_weight must be ", kFusedDtypes,
                   ", got ", dtype);
  const auto check_like_weight = [&](const char* name, const at::Tensor& t, bool has_dtype) {
    TORCH_CHECK_TYPE(has_dtype, kLinearMse, ": ", name, " must have the dtype of linear_weight ",
                     dtype, ", got ", t.scalar_type());
    TORCH_CHECK_VALUE(t.device() == weight.device(), kLinearMse, ": ", name,
                      " must be on the device of linear_weight ", weight.device(), ", got ",
                      t.device());
  };
  check_like_weight("input", input, is_fused_pair(input.scalar_type(), dtype));
  if (bias.has_value()) check_like_weight("linear_bias", *bias, bias->scalar_type() == dtype);
  check_like_weight("target", target, target.scalar_type() == dtype);
  TORCH_CHECK_VALUE(weight.dim() == 2, kLinearMse,
                    ": linear_weight must have the shape [O, I], got ", weight.sym_sizes());
  const c10::SymInt &O = weight.sym_size(0), &I = weight.sym_size(1);
  TORCH_CHECK_VALUE(!bias.has_value() || (bias->dim() == 1 && bias->sym_size(0) == O), kLinearMse,
                    ": linear_bias must have the shape [", O, "], got ", bias->sym_sizes());
  TORCH_CHECK_VALUE(input.dim() >= 1 && input.sym_size(-1) == I, kLinearMse,
                    ": input must have the shape [*, ", I, "] for linear_weight ",
                    weight.sym_sizes(), ", got ", input.sym_sizes());
  auto expected = input.sym_sizes().vec();
  expected.back() = O;
  TORCH_CHECK_VALUE(target.sym_sizes() == c10::SymIntArrayRef(expected), kLinearMse,
                    ": target must have the shape of the output ", c10::SymIntArrayRef(expected),
                    ", got ", target.sym_sizes());
}

// For an engine, which looks at elements.
inline void check_linear_mse_memory(const at::Tensor& input, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias,
                                    const at::Tensor& target) {
  check_memory(kLinearMse, "input", input);
  check_memory(kLinearMse, "linear_weight", weight);
  if (bias.has_value()) check_memory(kLinearMse, "linear_bias", *bias);
  check_memory(kLinearMse, "target", target);
}

}  // namespace fused_step
