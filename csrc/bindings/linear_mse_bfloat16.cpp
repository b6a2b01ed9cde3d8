// SPDX-License-Identifier: MIT
#include "bindings/linear_mse_bfloat16.h"

#include <ATen/Context.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <atomic>

#include "bindings/autocast.h"

namespace fused_step {

namespace {

enum class When : int8_t { kIfFaster, kAlways, kNever };

std::atomic<When>& when() {
  static std::atomic<When> value{When::kIfFaster};
  return value;
}

at::Tensor matrix(const BFloat16* data, int64_t rows, int64_t columns, int64_t stride) {
  return at::from_blob(const_cast<BFloat16*>(data), {rows, columns}, {stride, 1}, at::kBFloat16);
}

}  // namespace

bool has_bfloat16_gemm() {
  return cpu::multiplies_bfloat16() && at::hasMKLDNN() && at::globalContext().userEnabledMkldnn();
}

bool gemm_is_in_bfloat16(const LinearShape& shape) {
  switch (when().load(std::memory_order_relaxed)) {
    case When::kAlways:
      return true;
    case When::kNever:
      return false;
    case When::kIfFaster:
      break;
  }
  return has_bfloat16_gemm() && shape.B * shape.I * shape.O >= cpu::kMinBFloat16Work;
}

cpu::Plan choose_cpu_plan(const LinearShape& shape, at::ScalarType dtype) {
  const bool is_large =
      shape.O >= cpu::kMinBFloat16Outputs && shape.I * shape.O >= cpu::kMinBFloat16Weights;
  if (dtype == at::kBFloat16 && is_large && gemm_is_in_bfloat16(shape)) return cpu::Plan::kGemm;
  return cpu::choose_plan(shape, static_cast<int64_t>(at::elementSize(accum_dtype(dtype))));
}

bool is_left_to_autocast_on_cpu(const LinearShape& shape, at::ScalarType input) {
  const int64_t outputs =
      input == at::kFloat ? cpu::kMinAutocastOutputsOfFloat : cpu::kMinAutocastOutputs;
  return shape.O >= outputs && shape.B * shape.I * shape.O >= cpu::kMinAutocastWork &&
         at::autocast::get_autocast_dtype(at::kCPU) == at::kBFloat16 && gemm_is_in_bfloat16(shape);
}

void use_bfloat16_gemm(std::optional<bool> always) {
  when() = !always.has_value() ? When::kIfFaster : *always ? When::kAlways : When::kNever;
}

void bfloat16_gemm(const WidenedBatch<BFloat16, BFloat16>& b, const at::Tensor& dweight,
                   double* dbias, double* loss, Workspace& workspace) {
  const auto [B, I, O] = b.shape;
  const int64_t most_rows = std::min(std::max<int64_t>(B, 1), cpu::widened_panel_rows(b.shape));
  const RowChunks most = cut_rows(most_rows, cpu::residual_chunks(most_rows, O));
  Arrays arrays;
  const int64_t bias_at = arrays.add<float>(O);
  const int64_t residual_at = arrays.add<float>(most_rows * O);
  const int64_t y_at = arrays.add<BFloat16>(b.dy == nullptr ? most_rows * O : 0);
  const int64_t sums_at = arrays.add<double>(most.count * sums_stride(O));
  arrays.reserve(workspace);
  const at::Tensor weight = matrix(b.weight, O, I, I);
  const float* const bias = in_float(b.bias, O, arrays.at<float>(bias_at));
  float* const residual = arrays.at<float>(residual_at);
  double* const sums = arrays.at<double>(sums_at);

  *loss = 0.0;
  std::fill(dbias, dbias + O, 0.0);
  int64_t row = 0;
  do {  // once for an empty batch, whose dW is zero
    const int64_t n = std::min(most_rows, B - row);
    const at::Tensor x = matrix(b.x + row * b.x_stride, n, I, b.x_stride);
    // y first, then dL/dy.
    BFloat16* const rounded = b.dy != nullptr ? b.dy + row * O : arrays.at<BFloat16>(y_at);
    at::Tensor y = matrix(rounded, n, O, O);
    at::mm_out(y, x, weight.t());
    widen_rows(rounded, O, n, O, residual);
    add_panel_sums(b, row, n, residual, bias, sums, dbias, loss);
    store_rounded(residual, rounded, n * O);
    if (dweight.defined()) {
      const at::Tensor product = at::mm(y.t(), x);
      row == 0 ? dweight.copy_(product) : dweight.add_(product);
    }
    if (b.dx != nullptr) {
      at::Tensor dx = matrix(b.dx + row * I, n, I, I);
      at::mm_out(dx, y, weight);
    }
    row += n;
  } while (row < B);
}

}  // namespace fused_step
