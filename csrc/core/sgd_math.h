// SPDX-License-Identifier: MIT
// The update rule of torch.optim.SGD, for one element or one SIMD vector of elements.
//   g   = +-grad + weight_decay * p
//   buf = g on the first step, else momentum * buf + (1 - dampening) * g
//   p  -= lr * (nesterov ? g + momentum * buf : buf)
// V is Accum or a SIMD vector of Accum. It rounds where torch's for-loop does: each sum of a tensor
// and a multiple of another is one multiply-add (where the processor has it), momentum * buf is
// rounded before; so float and double parameters keep torch's bits.
#pragma once

#include "core/inline.h"
#include "core/params.h"
#include "core/rounding.h"

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

// What a GradScaler's scale is undone by. GradScaler.unscale_ divides in double and rounds to
// float; of a float the quotient in float has the same bits.
template <typename Scale>
FUSED_STEP_INLINE float sgd_unscale(Scale scale) {
  return static_cast<float>(Scale(1) / scale);
}

// What gradients of a 2-norm `norm` are multiplied by, as clip_grad_norm_ does; NaN stays NaN.
FUSED_STEP_INLINE double sgd_clip(double max_norm, double norm) {
  const double factor = max_norm / (norm + 1e-6);
  return factor > 1.0 ? 1.0 : factor;
}

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
  V g = product(grad, c.grad_sign);
  if (c.has_decay) g = g + p * c.weight_decay;
  if (c.has_momentum) {
    buf = c.first_step ? g : product(buf, c.momentum) + g * c.buf_gain;
    g = c.nesterov ? g + buf * c.momentum : buf;
  }
  return p - g * c.lr;
}

}  // namespace fused_step
