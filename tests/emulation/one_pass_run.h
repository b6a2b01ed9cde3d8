// SPDX-License-Identifier: MIT
// A layer and what a one-pass step of it needs.
#pragma once

#include "problem.h"

namespace fused_step::test {

template <typename X, typename P>
struct StepRun {
  Layer<P> layer;
  Memory<P> loss;
  ScratchMemory scratch;

  StepRun(const Sizes& s, const SgdOptions& of_weight, const SgdOptions& of_bias)
      : layer(s, of_weight, of_bias),
        loss(1, 0, hash(s.seed, 40)),
        scratch(cuda::one_pass_workspace<X, P>({s.B, s.I, s.O}), hash(s.seed, 41)) {}

  cudaError_t step(const Data<X, P>& data, Reduction reduction) {
    return cuda::launch_one_pass_step<X, P>({data.rows(),
                                             {data.B, data.I, data.O},
                                             reduction,
                                             layer.weight_param(),
                                             layer.bias_param(),
                                             loss.data(),
                                             scratch.get()},
                                            nullptr);
  }
};

}  // namespace fused_step::test
