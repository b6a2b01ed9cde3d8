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

// The sum over a block's teams of `columns` threads each, in the first team. `shared`:
// [kResidualThreads]. Called by all threads of a block.
__device__ __forceinline__ double sum_over_teams(double value, int columns, int teams,
                                                 double* shared) {
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();  // what was there is used
  shared[thread] = value;
  __syncthreads();
  if (thread < columns) {
    for (int k = 1; k < teams; ++k) value += shared[k * columns + thread];
  }
  return value;
}

// Block (chunk, group): the rows of a chunk, tiles of columns `group`, `group` + groups, ... A
// thread stays in its column of a tile. Reads y, target and bias, overwrites y.
template <typename X, typename P>
__global__ void __launch_bounds__(kResidualThreads, kResidualBlocks)
    residual_kernel(const ResidualArgs<X, P> a) {
  using A = Accum<P>;
  // 16 bytes of y on their way in each thread, at least 4 elements: r is stored where y was, so
  // that no load may overtake it.
  constexpr int kAtOnce = sizeof(X) == 2 ? 8 : 4;
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
      X* y = r.y + (begin + team) * r.O + o;
      const P* target = r.target + (begin + team) * r.target_stride + o;
      const int64_t y_step = teams * r.O, target_step = teams * r.target_stride;
#pragma unroll 1
      for (int left = static_cast<int>(end - begin) - team; left > 0; left -= kAtOnce * teams) {
        X old[kAtOnce];
        P wanted[kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          if (u * teams >= left) continue;
          old[u] = y[u * y_step];
          wanted[u] = target[u * target_step];
        }
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          if (u * teams >= left) continue;
          const A residual =
              mse_residual(static_cast<A>(widen(old[u])), bias, static_cast<A>(widen(wanted[u])));
          y[u * y_step] = narrow<X>(static_cast<Accum<X>>(residual));
          loss += static_cast<double>(mse_term(residual));
          dbias += static_cast<double>(residual);
        }
        y += kAtOnce * y_step;
        target += kAtOnce * target_step;
      }
    }
    dbias = sum_over_teams(dbias, columns, teams, shared);
    if (thread < columns && o < r.O) column_sums(r.scratch, r.O, chunk)[o] = dbias;
  }
  __syncthreads();
  loss = sum_block<kResidualThreads>(loss, shared);
  if (thread == 0) loss_sums(r.scratch, g, r.O, chunk)[group] = loss;

  if (!arrives_last(r.scratch.tickets + group, g.chunks)) return;
  for (int64_t tile = group; r.dbias != nullptr && tile < g.tiles; tile += g.groups) {
    // Each team has its share of the chunks.
    const int64_t o = tile * columns + thread % columns;
    double sum[1] = {};
    if (team < teams && o < r.O) {
      add_in_order<8>((g.chunks - team + teams - 1) / teams,
                      [&](int64_t c) { return column_sums(r.scratch, r.O, team + c * teams) + o; },
                      sum);
    }
    const double dbias = sum_over_teams(sum[0], columns, teams, shared);
    if (thread < columns && o < r.O) r.dbias[o] = static_cast<A>(dbias * r.dbias_scale);
  }
  loss = 0.0;
  for (int64_t c = thread; c < g.chunks; c += kResidualThreads) {
    loss += __ldcg(loss_sums(r.scratch, g, r.O, c) + group);
  }
  __syncthreads();  // the columns' sums are used
  loss = sum_block<kResidualThreads>(loss, shared);
  if (thread == 0) loss_sums(r.scratch, g, r.O, 0)[group] = loss;
  if (!arrives_last(r.scratch.tickets + kMaxGroups, g.groups)) return;
  if (thread == 0) {
    double sum = 0.0;
    for (int64_t k = 0; k < g.groups; ++k) sum += __ldcg(loss_sums(r.scratch, g, r.O, 0) + k);
    *r.loss = narrow<P>(static_cast<A>(sum * a.loss_scale));
  }
}

}  // namespace fused_step::cuda
