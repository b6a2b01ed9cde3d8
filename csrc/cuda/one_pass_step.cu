// SPDX-License-Identifier: MIT
// One-pass that ends in the update.
#include "core/mse_math.h"
#include "cuda/one_pass.h"
#include "cuda/pairs.h"

namespace fused_step::cuda {

template <typename X, typename P>
cudaError_t launch_one_pass_step(const OnePassStep<X, P>& s, cudaStream_t stream) {
  OnePassArgs<X, P> a{};
  a.batch = s.batch;
  a.shape = s.shape;
  a.weight = s.weight.value;
  a.bias = s.bias.value;
  a.dy_scale = static_cast<Accum<P>>(mse_dy_scale(s.reduction, s.shape.B, s.shape.O));
  a.loss_scale = mse_loss_scale(s.reduction, s.shape.B, s.shape.O);
  a.weight_update = updated(s.weight);
  a.bias_update = updated(s.bias);
  a.loss = s.loss;
  a.scratch = s.scratch;
  return launch_one_pass(a, stream);
}

#define FUSED_STEP_INSTANTIATE(X, P) \
  template cudaError_t launch_one_pass_step<X, P>(const OnePassStep<X, P>&, cudaStream_t);
FUSED_STEP_FOR_EACH_PAIR(FUSED_STEP_INSTANTIATE)

}  // namespace fused_step::cuda
