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

// Reads and writes `count` elements from k on, at most kV: all reads come before the first write,
// which they may not overtake. Without history the buffer is not read.
template <typename P, int kV>
__device__ __forceinline__ void update_elements(const Updated<P>& p,
                                                const SgdCoefficients<Accum<P>>& c, int64_t k,
                                                int count, const Accum<P> (&grad)[kV]) {
  using A = Accum<P>;
  A value[kV], buf[kV];
#pragma unroll
  for (int j = 0; j < kV; ++j) {
    if (j >= count) continue;
    value[j] = widen(p.value[k + j]);
    buf[j] = c.has_momentum && !c.first_step ? widen(p.momentum_buf[k + j]) : A(0);
  }
#pragma unroll
  for (int j = 0; j < kV; ++j) {
    if (j >= count) continue;
    p.value[k + j] = narrow<P>(sgd_update(value[j], grad[j], buf[j], c));
    if (c.has_momentum) p.momentum_buf[k + j] = narrow<P>(buf[j]);
  }
}
template <typename P>
__device__ __forceinline__ void update_element(const Updated<P>& p,
                                               const SgdCoefficients<Accum<P>>& c, int64_t k,
                                               Accum<P> grad) {
  const Accum<P> grads[1] = {grad};
  update_elements<P, 1>(p, c, k, 1, grads);
}

}  // namespace fused_step::cuda
