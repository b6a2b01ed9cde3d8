// SPDX-License-Identifier: MIT
// Launches the steps of one block.
#include "cuda/launch.h"
#include "cuda/pairs.h"
#include "cuda/policy.h"
#include "cuda/tiny_steps.cuh"

namespace fused_step::cuda {
namespace {

// Columns one by one: rows this short come from cache, and any alignment takes the same kernel.
template <typename X, typename P, int kOutputs, int kLaneColumns>
cudaError_t launch_tiny(const TinyArgs<X, P>& a, cudaStream_t stream) {
  constexpr int kRows = tiny_rows(kOutputs, kLaneColumns, sizeof(Accum<P>));
  return launch(tiny_steps_kernel<Tile<X, P, 1, kLaneColumns, kOutputs, kRows>>, dim3(1),
                kTinyThreads, 0, stream, a, lanes_of(a.I, kLaneColumns));
}

}  // namespace

template <typename X, typename P>
cudaError_t launch_tiny_steps(const TinySteps<X, P>& s, cudaStream_t stream) {
  constexpr int64_t kAccum = sizeof(Accum<P>);
  if (!fits_tiny(s.I, s.O, kAccum) || s.batch_size < 0) return cudaErrorInvalidValue;
  // A step without rows is a step: n = 0 has one for each that is asked for.
  const int64_t steps_per_epoch =
      s.batch_size == 0 ? 1 : at_least(1, ceil_div(s.rows, s.batch_size));
  const TinyArgs<X, P> a{s.data,
                         s.rows,
                         s.batch_size,
                         s.first_step % steps_per_epoch * s.batch_size,
                         s.steps,
                         static_cast<int>(s.I),
                         static_cast<int>(s.O),
                         s.reduction,
                         updated(s.weight),
                         updated(s.bias),
                         s.losses};
  constexpr int kFew = tiny_lane_columns(1, 1, kAccum);
  constexpr int kMany = tiny_lane_columns(tiny_columns(1, kAccum), 1, kAccum);
  if (s.O > 1) return launch_tiny<X, P, tiny_capacity(kMaxTinyOutputs), kFew>(a, stream);
  if (tiny_lane_columns(s.I, s.O, kAccum) == kFew) return launch_tiny<X, P, 1, kFew>(a, stream);
  return launch_tiny<X, P, 1, kMany>(a, stream);
}

#define FUSED_STEP_INSTANTIATE(X, P) \
  template cudaError_t launch_tiny_steps<X, P>(const TinySteps<X, P>&, cudaStream_t);
FUSED_STEP_FOR_EACH_PAIR(FUSED_STEP_INSTANTIATE)

}  // namespace fused_step::cuda
