// SPDX-License-Identifier: MIT
// Launches the update of a list of tensors.
#include "cuda/sgd_list.cuh"

#include "cuda/pairs.h"

namespace fused_step::cuda {

template <typename P, typename Buf>
cudaError_t launch_sgd_list(const SgdList<P, Buf>& s, cudaStream_t stream) {
  if (s.list.count == 0) return cudaSuccess;  // a grid has at least one block
  using A = Accum<P>;
  const SgdListArgs<P> a{
      s.list,
      {sgd_coefficients<A>(s.options), static_cast<A>(s.unscale), A(1), s.grad_after},
      s.scalars};
  const dim3 blocks(static_cast<unsigned>(s.list.count));
  const bool scaled = s.unscale != 1.0 || s.scalars.grad_scale != nullptr ||
                      s.scalars.clip != nullptr || s.grad_after != GradAfter::kKept;
  return scaled ? launch(sgd_list_kernel<P, Buf, true>, blocks, kListThreads, 0, stream, a)
                : launch(sgd_list_kernel<P, Buf, false>, blocks, kListThreads, 0, stream, a);
}

#define FUSED_STEP_INSTANTIATE(P, Buf) \
  template cudaError_t launch_sgd_list<P, Buf>(const SgdList<P, Buf>&, cudaStream_t);
FUSED_STEP_FOR_EACH_STORAGE(FUSED_STEP_INSTANTIATE)

}  // namespace fused_step::cuda
