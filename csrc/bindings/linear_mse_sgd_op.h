// SPDX-License-Identifier: MIT
// fused_step::linear_mse_sgd_, of the schema in schema.h, for every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace fused_step {

at::Tensor linear_mse_sgd_op(at::Tensor& weight, const std::optional<at::Tensor>& bias,
                             const std::optional<at::Tensor>& weight_momentum_buffer,
                             const std::optional<at::Tensor>& bias_momentum_buffer,
                             const at::Tensor& input, const at::Tensor& target, double lr,
                             double momentum, double dampening, double weight_decay, bool nesterov,
                             bool maximize, std::string_view reduction, bool first_step);

}  // namespace fused_step
