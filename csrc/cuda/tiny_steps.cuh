// SPDX-License-Identifier: MIT
// Whole steps by one block, any number of them in a launch. W, the momentum buffers and the bias
// are in shared memory from the first step to the last.
#pragma once

#include "cuda/launch.h"
#include "cuda/policy.h"
#include "cuda/sgd.cuh"
#include "cuda/teams.cuh"

namespace fused_step::cuda {

template <typename X, typename P>
struct TinyArgs {
  Rows<X, P> data;
  int64_t rows;
  int64_t batch_size;
  int64_t first_row;
  int64_t steps;
  int I;
  int O;
  Reduction reduction;
  Updated<P> weight;
  Updated<P> bias;
  P* losses;  // [steps]
};

// A parameter while it is trained: each value as it would be stored, rounded to P with each step.
template <typename P, int kCount>
struct Resident {
  Accum<P> value[kCount];
  Accum<P> momentum_buf[kCount];

  __device__ __forceinline__ void load(const Updated<P>& from, int n) {
    for (int k = static_cast<int>(threadIdx.x); k < n; k += kTinyThreads) {
      value[k] = widen(from.value[k]);
      const bool has_history = from.coefficients.has_momentum && !from.coefficients.first_step;
      momentum_buf[k] = has_history ? widen(from.momentum_buf[k]) : Accum<P>(0);
    }
  }
  __device__ __forceinline__ void update(const SgdCoefficients<Accum<P>>& c, int k, Accum<P> grad) {
    Accum<P> buf = momentum_buf[k];
    value[k] = widen(narrow<P>(sgd_update(value[k], grad, buf, c)));
    momentum_buf[k] = widen(narrow<P>(buf));
  }
  __device__ __forceinline__ void store(const Updated<P>& to, int n) const {
    for (int k = static_cast<int>(threadIdx.x); k < n; k += kTinyThreads) {
      to.value[k] = narrow<P>(value[k]);
      if (to.coefficients.has_momentum) to.momentum_buf[k] = narrow<P>(momentum_buf[k]);
    }
  }
};

// Rows of the step that begins at `first_row`.
template <typename X, typename P>
__device__ __forceinline__ int rows_at(const TinyArgs<X, P>& a, int64_t first_row) {
  const int64_t left = a.rows - first_row;
  return static_cast<int>(left < a.batch_size ? left : a.batch_size);
}

// One block. Reads data; reads and, at the end, writes W, bias and their buffers; writes losses.
template <typename S>
__global__ void __launch_bounds__(kTinyThreads, 1)
    tiny_steps_kernel(const TinyArgs<typename S::X, typename S::P> a, const int lanes) {
  constexpr int kWarps = kTinyThreads / kWarp;
  using A = typename S::A;
  using P = typename S::P;
  __shared__ WarpSums<S, kWarps> warp_sums;
  __shared__ Resident<P, S::kOutputs * S::kColumns * kWarp> weight;
  __shared__ Resident<P, S::kOutputs> bias;
  const int I = a.I, O = a.O, n = O * I, thread = static_cast<int>(threadIdx.x);
  const Lane lane{thread & (lanes - 1), lanes};
  const int teams = kTinyThreads / lanes, team = thread / lanes;
  const bool has_bias = a.bias.value != nullptr;
  weight.load(a.weight, n);
  if (has_bias) bias.load(a.bias, O);
  __syncthreads();

  SgdCoefficients<A> of_weight = coefficients_of(a.weight), of_bias = coefficients_of(a.bias);
  const auto no_dx = [](int) -> typename S::X* { return nullptr; };
  int64_t first_row = a.first_row;
  // The next rows, of this step or the one after it, are on their way while the present ones are
  // used: a step of few rows would wait for them longer than for anything else.
  const auto rows_of_step = [&] {
    return RowSet<typename S::X, P>(a.data, first_row + team, rows_at(a, first_row) - team, teams);
  };
  RowSet<typename S::X, P> rows = rows_of_step();
  Slice<S> next;
  read_slice<S>(rows, lane, I, O, next);
  // Two divisions in double, made again only when a batch has another number of rows.
  int scaled_for = -1;
  A dy_scale = A(0);
  double loss_scale = 0.0;
  for (int64_t step = 0; step < a.steps; ++step) {
    A w[S::kOutputs][S::kColumns], b[S::kOutputs];
    read_weight<S>([&](int k) { return weight.value[k]; }, lane, I, O, w);
#pragma unroll
    for (int o = 0; o < S::kOutputs; ++o) b[o] = has_bias && o < O ? bias.value[o] : A(0);
    const int count = rows_at(a, first_row);
    if (count != scaled_for) {
      dy_scale = static_cast<A>(mse_dy_scale(a.reduction, count, O));
      loss_scale = mse_loss_scale(a.reduction, count, O);
      scaled_for = count;
    }
    first_row += count;
    if (first_row >= a.rows) first_row = 0;

    Sums<S> sums;
    sums.clear();
    for (int row = 0; row < count; row += teams * S::kRows) {
      Slice<S> slice = next;
      const int left = rows.left;
      if (row + teams * S::kRows < count) {
        rows.advance(S::kRows);
      } else if (step + 1 < a.steps) {
        rows = rows_of_step();
      } else {
        rows.left = 0;  // nothing follows that would use them
      }
      read_slice<S>(rows, lane, I, O, next);
      add_slice<S>(slice, left, teams, w, b, dy_scale, lane, I, O, no_dx, sums);
    }
    leave_sums<S, kWarps>(sums, lane, warp_sums);
    __syncthreads();  // also: all have read W of this step

    for (int k = thread; k < n; k += kTinyThreads) {
      weight.update(of_weight, k, dweight_of<S, kWarps>(warp_sums, lane, k / I, k % I));
    }
    if (thread < O && has_bias) {
      const double grad = rest_of<S, kWarps>(warp_sums, 1 + thread);
      bias.update(of_bias, thread, static_cast<A>(grad));
    }
    if (thread == 0) {
      const double loss = rest_of<S, kWarps>(warp_sums, 0);
      a.losses[step] = narrow<P>(static_cast<A>(loss * loss_scale));
    }
    of_weight.first_step = of_bias.first_step = false;
    __syncthreads();  // the sums are used, W of the next step is there
  }
  if (a.steps == 0) return;
  weight.store(a.weight, n);
  if (has_bias) bias.store(a.bias, O);
}

}  // namespace fused_step::cuda
