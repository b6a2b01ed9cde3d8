// SPDX-License-Identifier: MIT
// One-pass that ends in gradients.
#include "core/mse_math.h"
#include "cuda/one_pass.h"
#include "cuda/pairs.h"

namespace fused_step::cuda {

template <typename X, typename P>
cudaError_t launch_one_pass_grad(const OnePassGrad<X, P>& g, cudaStream_t stream) {
  OnePassArgs<X, P> a{};
  a.batch = g.batch;
  a.shape = g.shape;
  a.weight = g.weight;
  a.bias = g.bias;
  a.dy_scale = static_cast<Accum<P>>(g.dy_scale);
  a.loss_scale = mse_loss_scale(g.reduction, g.shape.B, g.shape.O);
  a.loss = g.loss;
  a.dx = g.dx;
  a.dweight = g.dweight;
  a.dbias = g.dbias;
  a.scratch = g.scratch;
  return launch_one_pass(a, stream);
}

#define FUSED_STEP_INSTANTIATE(X, P) \
  template cudaError_t launch_one_pass_grad<X, P>(const OnePassGrad<X, P>&, cudaStream_t);
FUSED_STEP_FOR_EACH_PAIR(FUSED_STEP_INSTANTIATE)

}  // namespace fused_step::cuda
