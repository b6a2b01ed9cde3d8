// SPDX-License-Identifier: MIT
// One-pass on the units that multiply matrices: which kernel, and how many stages a GPU has room
// for.
#include "cuda/one_pass_mma.cuh"

#include "cuda/one_pass.h"
#include "cuda/pairs.h"

namespace fused_step::cuda {
namespace {

template <typename X, int kTiles, bool kDx>
cudaError_t launch_part(const OnePassArgs<X, X>& a, cudaStream_t stream) {
  using S = MmaPart<X, kTiles, kDx>;
  static_assert(sizeof(MmaExchange<S>) == mma_exchange_bytes(kTiles));
  const auto kernel = one_pass_mma_kernel<S>;
  const int team = mma_team(a.shape.I, S::kColumns);
  const int stages = mma_stages(kTiles, S::kColumns, team, most_shared());
  const bool vectors = takes_vectors(a) && is_aligned(a.weight, kVectorBytes);
  const int64_t shared_bytes = mma_shared_bytes(kTiles, S::kColumns, stages, team);
  const cudaError_t error = allow_shared(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  return launch(kernel, dim3(static_cast<unsigned>(a.chunks.count)), kMmaThreads, shared_bytes,
                stream, a, team, stages, vectors);
}

template <typename X, int kTiles>
cudaError_t launch_tiles(const OnePassArgs<X, X>& a, cudaStream_t stream) {
  return a.dx != nullptr ? launch_part<X, kTiles, true>(a, stream)
                         : launch_part<X, kTiles, false>(a, stream);
}

}  // namespace

template <typename X>
cudaError_t launch_one_pass_mma(const OnePassArgs<X, X>& a, cudaStream_t stream) {
  if (a.dx != nullptr && a.shape.I > mma_columns(a.shape.O, true)) return cudaErrorInvalidValue;
  const int tiles = mma_tiles(a.shape.O);
  if (tiles == 1) return launch_tiles<X, 1>(a, stream);
  if (tiles == 2) return launch_tiles<X, 2>(a, stream);
  return launch_tiles<X, 4>(a, stream);
}

#define FUSED_STEP_INSTANTIATE(X) \
  template cudaError_t launch_one_pass_mma(const OnePassArgs<X, X>&, cudaStream_t);
FUSED_STEP_FOR_EACH_MMA(FUSED_STEP_INSTANTIATE)

}  // namespace fused_step::cuda
