// SPDX-License-Identifier: MIT
// y = x W^T becomes r in place; the loss and the sums of r over rows come from the same pass.
#pragma once

#include "core/mse_math.h"
#include "cuda/launch.h"
#include "cuda/ordered_sum.cuh"
#include "cuda/policy.h"

namespace fused_step::cuda {

template <typename X, typename P>
struct ResidualArgs {
  Residual<X, P> r;
  ResidualGrid grid;
  double loss_scale;
};

// The partial sums: [chunks, O] of r, then [chunks, groups] of r^2.
__device__ __forceinline__ double* column_sums(const Scratch& s, int64_t O, int64_t chunk) {
  return static_cast<double*>(s.workspace) + chunk * O;
}
__device__ __forceinline__ double* loss_sums(const Scratch& s, const ResidualGrid& g, int64_t O,
                                             int64_t chunk) {
  return static_cast<double*>(s.workspace) + g.chunks * O + chunk * g.groups;
}

// Block (chunk, group): the rows of a chunk, tiles of columns `group`, `group` + groups, ... A
// thread stays in its column of a tile. Reads y, target and bias, overwrites y.
template <typename X, typename P>
__global__ void __launch_bounds__(kResidualThreads) residual_kernel(const ResidualArgs<X, P> a) {
  using A = Accum<P>;
  __shared__ double shared[kResidualThreads];
  const Residual<X, P>& r = a.r;
  const ResidualGrid& g = a.grid;
  const int thread = static_cast<int>(threadIdx.x);
  const int columns = static_cast<int>(g.columns), teams = kResidualThreads / columns;
  const int team = thread / columns;
  const int64_t chunk = blockIdx.x, group = blockIdx.y;
  const int64_t begin = chunk * g.rows;
  const int64_t end = begin + g.rows < r.B ? begin + g.rows : r.B;
  double loss = 0.0;
  for (int64_t tile = group; tile < g.tiles; tile += g.groups) {
    const int64_t o = tile * columns + thread % columns;
    const bool active = team < teams && o < r.O;
    const A bias = active && r.bias != nullptr ? static_cast<A>(widen(r.bias[o])) : A(0);
    double dbias = 0.0;
    if (active) {
#pragma unroll 4
      for (int64_t b = begin + team; b < end; b += teams) {
        X& y = r.y[b * r.O + o];
        const A residual = mse_residual(static_cast<A>(widen(y)), bias,
                                        static_cast<A>(widen(r.target[b * r.target_stride + o])));
        y = narrow<X>(static_cast<Accum<X>>(residual));
        loss += static_cast<double>(mse_term(residual));
        dbias += static_cast<double>(residual);
      }
    }
    __syncthreads();  // the last tile's sums are used
    shared[thread] = dbias;
    __syncthreads();
    if (thread < columns && o < r.O) {
      for (int k = 1; k < teams; ++k) dbias += shared[k * columns + thread];
      column_sums(r.scratch, r.O, chunk)[o] = dbias;
    }
  }
  __syncthreads();
  loss = sum_block<kResidualThreads>(loss, shared);
  if (thread == 0) loss_sums(r.scratch, g, r.O, chunk)[group] = loss;

  if (!arrives_last(r.scratch.tickets + group, g.chunks)) return;
  for (int64_t tile = group; tile < g.tiles; tile += g.groups) {
    const int64_t o = tile * columns + thread;
    if (r.dbias == nullptr || thread >= columns || o >= r.O) continue;
    double sum = 0.0;
#pragma unroll 8
    for (int64_t c = 0; c < g.chunks; ++c) sum += __ldcg(column_sums(r.scratch, r.O, c) + o);
    r.dbias[o] = static_cast<A>(sum * r.dbias_scale);
  }
  if (thread == 0) {
    double sum = 0.0;
    for (int64_t c = 0; c < g.chunks; ++c) sum += __ldcg(loss_sums(r.scratch, g, r.O, c) + group);
    loss_sums(r.scratch, g, r.O, 0)[group] = sum;
  }
  if (!arrives_last(r.scratch.tickets + kMaxGroups, g.groups)) return;
  if (thread == 0) {
    double sum = 0.0;
    for (int64_t k = 0; k < g.groups; ++k) sum += __ldcg(loss_sums(r.scratch, g, r.O, 0) + k);
    *r.loss = narrow<P>(static_cast<A>(sum * a.loss_scale));
  }
}

}  // namespace fused_step::cuda
