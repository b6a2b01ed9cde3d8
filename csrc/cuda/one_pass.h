// SPDX-License-Identifier: MIT
// One-pass with either ending, as its kernels take it.
#pragma once

#include "cuda/launch.h"
#include "cuda/policy.h"
#include "cuda/sgd.cuh"
#include "cuda/vector.cuh"

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

// On the units that multiply matrices, where fits_mma(), with dx for fewer columns: mma_columns().
// Chunks are mma_chunks().
template <typename X>
cudaError_t launch_one_pass_mma(const OnePassArgs<X, X>& args, cudaStream_t stream);

// Whether every row of x, and of dx, begins and ends at a multiple of 16 bytes.
template <typename X, typename P>
bool takes_vectors(const OnePassArgs<X, P>& a) {
  constexpr int64_t kSize = sizeof(X);
  return is_aligned(a.batch.x, kVectorBytes) && is_aligned(a.dx, kVectorBytes) &&
         a.batch.x_stride * kSize % kVectorBytes == 0 && a.shape.I * kSize % kVectorBytes == 0;
}

}  // namespace fused_step::cuda
