// SPDX-License-Identifier: MIT
// Launches the norm of gradients.
#include "cuda/grad_norm.cuh"

#include "cuda/pairs.h"

namespace fused_step::cuda {

template <typename P>
cudaError_t launch_grad_norm(const GradNorm<P>& a, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(at_least(1, a.list.count)));
  return launch(grad_norm_kernel<P>, blocks, kListThreads, 0, stream, a);
}

#define FUSED_STEP_INSTANTIATE(P) \
  template cudaError_t launch_grad_norm<P>(const GradNorm<P>&, cudaStream_t);
FUSED_STEP_FOR_EACH_PARAM(FUSED_STEP_INSTANTIATE)

}  // namespace fused_step::cuda
