// SPDX-License-Identifier: MIT
// A layer and what a one-pass step of it needs.
#pragma once

#include <vector>

#include "problem.h"

namespace fused_step::test {

// The sums of all chunks in the launch that makes them, or in one of their own.
struct OnePassScratch : ScratchMemory {
  template <typename X, typename P>
  static OnePassScratch of(const Sizes& s) {
    OnePassScratch scratch(cuda::one_pass_workspace<X, P>({s.B, s.I, s.O}), hash(s.seed, 41));
    scratch.gives_tickets = hash(s.seed, 47) % 2 == 0;
    return scratch;
  }
  using ScratchMemory::ScratchMemory;
};

template <typename X, typename P>
struct StepRun {
  Layer<P> layer;
  Memory<P> loss;
  OnePassScratch scratch;

  StepRun(const Sizes& s, const SgdOptions& of_weight, const SgdOptions& of_bias)
      : layer(s, of_weight, of_bias),
        loss(1, 0, hash(s.seed, 40)),
        scratch(OnePassScratch::of<X, P>(s)) {}

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

// What the first run of some has left; each other must leave the same.
template <typename P>
struct FirstBits {
  std::vector<P> weight, bias, loss;

  template <typename X>
  void check_same(const StepRun<X, P>& run, const char* message) {
    if (weight.empty()) {
      weight = run.layer.weight.copy();
      bias = run.layer.bias.copy();
      loss = run.loss.copy();
    }
    check(run.layer.weight.equals(weight) && run.layer.bias.equals(bias) && run.loss.equals(loss),
          "%s", message);
  }
};

// dx = dy_scale r W, rounded once.
template <typename X, typename P>
void check_dx(const Memory<X>& dx, const Sizes& s, const Gradients<P>& want,
              const std::vector<Bound<P>>& weight, const Bound<P>& dy_scale) {
  for (int64_t b = 0; b < s.B; ++b) {
    for (int64_t i = 0; i < s.I; ++i) {
      Sum<Accum<P>> sum;
      for (int64_t o = 0; o < s.O; ++o) {
        sum.add(want.residual[static_cast<size_t>(b * s.O + o)] * dy_scale *
                weight[static_cast<size_t>(o * s.I + i)]);
      }
      const Bound<P> one = sum.total().rounded();
      check_close<Accum<P>>("dx", b * s.I + i, value(dx[b * s.I + i]),
                            {one.v, one.e + Rounding<X>::kRelative * (std::fabs(one.v) + one.e) +
                                        Rounding<X>::kAbsolute});
    }
  }
}

}  // namespace fused_step::test
