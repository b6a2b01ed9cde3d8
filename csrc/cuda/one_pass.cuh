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

// What becomes of the sums over all chunks: when there are any, no block reads W any more, and it
// may be written.
template <typename X, typename P>
class OnePassEnding {
 public:
  using A = Accum<P>;
  static constexpr int kV = static_cast<int>(kVectorBytes / sizeof(A));

  __device__ __forceinline__ explicit OnePassEnding(const OnePassArgs<X, P>& a)
      : a_(a),
        of_weight_(coefficients_of(a.weight_update)),
        of_bias_(coefficients_of(a.bias_update)),
        weight_(a.weight_update),
        dweight_(a.dweight),
        n_(static_cast<int>(a.shape.O) * static_cast<int>(a.shape.I)) {}

  // Elements of dW from k on.
  __device__ __forceinline__ void dweight(int k, const A (&sum)[kV]) const {
    if (weight_.value != nullptr) {
      update_elements<P, kV>(weight_, of_weight_, k, n_ - k, sum);
    } else if (dweight_ != nullptr) {
#pragma unroll
      for (int j = 0; j < kV; ++j) {
        if (k + j < n_) dweight_[k + j] = sum[j];
      }
    }
  }

  // Of r^2, then of dbias.
  __device__ __forceinline__ void rest(int k, double sum) const {
    if (k == 0) {
      if (a_.loss != nullptr) *a_.loss = narrow<P>(static_cast<A>(sum * a_.loss_scale));
    } else if (a_.bias_update.value != nullptr) {
      update_element(a_.bias_update, of_bias_, k - 1, static_cast<A>(sum));
    } else if (a_.dbias != nullptr) {
      a_.dbias[k - 1] = static_cast<A>(sum);
    }
  }

 private:
  const OnePassArgs<X, P>& a_;
  SgdCoefficients<A> of_weight_, of_bias_;
  // Copies: what is written might lie in the arguments, which would be read again each time.
  Updated<P> weight_;
  A* dweight_;
  int n_;
};

// After the block has written the partial sums of its chunk. A function of its own: inlined into
// every kernel it would double the time to compile them.
template <typename X, typename P>
__device__ __noinline__ void finish_one_pass(const OnePassArgs<X, P>& a) {
  using Ending = OnePassEnding<X, P>;
  if (a.scratch.tickets == nullptr) return;  // one_pass_sum_kernel follows
  const auto partials = partials_of(a);
  if (!finishes(partials, a.scratch.tickets, a.chunks)) return;
  const Ending ending(a);
  add_dweights(partials, 0, a.chunks.group, a.chunks.groups,
               [&](int k, const typename Ending::A(&sum)[Ending::kV]) { ending.dweight(k, sum); });
  add_sums(partials, 0, a.chunks.group, a.chunks.groups,
           [&](int k, double sum) { ending.rest(k, sum); });
}

// What finish_one_pass() does, after all blocks: where the sums are more than one of them should
// read.
template <typename X, typename P>
__global__ void __launch_bounds__(kSumThreads)
    one_pass_sum_kernel(const __grid_constant__ OnePassArgs<X, P> a) {
  using Ending = OnePassEnding<X, P>;
  // A thread uses it once: before the sums are there it would only take registers.
  sum_apart(
      partials_of(a), a.chunks,
      [&](int k, const typename Ending::A(&sum)[Ending::kV]) { Ending(a).dweight(k, sum); },
      [&](int k, double sum) { Ending(a).rest(k, sum); });
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
