// SPDX-License-Identifier: MIT
// Mean squared error of a linear layer: loss = s_l * sum r^2 with r = y - t; dL/dy = 2 * s_l * r.
// V is an accumulator type or a SIMD vector of it.
#pragma once

#include "core/inline.h"
#include "core/params.h"

namespace fused_step {

// s_l. Infinite for an empty batch under `mean`, so that 0 * s_l is NaN as in PyTorch.
FUSED_STEP_INLINE double mse_loss_scale(Reduction reduction, int64_t B, int64_t O) {
  return reduction == Reduction::kMean ? 1.0 / static_cast<double>(B * O) : 1.0;
}

// dL/dy = dy_scale * r.
FUSED_STEP_INLINE double mse_dy_scale(Reduction reduction, int64_t B, int64_t O) {
  return 2.0 * mse_loss_scale(reduction, B, O);
}

template <typename V, typename Accum>
FUSED_STEP_INLINE V mse_residual(const V& product, const Accum& bias, const V& target) {
  return product + bias - target;
}

template <typename V>
FUSED_STEP_INLINE V mse_term(const V& residual) {
  return residual * residual;
}

template <typename V, typename Accum>
FUSED_STEP_INLINE V mse_dy(const V& residual, const Accum& dy_scale) {
  return residual * dy_scale;
}

}  // namespace fused_step
