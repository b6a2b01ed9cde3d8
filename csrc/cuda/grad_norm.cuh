// SPDX-License-Identifier: MIT
// The 2-norm of a list's gradients, and what they are clipped by.
#pragma once

#include <cmath>

#include "core/sgd_math.h"
#include "cuda/launch.h"
#include "cuda/ordered_sum.cuh"
#include "cuda/policy.h"
#include "cuda/vector.cuh"

namespace fused_step::cuda {

// The squares of a part's elements in double, where a float's square is exact and finite. Which
// thread adds which does not depend on where the part lies in memory.
template <typename P>
__device__ __forceinline__ double sum_squares(const P* grad,  // [n]
                                              int n) {
  constexpr int kV = static_cast<int>(kVectorBytes / sizeof(P));
  const bool vectors = is_aligned(grad, kVectorBytes);
  double sum = 0.0;
  for (int k = static_cast<int>(threadIdx.x) * kV; k < n; k += kListThreads * kV) {
    P value[kV] = {};
    if (vectors && k + kV <= n) {
      load_all(grad + k, value);
    } else {
#pragma unroll
      for (int j = 0; j < kV; ++j) {
        if (k + j < n) value[j] = grad[k + j];
      }
    }
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      const double wide = static_cast<double>(widen(value[j]));
      sum += wide * wide;
    }
  }
  return sum;
}

// Block b has chunk b; one block without a chunk has an empty sum. Reads gradients, writes the
// partial sums, and in the finishing launch norm and clip.
template <typename P>
__global__ void __launch_bounds__(kListThreads) grad_norm_kernel(const GradNorm<P> a) {
  __shared__ double shared[kListThreads];
  double sum = 0.0;
  if (blockIdx.x < a.list.count) {
    const SgdChunk chunk = a.list.chunks[blockIdx.x];
    const SgdTensor& tensor = a.list.tensors[chunk.tensor];
    const int64_t begin = chunk.number * kListChunk<P>, left = tensor.n - begin;
    sum = sum_squares(static_cast<const P*>(tensor.grad) + begin,
                      static_cast<int>(left < kListChunk<P> ? left : kListChunk<P>));
  }
  sum = sum_block<kListThreads>(sum, shared);
  if (threadIdx.x == 0) a.partials[a.partials_begin + blockIdx.x] = sum;

  if (!a.finishes || !arrives_last(a.ticket, gridDim.x)) return;
  sum = 0.0;
  for (int64_t k = threadIdx.x; k < a.partials_count; k += kListThreads) {
    sum += __ldcg(a.partials + k);
  }
  sum = sum_block<kListThreads>(sum, shared);
  if (threadIdx.x != 0) return;
  double unscale = a.unscale;
  if (a.grad_scale != nullptr) unscale = static_cast<double>(sgd_unscale(*a.grad_scale));
  const double norm = sqrt(sum) * unscale;
  *a.clip = sgd_clip(a.max_norm, norm);
  if (a.norm_float != nullptr) *a.norm_float = static_cast<float>(norm);
  if (a.norm_double != nullptr) *a.norm_double = norm;
}

}  // namespace fused_step::cuda
