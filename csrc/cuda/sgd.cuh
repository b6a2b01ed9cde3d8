// SPDX-License-Identifier: MIT
// The update rule on one element in memory.
#pragma once

#include "core/sgd_math.h"
#include "cuda/device.h"
#include "cuda/launch.h"

namespace fused_step::cuda {

// A Param as kernels take it: its options in the accumulator's type.
template <typename P>
struct Updated {
  P* value;         // [O, I] or [O]
  P* momentum_buf;  // same shape; null without momentum
  SgdCoefficients<Accum<P>> coefficients;
  const float* lr;  // [] or null
};

template <typename P>
Updated<P> updated(const Param<P>& p) {
  return {p.value, p.momentum_buf, sgd_coefficients<Accum<P>>(p.options), p.lr};
}

// Once per launch and thread.
template <typename P>
__device__ __forceinline__ SgdCoefficients<Accum<P>> coefficients_of(const Updated<P>& p) {
  SgdCoefficients<Accum<P>> c = p.coefficients;
  if (p.lr != nullptr) c.lr = static_cast<Accum<P>>(*p.lr);
  return c;
}

// Reads and writes element k. Without history the buffer is not read.
template <typename P>
__device__ __forceinline__ void update_element(const Updated<P>& p,
                                               const SgdCoefficients<Accum<P>>& c, int64_t k,
                                               Accum<P> grad) {
  using A = Accum<P>;
  A buf = c.has_momentum && !c.first_step ? widen(p.momentum_buf[k]) : A(0);
  p.value[k] = narrow<P>(sgd_update(widen(p.value[k]), grad, buf, c));
  if (c.has_momentum) p.momentum_buf[k] = narrow<P>(buf);
}

}  // namespace fused_step::cuda
