// SPDX-License-Identifier: MIT
// One call of linear_mse, on any device: its checks, its rows, and the memory of its results.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/square.h>

#include <optional>
#include <string_view>

#include "bindings/dtypes.h"
#include "bindings/linear_mse.h"
#include "bindings/linear_mse_passes.h"
#include "core/mse_math.h"

namespace fused_step {

// Rows, and the results that rows are turned into; undefined what is not needed.
struct LinearMseBatch {
  at::Tensor x;       // [B, I], a row's elements adjacent
  at::Tensor weight;  // [O, I] contiguous
  at::Tensor bias;    // [O] contiguous
  at::Tensor target;  // [B, O], a row's elements adjacent
  at::Tensor loss;    // []; not needed where dy alone is the result
  // Contiguous; dtypes as LinearMseResult has them.
  at::Tensor dx;       // [B, I]
  at::Tensor dweight;  // [O, I]
  at::Tensor dbias;    // [O]
  at::Tensor dy;       // [B, O]
  Reduction reduction = Reduction::kMean;
  double dy_scale = 1.0;  // infinite for an empty batch, of which there is nothing to multiply

  int64_t B() const { return x.size(0); }
  int64_t I() const { return weight.size(1); }
  int64_t O() const { return weight.size(0); }
  LinearShape shape() const { return {B(), I(), O()}; }
};

// compute(batch) fills what is defined of loss, dx, dweight, dbias and dy.
template <typename Compute>
LinearMseResult evaluate_linear_mse(const at::Tensor& input, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias, const at::Tensor& target,
                                    std::string_view reduction, bool need_dinput, bool need_dweight,
                                    bool need_dbias, bool need_dy, const Compute& compute) {
  check_reduction(reduction);
  check_linear_mse(input, weight, bias, target);
  check_linear_mse_memory(input, weight, bias, target);
  const BelowDispatcher below;
  const int64_t O = weight.size(0), I = weight.size(1);
  const bool none = reduction == "none";
  const at::TensorOptions options = weight.options(),
                          of_x = options.dtype(unscaled_dtype(input.scalar_type())),
                          of_dy = options.dtype(unscaled_dtype(target.scalar_type())),
                          of_sums = options.dtype(accum_dtype(weight.scalar_type()));
  LinearMseBatch b;
  b.x = as_rows(input, I);
  b.weight = weight.contiguous();
  if (bias.has_value()) b.bias = bias->contiguous();
  b.target = as_rows(target, O);
  b.reduction = reduction == "mean" ? Reduction::kMean : Reduction::kSum;
  b.dy_scale = mse_dy_scale(b.reduction, b.B(), O);
  b.loss = at::empty({}, options);
  if (need_dinput && !none) b.dx = at::empty({b.B(), I}, of_x);
  if (need_dweight && !none) b.dweight = at::empty({O, I}, of_sums);
  if (need_dbias && !none) b.dbias = at::empty({O}, of_sums);
  if (need_dy || none) b.dy = at::empty({b.B(), O}, of_dy);
  compute(b);

  const auto result = [](const at::Tensor& t, at::IntArrayRef sizes,
                         const at::TensorOptions& like) {
    return t.defined() ? at::_unsafe_view(t, sizes) : at::empty({0}, like);
  };
  if (none) {
    const at::Tensor squares = b.dy.mul(0.5).square_();
    b.loss = at::_unsafe_view(squares.to(weight.scalar_type()), target.sizes());
  }
  if (!need_dy) b.dy = at::Tensor();
  return {b.loss, result(b.dx, input.sizes(), of_x), result(b.dweight, weight.sizes(), of_sums),
          result(b.dbias, {O}, of_sums), result(b.dy, target.sizes(), of_dy)};
}

}  // namespace fused_step
