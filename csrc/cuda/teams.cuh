// SPDX-License-Identifier: MIT
// A team of 1 to 32 lanes of a warp has one row of x at a time, or a few: each lane holds its
// columns of x, of W and of dW in registers.
#pragma once

#include <cstdint>

#include "core/mse_math.h"
#include "cuda/launch.h"
#include "cuda/vector.cuh"

namespace fused_step::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// What a lane holds: kVecs vectors of kV columns, kOutputs rows of W, kRows rows of x at a time.
template <typename X_, typename P_, int kV_, int kVecs_, int kOutputs_, int kRows_>
struct Tile {
  using X = X_;
  using P = P_;
  using A = Accum<P>;
  static constexpr int kV = kV_;
  static constexpr int kVecs = kVecs_;
  static constexpr int kColumns = kV * kVecs;
  static constexpr int kOutputs = kOutputs_;
  static constexpr int kRows = kRows_;
};

// Where a lane is in its team. Vector v of the lane begins at column(v): the team's lanes read
// adjacent memory.
struct Lane {
  int lane;
  int lanes;  // in the team

  template <typename S>
  __device__ __forceinline__ int column(int v) const {
    return (v * lanes + lane) * S::kV;
  }
};

// Rows as a kernel sees them: row r of those at hand lies r * `step` rows further on. Pointers that
// move on, since an address made anew from the number of a row takes as long as to multiply a
// vector of it.
template <typename X, typename P>
struct RowSet {
  const X* x;       // of row 0
  const P* target;  // likewise
  int64_t x_step;   // elements from row r to row r + 1
  int64_t target_step;
  int step;
  int left;  // rows from row 0 on; the chunk of a block has less than 2^31

  __device__ __forceinline__ RowSet(const Rows<X, P>& batch, int64_t first, int count, int between)
      : x(batch.x + first * batch.x_stride),
        target(batch.target + first * batch.target_stride),
        x_step(between * batch.x_stride),
        target_step(between * batch.target_stride),
        step(between),
        left(count) {}

  __device__ __forceinline__ bool has(int r) const { return r * step < left; }
  // On by as many rows as `count` of those at hand.
  __device__ __forceinline__ void advance(int count) {
    x += count * x_step;
    target += count * target_step;
    left -= count * step;
  }
};

// Rows of x as they are stored, on their way or there; zeros where there are none.
template <typename S>
struct Slice {
  Word<typename S::X, S::kV> x[S::kRows][S::kVecs];
  typename S::P target[S::kRows][S::kOutputs];
};

template <typename S>
__device__ __forceinline__ void read_x(const RowSet<typename S::X, typename S::P>& rows, Lane lane,
                                       int I, Word<typename S::X, S::kV> (&x)[S::kRows][S::kVecs]) {
#pragma unroll
  for (int r = 0; r < S::kRows; ++r) {
    const typename S::X* const row = rows.x + r * rows.x_step;
    const bool has_row = rows.has(r);
#pragma unroll
    for (int v = 0; v < S::kVecs; ++v) {
      const int i = lane.column<S>(v);
      x[r][v] = Word<typename S::X, S::kV>{};
      // A vector is inside the row or outside: with kV > 1, I is a multiple of it.
      if (has_row && i < I) x[r][v] = load_streaming<typename S::X, S::kV>(row + i);
    }
  }
}

template <typename S>
__device__ __forceinline__ void read_slice(const RowSet<typename S::X, typename S::P>& rows,
                                           Lane lane, int I, int O, Slice<S>& to) {
  read_x<S>(rows, lane, I, to.x);
#pragma unroll
  for (int r = 0; r < S::kRows; ++r) {
    const typename S::P* const row = rows.target + r * rows.target_step;
    const bool has_row = rows.has(r);
#pragma unroll
    for (int o = 0; o < S::kOutputs; ++o) {
      to.target[r][o] = has_row && o < O ? row[o] : typename S::P{};
    }
  }
}

template <typename S>
__device__ __forceinline__ void widen_row(const Word<typename S::X, S::kV> (&row)[S::kVecs],
                                          typename S::A (&to)[S::kColumns]) {
#pragma unroll
  for (int v = 0; v < S::kVecs; ++v) {
    typename S::X stored[S::kV];
    unpack<typename S::X, S::kV>(row[v], stored);
#pragma unroll
    for (int j = 0; j < S::kV; ++j) {
      to[v * S::kV + j] = static_cast<typename S::A>(widen(stored[j]));
    }
  }
}

// The same once more, in a row's second use: kept from the first, a 16-bit row would take twice the
// registers.
template <typename S>
__device__ __forceinline__ void widen_again(Word<typename S::X, S::kV> (&row)[S::kVecs],
                                            typename S::A (&to)[S::kColumns]) {
  if constexpr (sizeof(typename S::X) < sizeof(typename S::A)) {
#pragma unroll
    for (int v = 0; v < S::kVecs; ++v) forget(row[v]);
  }
  widen_row<S>(row, to);
}

// The lane's columns of W; zero where there are none. value(k): element k of W[O, I].
template <typename S, typename Value>
__device__ __forceinline__ void read_weight(const Value& value, Lane lane, int I, int O,
                                            typename S::A (&w)[S::kOutputs][S::kColumns]) {
#pragma unroll
  for (int o = 0; o < S::kOutputs; ++o) {
#pragma unroll
    for (int e = 0; e < S::kColumns; ++e) {
      const int i = lane.column<S>(e / S::kV) + e % S::kV;
      w[o][e] = o < O && i < I ? value(o * I + i) : typename S::A(0);
    }
  }
}

// The lane's share of x . W_o. Four chains of additions, for an addition takes 4 cycles.
template <typename S>
__device__ __forceinline__ typename S::A lane_product(const typename S::A (&x)[S::kColumns],
                                                      const typename S::A (&w)[S::kColumns]) {
  constexpr int kChains = S::kColumns < 4 ? S::kColumns : 4;
  typename S::A chain[kChains];
#pragma unroll
  for (int e = 0; e < kChains; ++e) chain[e] = x[e] * w[e];
#pragma unroll
  for (int e = kChains; e < S::kColumns; ++e) chain[e % kChains] += x[e] * w[e];
#pragma unroll
  for (int e = 1; e < kChains; ++e) chain[0] += chain[e];
  return chain[0];
}

// Sums of a chunk: what the lane has of dW, and what its team has of the rest. Loss and bias go
// into double with each slice, so that their error does not grow with the number of rows.
template <typename S>
struct Sums {
  typename S::A dweight[S::kOutputs][S::kColumns];
  double dbias[S::kOutputs];
  double loss;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int o = 0; o < S::kOutputs; ++o) {
      dbias[o] = 0.0;
#pragma unroll
      for (int e = 0; e < S::kColumns; ++e) dweight[o][e] = typename S::A(0);
    }
    loss = 0.0;
  }
};

// dx[row] = dy W, of the lane's columns.
template <typename S>
__device__ __forceinline__ void write_dx(const typename S::A (&dy)[S::kOutputs],
                                         const typename S::A (&w)[S::kOutputs][S::kColumns],
                                         Lane lane, int I,
                                         typename S::X* dx) {  // [I]
#pragma unroll
  for (int v = 0; v < S::kVecs; ++v) {
    const int i = lane.column<S>(v);
    typename S::X out[S::kV];
#pragma unroll
    for (int j = 0; j < S::kV; ++j) {
      typename S::A sum = dy[0] * w[0][v * S::kV + j];
#pragma unroll
      for (int o = 1; o < S::kOutputs; ++o) sum += dy[o] * w[o][v * S::kV + j];
      out[j] = narrow<typename S::X>(static_cast<Accum<typename S::X>>(sum));
    }
    if (i < I) store<typename S::X, S::kV>(dx + i, out);
  }
}

// Adds the rows of a slice to the sums; there are those r with r * step < left. dx_row(r): where dx
// of row r belongs, or null. All lanes of a warp call it together.
template <typename S, typename DxRow>
__device__ __forceinline__ void add_slice(Slice<S>& slice, int left, int step,
                                          const typename S::A (&w)[S::kOutputs][S::kColumns],
                                          const typename S::A (&bias)[S::kOutputs],
                                          typename S::A dy_scale, Lane lane, int I, int O,
                                          const DxRow& dx_row, Sums<S>& sums) {
  using A = typename S::A;
  A product[S::kRows][S::kOutputs];
#pragma unroll
  for (int r = 0; r < S::kRows; ++r) {
    A x[S::kColumns];
    widen_row<S>(slice.x[r], x);
#pragma unroll
    for (int o = 0; o < S::kOutputs; ++o) product[r][o] = lane_product<S>(x, w[o]);
  }
  for (int offset = lane.lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int r = 0; r < S::kRows; ++r) {
#pragma unroll
      for (int o = 0; o < S::kOutputs; ++o) {
        product[r][o] += __shfl_xor_sync(kAllLanes, product[r][o], offset);
      }
    }
  }
  A loss = A(0), dbias[S::kOutputs] = {};
#pragma unroll
  for (int r = 0; r < S::kRows; ++r) {
    A x[S::kColumns], dy[S::kOutputs];
    widen_again<S>(slice.x[r], x);
#pragma unroll
    for (int o = 0; o < S::kOutputs; ++o) {
      const A residual = mse_residual(product[r][o], bias[o], widen(slice.target[r][o]));
      const A there = r * step < left && o < O ? residual : A(0);
      dy[o] = mse_dy(there, dy_scale);
      loss += mse_term(there);
      dbias[o] += dy[o];
#pragma unroll
      for (int e = 0; e < S::kColumns; ++e) sums.dweight[o][e] += dy[o] * x[e];
    }
    typename S::X* const dx = dx_row(r);
    if (dx != nullptr && r * step < left) write_dx<S>(dy, w, lane, I, dx);
  }
  sums.loss += static_cast<double>(loss);
#pragma unroll
  for (int o = 0; o < S::kOutputs; ++o) sums.dbias[o] += static_cast<double>(dbias[o]);
}

// The sums of a block's warps, on their way from registers to where they are added.
template <typename S, int kWarps>
struct WarpSums {
  typename S::A dweight[kWarps][S::kOutputs * S::kColumns * kWarp];
  double rest[kWarps][1 + S::kOutputs];  // loss, dbias
};

template <typename T>
__device__ __forceinline__ T sum_teams(T value, int lanes) {
  for (int offset = lanes; offset < kWarp; offset *= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

// Adds the teams of each warp and leaves the warps' sums in shared memory. A barrier must follow
// before they are read.
template <typename S, int kWarps>
__device__ __forceinline__ void leave_sums(const Sums<S>& sums, Lane lane,
                                           WarpSums<S, kWarps>& to) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const bool first_team = static_cast<int>(threadIdx.x) % kWarp < lane.lanes;
#pragma unroll
  for (int o = 0; o < S::kOutputs; ++o) {
#pragma unroll
    for (int e = 0; e < S::kColumns; ++e) {
      const typename S::A sum = sum_teams(sums.dweight[o][e], lane.lanes);
      const int i = lane.column<S>(e / S::kV) + e % S::kV;
      if (first_team) to.dweight[warp][o * S::kColumns * lane.lanes + i] = sum;
    }
  }
  const bool first_lane = threadIdx.x % kWarp == 0;
  const double loss = sum_teams(sums.loss, lane.lanes);
  if (first_lane) to.rest[warp][0] = loss;
#pragma unroll
  for (int o = 0; o < S::kOutputs; ++o) {
    const double dbias = sum_teams(sums.dbias[o], lane.lanes);
    if (first_lane) to.rest[warp][1 + o] = dbias;
  }
}

// The block's sum of dW[o][i], and of loss (k = 0) and dbias (k = 1 + o): warps in order.
template <typename S, int kWarps>
__device__ __forceinline__ typename S::A dweight_of(const WarpSums<S, kWarps>& from, Lane lane,
                                                    int o, int i) {
  typename S::A sum = from.dweight[0][o * S::kColumns * lane.lanes + i];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) {
    sum += from.dweight[warp][o * S::kColumns * lane.lanes + i];
  }
  return sum;
}
template <typename S, int kWarps>
__device__ __forceinline__ double rest_of(const WarpSums<S, kWarps>& from, int k) {
  double sum = from.rest[0][k];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) sum += from.rest[warp][k];
  return sum;
}

}  // namespace fused_step::cuda
