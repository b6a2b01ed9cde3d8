// SPDX-License-Identifier: MIT
// The update rule over a whole parameter.
#pragma once

#include "cuda/policy.h"
#include "cuda/sgd.cuh"
#include "cuda/vector.cuh"

namespace fused_step::cuda {

template <typename P>
struct SgdUpdateArgs {
  Updated<P> param;
  const Accum<P>* grad;  // [n]
  Accum<P> grad_scale;
  int64_t n;
};

// kV elements per access. Reads grad; reads and writes the parameter and its buffer.
template <typename P, int kV>
__global__ void __launch_bounds__(kElementwiseThreads, kElementwiseBlocks)
    sgd_update_kernel(const SgdUpdateArgs<P> a) {
  using A = Accum<P>;
  const SgdCoefficients<A> c = coefficients_of(a.param);
  const bool has_history = c.has_momentum && !c.first_step;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kElementwiseThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kElementwiseThreads * kV;
  int64_t k = thread * kV;
  for (; k + kV <= a.n; k += step) {
    A grad[kV];
    P value[kV], momentum_buf[kV] = {};
    load_all(a.grad + k, grad);
    load_all(a.param.value + k, value);
    if (has_history) load_all(a.param.momentum_buf + k, momentum_buf);
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      A buf = widen(momentum_buf[j]);
      value[j] = narrow<P>(sgd_update(widen(value[j]), grad[j] * a.grad_scale, buf, c));
      momentum_buf[j] = narrow<P>(buf);
    }
    store<P, kV>(a.param.value + k, value);
    if (c.has_momentum) store<P, kV>(a.param.momentum_buf + k, momentum_buf);
  }
  // What is left over is less than a vector, and of one thread alone.
  for (; k < a.n; ++k) update_element(a.param, c, k, a.grad[k] * a.grad_scale);
}

}  // namespace fused_step::cuda
