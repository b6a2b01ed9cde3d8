// SPDX-License-Identifier: MIT
// Launches the update of a parameter.
#include "cuda/sgd_update.cuh"

#include "cuda/pairs.h"

namespace fused_step::cuda {
namespace {

template <typename P, int kV>
cudaError_t launch_vectors(const SgdUpdateArgs<P>& a, cudaStream_t stream) {
  const int64_t blocks = ceil_div(a.n, int64_t{kElementwiseThreads} * kV);
  return launch(sgd_update_kernel<P, kV>,
                dim3(static_cast<unsigned>(at_most(blocks, kMaxElementwiseBlocks))),
                kElementwiseThreads, 0, stream, a);
}

}  // namespace

template <typename P>
cudaError_t launch_sgd_update(const SgdUpdate<P>& s, cudaStream_t stream) {
  if (s.n == 0) return cudaSuccess;  // a grid has at least one block
  const SgdUpdateArgs<P> a{updated(s.param), s.grad, static_cast<Accum<P>>(s.grad_scale), s.n};
  const bool vectors = is_aligned(a.param.value, kVectorBytes) &&
                       is_aligned(a.param.momentum_buf, kVectorBytes) &&
                       is_aligned(a.grad, kVectorBytes);
  constexpr int kV = static_cast<int>(kVectorBytes / sizeof(P));
  return vectors ? launch_vectors<P, kV>(a, stream) : launch_vectors<P, 1>(a, stream);
}

#define FUSED_STEP_INSTANTIATE(P) \
  template cudaError_t launch_sgd_update<P>(const SgdUpdate<P>&, cudaStream_t);
FUSED_STEP_FOR_EACH_PARAM(FUSED_STEP_INSTANTIATE)

}  // namespace fused_step::cuda
