// SPDX-License-Identifier: MIT
// The gemm plan with torch's own GEMMs of bfloat16, where the processor multiplies bfloat16, and
// which layers take it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <type_traits>

#include "bindings/linear_mse_widened.h"

namespace fused_step {

// The plan for a layer whose parameters are of this dtype; under bfloat16, so is x.
cpu::Plan choose_cpu_plan(const LinearShape& shape, at::ScalarType dtype);

// Whether the processor has instructions for GEMMs of bfloat16, and torch may use oneDNN.
bool has_bfloat16_gemm();

// Whether those are the faster ones: there is enough to multiply.
bool gemm_is_in_bfloat16(const LinearShape& shape);

// Whether to leave a layer of float parameters to torch's own operators under autocast: it casts to
// bfloat16 here, and GEMMs of bfloat16 are the faster ones though it has to round for them.
bool is_left_to_autocast_on_cpu(const LinearShape& shape, at::ScalarType input);

// From now on they always are, or never, or as above; for tests.
void use_bfloat16_gemm(std::optional<bool> always);

// widened_gemm() with x, W, y and dL/dy in bfloat16, as the plain loop has them, and each product
// rounded once; the bias, residuals and all sums of rows in float.
void bfloat16_gemm(const WidenedBatch<BFloat16, BFloat16>& b,
                   const at::Tensor& dweight,  // [O, I] float, undefined if nobody needs it
                   double* dbias,              // [O]
                   double* loss, Workspace& workspace);

// By the faster of the two.
template <typename X, typename P>
void gemm_16_bit(const WidenedBatch<X, P>& b, const at::Tensor& dweight, double* dbias,
                 double* loss, Workspace& workspace) {
  if constexpr (std::is_same_v<X, BFloat16> && std::is_same_v<P, BFloat16>) {
    if (gemm_is_in_bfloat16(b.shape)) return bfloat16_gemm(b, dweight, dbias, loss, workspace);
  }
  widened_gemm(b, dweight, dbias, loss, workspace);
}

}  // namespace fused_step
