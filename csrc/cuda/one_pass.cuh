// SPDX-License-Identifier: MIT
// One-pass: every row of x is read once, for y and for dW. A block sums a chunk of rows, the last
// block adds the chunks in order and updates W or writes the gradients.
#pragma once

#include "cuda/launch.h"
#include "cuda/one_pass.h"
#include "cuda/ordered_sum.cuh"
#include "cuda/sgd.cuh"
#include "cuda/teams.cuh"

namespace fused_step::cuda {

template <typename X, typename P>
__device__ __forceinline__ Partials<Accum<P>> partials_of(const OnePassArgs<X, P>& a) {
  const int I = static_cast<int>(a.shape.I), O = static_cast<int>(a.shape.O);
  return {static_cast<unsigned char*>(a.scratch.workspace), a.partial_bytes, a.dweight_at, O,
          O * I};
}

// After the block has written the partial sums of its chunk. A function of its own: inlined into
// every kernel it would double the time to compile them.
template <typename X, typename P>
__device__ __noinline__ void finish_one_pass(const OnePassArgs<X, P>& a) {
  using A = Accum<P>;
  const Partials<A> partials = partials_of(a);
  constexpr int kV = static_cast<int>(kVectorBytes / sizeof(A));
  if (!finishes(partials, a.scratch.tickets, a.chunks)) return;
  // Every block has arrived, so none reads W any more: now it may be written.
  const SgdCoefficients<A> of_weight = coefficients_of(a.weight_update);
  const SgdCoefficients<A> of_bias = coefficients_of(a.bias_update);
  // A copy: what is written might lie in the arguments, which would be read again each time.
  const Updated<P> weight = a.weight_update;
  A* const dweight = a.dweight;
  add_dweights(partials, 0, a.chunks.group, a.chunks.groups, [&](int k, const A(&sum)[kV]) {
    if (weight.value != nullptr) {
      update_elements<P, kV>(weight, of_weight, k, partials.n - k, sum);
    } else if (dweight != nullptr) {
#pragma unroll
      for (int j = 0; j < kV; ++j) {
        if (k + j < partials.n) dweight[k + j] = sum[j];
      }
    }
  });
  add_sums(partials, 0, a.chunks.group, a.chunks.groups, [&](int k, double sum) {
    if (k == 0) {
      if (a.loss != nullptr) *a.loss = narrow<P>(static_cast<A>(sum * a.loss_scale));
    } else if (a.bias_update.value != nullptr) {
      update_element(a.bias_update, of_bias, k - 1, static_cast<A>(sum));
    } else if (a.dbias != nullptr) {
      a.dbias[k - 1] = static_cast<A>(sum);
    }
  });
}

template <typename S, typename X, typename P>
__device__ __forceinline__ void read_bias(const OnePassArgs<X, P>& a,
                                          Accum<P> (&bias)[S::kOutputs]) {
#pragma unroll
  for (int o = 0; o < S::kOutputs; ++o) {
    bias[o] = a.bias != nullptr && o < a.shape.O ? widen(a.bias[o]) : Accum<P>(0);
  }
}

template <typename X, typename P>
__device__ __forceinline__ int rows_in_chunk(const OnePassArgs<X, P>& a) {
  const int64_t left = a.shape.B - blockIdx.x * a.chunks.rows;
  return static_cast<int>(left < a.chunks.rows ? left : a.chunks.rows);
}

// Of a block's chunk the rows `first`, `first` + `step`, ...
template <typename X, typename P>
__device__ __forceinline__ RowSet<X, P> chunk_rows(const OnePassArgs<X, P>& a, int first,
                                                   int step) {
  return {a.batch, blockIdx.x * a.chunks.rows + first, rows_in_chunk(a) - first, step};
}

// Where dx of a row of the chunk belongs, or null.
template <typename X, typename P>
__device__ __forceinline__ X* dx_of(const OnePassArgs<X, P>& a, int row) {
  return a.dx != nullptr ? a.dx + (blockIdx.x * a.chunks.rows + row) * a.shape.I : nullptr;
}

// Reads x, target, W and bias; writes dx if it is not null and, in the last block, what the
// arguments ask for. W and bias may be what is updated. `lanes`: in a team, a power of two, with
// lanes * S::kColumns >= I.
template <typename S>
__global__ void __launch_bounds__(kRowsThreads,
                                  rows_blocks(S::kV > 1, S::kOutputs, sizeof(typename S::X)))
    one_pass_rows_kernel(const __grid_constant__ OnePassArgs<typename S::X, typename S::P> a,
                         const int lanes) {
  constexpr int kWarps = kRowsThreads / kWarp;
  using A = typename S::A;
  __shared__ WarpSums<S, kWarps> warp_sums;
  const int I = static_cast<int>(a.shape.I), O = static_cast<int>(a.shape.O);
  const int thread = static_cast<int>(threadIdx.x);
  const Lane lane{thread & (lanes - 1), lanes};
  const int teams = kRowsThreads / lanes;

  A w[S::kOutputs][S::kColumns], bias[S::kOutputs];
  read_weight<S>([&](int k) { return widen(a.weight[k]); }, lane, I, O, w);
  read_bias<S>(a, bias);
  Sums<S> sums;
  sums.clear();

  // The next rows are on their way while the present ones are used.
  RowSet<typename S::X, typename S::P> rows = chunk_rows(a, thread / lanes, teams);
  Slice<S> next;
  read_slice<S>(rows, lane, I, O, next);
  for (int steps = (rows_in_chunk(a) + teams * S::kRows - 1) / (teams * S::kRows); steps > 0;
       --steps) {
    Slice<S> slice = next;
    const int left = rows.left;
    rows.advance(S::kRows);
    read_slice<S>(rows, lane, I, O, next);
    add_slice<S>(
        slice, left, teams, w, bias, a.dy_scale, lane, I, O,
        [&](int r) { return dx_of(a, rows_in_chunk(a) - left + r * teams); }, sums);
  }

  leave_sums<S, kWarps>(sums, lane, warp_sums);
  __syncthreads();
  const Partials<A> partials = partials_of(a);
  A* const dweight = partials.dweight(blockIdx.x);
  for (int o = 0; o < O; ++o) {
    for (int i = thread; i < I; i += kRowsThreads) {
      dweight[o * I + i] = dweight_of<S, kWarps>(warp_sums, lane, o, i);
    }
  }
  if (thread <= O) partials.sums(blockIdx.x)[thread] = rest_of<S, kWarps>(warp_sums, thread);
  finish_one_pass(a);
}

}  // namespace fused_step::cuda
