// SPDX-License-Identifier: MIT
// The bias' share of an update: scalar, since O is small beside O * I.
#pragma once

#include <cstdint>

#include "core/float16.h"
#include "core/sgd_math.h"
#include "cpu/kernels.h"

namespace fused_step::cpu {

// Adds `chunks` partial sums of dL/dy, in order, and updates the bias if there is one.
template <typename T>
FUSED_STEP_INLINE void update_bias(const double* dbias,  // [chunks, stride], the first O are read
                                   int64_t chunks, int64_t stride, const LinearParams<T>& params) {
  if (params.bias == nullptr) return;
  using A = Accum<T>;
  const SgdCoefficients<A> c = sgd_coefficients<A>(params.bias_options);
  for (int64_t o = 0; o < params.O; ++o) {
    double grad = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) grad += dbias[chunk * stride + o];
    // NOLINTBEGIN(clang-analyzer-core.*): momentum has its buffer; doubles are not compared.
    A buf = c.has_momentum && !c.first_step ? widen(params.bias_buf[o]) : A(0);
    const A bias = sgd_update(widen(params.bias[o]), static_cast<A>(grad), buf, c);
    params.bias[o] = narrow<T>(bias);
    if (c.has_momentum) params.bias_buf[o] = narrow<T>(buf);
    // NOLINTEND(clang-analyzer-core.*)
  }
}

}  // namespace fused_step::cpu
