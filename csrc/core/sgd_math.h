// SPDX-License-Identifier: MIT
// The update rule of torch.optim.SGD, for one element or one SIMD vector of elements.
//   g   = +-grad + weight_decay * p
//   buf = g on the first step, else momentum * buf + (1 - dampening) * g
//   p  -= lr * (nesterov ? g + momentum * buf : buf)
// V is Accum or a SIMD vector of Accum.
#pragma once

#include "core/inline.h"
#include "core/params.h"

namespace fused_step {

// SgdOptions in the accumulator type, made once per launch.
template <typename Accum>
struct SgdCoefficients {
  Accum lr;
  Accum momentum;
  Accum buf_gain;  // 1 - dampening, the gain of g in buf
  Accum weight_decay;
  Accum grad_sign;  // -1 under maximize
  bool has_momentum;
  bool has_decay;
  bool nesterov;
  bool first_step;
};

template <typename Accum>
FUSED_STEP_INLINE SgdCoefficients<Accum> sgd_coefficients(const SgdOptions& options) {
  return {static_cast<Accum>(options.lr),
          static_cast<Accum>(options.momentum),
          static_cast<Accum>(1.0 - options.dampening),
          static_cast<Accum>(options.weight_decay),
          static_cast<Accum>(options.maximize ? -1.0 : 1.0),
          options.momentum != 0.0,
          options.weight_decay != 0.0,
          options.nesterov,
          options.first_step};
}

// Returns the new parameter. `buf` is read and written only with momentum; on the first step it
// is set, not averaged. A zero weight decay or momentum is skipped rather than multiplied: 0 * inf
// would be NaN where torch leaves a number.
template <typename V, typename Accum>
FUSED_STEP_INLINE V sgd_update(const V& p, const V& grad, V& buf, const SgdCoefficients<Accum>& c) {
  V g = grad * c.grad_sign;
  if (c.has_decay) g = g + p * c.weight_decay;
  if (c.has_momentum) {
    buf = c.first_step ? g : buf * c.momentum + g * c.buf_gain;
    g = c.nesterov ? g + buf * c.momentum : buf;
  }
  return p - g * c.lr;
}

// The same update with the gradient added by a GEMM, so that it is never stored. Three ways:
//   kIntoWeight    p <- beta * p + alpha * dy^T x
//   kIntoMomentum  momentum_before_gemm; buf <- beta * buf + alpha * dy^T x; momentum_after_gemm
//   kStoredGrad    dy^T x into a workspace, then sgd_update
enum class GemmUpdate : int8_t { kIntoWeight, kIntoMomentum, kStoredGrad };

struct GemmUpdatePlan {
  GemmUpdate kind;
  double alpha;
  double beta;
};

// Below this lr * weight_decay the rounding of 1 - lr * weight_decay to fp32 (half an ulp is
// 2^-25) distorts the decay by more than 2^-13 of itself; at 5e-8 it was 1.73 times too strong.
constexpr double kMinFoldedDecay = 1.0 / 4096;

FUSED_STEP_INLINE GemmUpdatePlan gemm_update_plan(const SgdOptions& o, bool accum_is_double) {
  const double sign = o.maximize ? -1.0 : 1.0;
  const GemmUpdatePlan stored = {GemmUpdate::kStoredGrad, 1.0, 0.0};
  if (o.momentum != 0.0) {
    const double gain = o.first_step ? 1.0 : 1.0 - o.dampening;
    // BLAS skips the product when alpha is 0, and with it the gradient's NaN. With nesterov the
    // rewriting of g as buf - momentum * buf_old holds only without dampening.
    if (gain == 0.0 || (o.nesterov && o.dampening != 0.0 && !o.first_step)) return stored;
    const bool buf_starts_empty = o.first_step && o.weight_decay == 0.0;
    return {GemmUpdate::kIntoMomentum, sign * gain, buf_starts_empty ? 0.0 : 1.0};
  }
  if (o.lr == 0.0) return stored;
  const double decay = o.lr * o.weight_decay;
  const bool folds = decay == 0.0 || accum_is_double || decay >= kMinFoldedDecay;
  if (!folds) return stored;
  return {GemmUpdate::kIntoWeight, -o.lr * sign, 1.0 - decay};
}

// Before the GEMM of kIntoMomentum: buf takes all of its new value but the gradient, and under
// nesterov p the share of the old buf. Reads p before writing it.
template <typename V, typename Accum>
FUSED_STEP_INLINE void momentum_before_gemm(V& p, V& buf, const SgdCoefficients<Accum>& c) {
  if (c.first_step) {
    if (c.has_decay) buf = p * c.weight_decay;
    return;
  }
  const V old_buf = buf;
  buf = old_buf * c.momentum;
  if (c.has_decay) buf = buf + p * (c.buf_gain * c.weight_decay);
  if (c.nesterov) p = p + old_buf * (c.lr * c.momentum);
}

// After the GEMM of kIntoMomentum: p takes the new buf.
template <typename V, typename Accum>
FUSED_STEP_INLINE V momentum_after_gemm(const V& p, const V& buf, const SgdCoefficients<Accum>& c) {
  return p - buf * (c.nesterov ? c.lr * (Accum(1) + c.momentum) : c.lr);
}

}  // namespace fused_step
