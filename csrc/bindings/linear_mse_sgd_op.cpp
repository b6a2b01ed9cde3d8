// SPDX-License-Identifier: MIT
// Checks, then the engine of the weight's device.
#include "bindings/linear_mse_sgd_op.h"

#include <array>
#include <string_view>
#include <utility>

#include "bindings/checks.h"
#include "bindings/dtypes.h"
#include "bindings/engines.h"
#include "bindings/linear_mse_sgd.h"
#include "bindings/memory.h"

namespace fused_step {
namespace {

constexpr const char* kOp = "fused_step::linear_mse_sgd_";

Reduction parse_reduction(std::string_view reduction) {
  TORCH_CHECK_VALUE(reduction == "mean" || reduction == "sum", kOp,
                    ": reduction must be 'mean' or 'sum', got '", reduction, "'");
  return reduction == "mean" ? Reduction::kMean : Reduction::kSum;
}

// A parameter or buffer beside weight: present or not, and like its model.
void check_like(const char* name, const std::optional<at::Tensor>& t, at::IntArrayRef shape,
                const at::Tensor& weight) {
  if (!t.has_value()) return;
  check_device(kOp, name, *t, weight.device());
  check_dtype(kOp, name, *t, weight.scalar_type());
  check_shape(kOp, name, *t, "the shape", shape);
  check_written(kOp, name, *t);
  check_memory(kOp, name, *t);
}

void check_batch(const at::Tensor& weight, const at::Tensor& input, const at::Tensor& target) {
  const int64_t O = weight.size(0), I = weight.size(1);
  check_given(kOp, "input", input);
  check_given(kOp, "target", target);
  check_device(kOp, "input", input, weight.device());
  check_device(kOp, "target", target, weight.device());
  if (!is_fused_pair(input.scalar_type(), weight.scalar_type())) {
    check_dtype(kOp, "input", input, weight.scalar_type());
  }
  check_dtype(kOp, "target", target, weight.scalar_type());
  TORCH_CHECK_VALUE(input.dim() >= 1 && input.size(-1) == I, kOp,
                    ": input must have the shape [*, ", I, "] for weight ", weight.sizes(),
                    ", got ", input.sizes());
  auto expected = input.sizes().vec();
  expected.back() = O;
  check_shape(kOp, "target", target, "the shape of the output", expected);
  check_memory(kOp, "input", input);
  check_memory(kOp, "target", target);
}

void check_disjoint(const LinearSgdState& s, const at::Tensor& input, const at::Tensor& target) {
  const std::array<std::pair<const char*, const at::Tensor*>, 4> written = {
      {{"weight", &s.weight},
       {"bias", &s.bias},
       {"weight_momentum_buffer", &s.weight_buf},
       {"bias_momentum_buffer", &s.bias_buf}}};
  for (size_t k = 0; k < written.size(); ++k) {
    const auto& [name, tensor] = written[k];
    if (!tensor->defined()) continue;
    const Extent extent = extent_of(*tensor);
    TORCH_CHECK_VALUE(!extent.overlaps(extent_of(input)), kOp,
                      ": input must not share memory with ", name, ", which is written");
    TORCH_CHECK_VALUE(!extent.overlaps(extent_of(target)), kOp,
                      ": target must not share memory with ", name, ", which is written");
    for (size_t j = 0; j < k; ++j) {
      const auto& [other_name, other] = written[j];
      TORCH_CHECK_VALUE(!other->defined() || !extent.overlaps(extent_of(*other)), kOp, ": ", name,
                        " must not share memory with ", other_name, ", both are written");
    }
  }
}

}  // namespace

at::Tensor linear_mse_sgd_op(at::Tensor& weight, const std::optional<at::Tensor>& bias,
                             const std::optional<at::Tensor>& weight_momentum_buffer,
                             const std::optional<at::Tensor>& bias_momentum_buffer,
                             const at::Tensor& input, const at::Tensor& target, double lr,
                             double momentum, double dampening, double weight_decay, bool nesterov,
                             bool maximize, std::string_view reduction, bool first_step) {
  check_given(kOp, "weight", weight);
  const at::ScalarType dtype = weight.scalar_type();
  TORCH_CHECK_TYPE(is_fused_dtype(dtype), kOp, ": weight must be ", kFusedDtypes, ", got ", dtype);
  TORCH_CHECK_VALUE(weight.dim() == 2, kOp, ": weight must have the shape [O, I], got ",
                    weight.sizes());
  check_written(kOp, "weight", weight);
  TORCH_CHECK_NOT_IMPLEMENTED(is_served(weight.device()), kOp, ": this build has no kernels for ",
                              weight.device());
  check_memory(kOp, "weight", weight);
  check_like("bias", bias, {weight.size(0)}, weight);
  check_like("weight_momentum_buffer", weight_momentum_buffer, weight.sizes(), weight);
  check_like("bias_momentum_buffer", bias_momentum_buffer, {weight.size(0)}, weight);
  check_batch(weight, input, target);
  TORCH_CHECK_VALUE(momentum == 0.0 || weight_momentum_buffer.has_value(), kOp, ": momentum ",
                    momentum, " needs a weight_momentum_buffer ", weight.sizes(), ", got None");
  TORCH_CHECK_VALUE(momentum == 0.0 || !bias.has_value() || bias_momentum_buffer.has_value(), kOp,
                    ": momentum ", momentum, " needs a bias_momentum_buffer [", weight.size(0),
                    "], got None");

  const SgdOptions options{lr, momentum, dampening, weight_decay, nesterov, maximize, first_step};
  const bool has_momentum = momentum != 0.0;
  const LinearSgdState state{
      weight,
      bias.value_or(at::Tensor()),
      has_momentum ? weight_momentum_buffer.value_or(at::Tensor()) : at::Tensor(),
      has_momentum ? bias_momentum_buffer.value_or(at::Tensor()) : at::Tensor(),
      options,
      options,
      parse_reduction(reduction)};
  check_disjoint(state, input, target);
  EngineMemory memory;
  return linear_mse_sgd(state, input, target, memory);
}

}  // namespace fused_step
