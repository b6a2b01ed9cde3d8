// SPDX-License-Identifier: MIT
// Launches the residual pass.
#include "cuda/residual.cuh"

#include "cuda/pairs.h"

namespace fused_step::cuda {

template <typename X, typename P>
int64_t residual_workspace(int64_t B, int64_t O) {
  const ResidualGrid g = residual_grid(B, O);
  return g.chunks * (O + g.groups) * static_cast<int64_t>(sizeof(double));
}

template <typename X, typename P>
cudaError_t launch_residual(const Residual<X, P>& r, cudaStream_t stream) {
  const ResidualGrid g = residual_grid(r.B, r.O);
  const dim3 blocks(static_cast<unsigned>(g.chunks), static_cast<unsigned>(g.groups));
  return launch(residual_kernel<X, P>, blocks, kResidualThreads, 0, stream,
                ResidualArgs<X, P>{r, g, mse_loss_scale(r.reduction, r.B, r.O)});
}

#define FUSED_STEP_INSTANTIATE(X, P)                               \
  template int64_t residual_workspace<X, P>(int64_t B, int64_t O); \
  template cudaError_t launch_residual<X, P>(const Residual<X, P>&, cudaStream_t);
FUSED_STEP_FOR_EACH_PAIR(FUSED_STEP_INSTANTIATE)

}  // namespace fused_step::cuda
