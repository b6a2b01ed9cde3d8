// SPDX-License-Identifier: MIT
// One-pass with either ending, as its kernels take it.
#pragma once

#include "cuda/launch.h"
#include "cuda/policy.h"
#include "cuda/sgd.cuh"

namespace fused_step::cuda {

// A step names what is updated; a gradient call leaves the two updates' values null.
template <typename X, typename P>
struct OnePassArgs {
  Rows<X, P> batch;
  LinearShape shape;
  const P* weight;  // [O, I]
  const P* bias;    // [O] or null
  Accum<P> dy_scale;
  double loss_scale;
  Updated<P> weight_update;
  Updated<P> bias_update;
  P* loss;            // [] or null
  X* dx;              // [B, I] or null
  Accum<P>* dweight;  // [O, I] or null
  Accum<P>* dbias;    // [O] or null
  Scratch scratch;
  // Follow from the shape; launch_one_pass sets them.
  Chunks chunks;
  int64_t partial_bytes;
  int64_t dweight_at;
};

template <typename X, typename P>
cudaError_t launch_one_pass(OnePassArgs<X, P> args, cudaStream_t stream);

}  // namespace fused_step::cuda
