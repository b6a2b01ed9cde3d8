// SPDX-License-Identifier: MIT
// One-pass for wide rows: a block has one row at a time, or a few, and each thread its columns of
// x, W and dW.
#pragma once

#include <cstdint>

#include "cuda/one_pass.cuh"

namespace fused_step::cuda {

// Adds kCount values over the lanes of a warp; a lane returns the sum of value lane / (32 /
// kCount). Each exchange halves what a lane holds: kCount - 1 + log2(32 / kCount) shuffles, not 5 *
// kCount.
template <int kCount, typename A>
__device__ __forceinline__ A sum_lanes(A (&value)[kCount], int lane) {
  static_assert(kCount <= kWarp && (kCount & (kCount - 1)) == 0);
  constexpr int kHalvings = kCount == 1    ? 0
                            : kCount == 2  ? 1
                            : kCount == 4  ? 2
                            : kCount == 8  ? 3
                            : kCount == 16 ? 4
                                           : 5;
#pragma unroll
  for (int step = 0; step < kHalvings; ++step) {
    const int n = kCount >> (step + 1), offset = kWarp >> (step + 1);
    const bool upper = (lane & offset) != 0;
#pragma unroll
    for (int k = 0; k < kCount / 2; ++k) {
      if (k >= n) break;
      const A kept = upper ? value[n + k] : value[k], given = upper ? value[k] : value[n + k];
      value[k] = kept + __shfl_xor_sync(kAllLanes, given, offset);
    }
  }
#pragma unroll
  for (int step = kHalvings; step < 5; ++step) {
    value[0] += __shfl_xor_sync(kAllLanes, value[0], kWarp >> (step + 1));
  }
  return value[0];
}

// Rows of x through shared memory. A thread copies what it will use itself, so that its own wait
// makes the bytes visible to it: the ring needs no barrier for that.
template <typename S>
class RingFeed {
 public:
  using X = typename S::X;
  using WordX = Word<X, S::kV>;
  static constexpr int kBlocks = wide_blocks(S::kOutputs, sizeof(X));
  static constexpr int64_t shared_bytes(int threads) {
    return int64_t{kWideStages} * S::kRows * S::kVecs * threads *
           static_cast<int64_t>(sizeof(WordX));
  }

  // Starts the first kWideStages - 1 steps on their way.
  __device__ __forceinline__ RingFeed(unsigned char* shared, const RowSet<X, typename S::P>& rows,
                                      Lane lane, int I)
      : ring_(reinterpret_cast<WordX*>(shared)), ahead_(rows), lane_(lane), I_(I) {
#pragma unroll
    for (int stage = 0; stage + 1 < kWideStages; ++stage) start();
  }

  // The rows of this step, of which `left` are there, and starts those kWideStages - 1 steps
  // further on. Between two calls must lie a barrier: the stage that is filled was read before it.
  __device__ __forceinline__ void read(int left, WordX (&x)[S::kRows][S::kVecs]) {
    copy_async_wait<kWideStages - 2>();
#pragma unroll
    for (int r = 0; r < S::kRows; ++r) {
#pragma unroll
      for (int v = 0; v < S::kVecs; ++v) {
        x[r][v] = WordX{};
        if (r < left && lane_.column<S>(v) < I_) x[r][v] = *slot(reading_, r, v);
      }
    }
    reading_ = after(reading_);
    start();
  }

  __device__ __forceinline__ void drain() { copy_async_wait<0>(); }

 private:
  __device__ __forceinline__ static int after(int stage) {
    return stage + 1 == kWideStages ? 0 : stage + 1;
  }
  __device__ __forceinline__ WordX* slot(int stage, int r, int v) const {
    return ring_ + ((stage * S::kRows + r) * S::kVecs + v) * lane_.lanes + lane_.lane;
  }
  // A group of copies, empty beyond the last row, so that counting groups counts steps.
  __device__ __forceinline__ void start() {
#pragma unroll
    for (int r = 0; r < S::kRows; ++r) {
      const X* const row = ahead_.x + r * ahead_.x_step;
      const bool has_row = ahead_.has(r);
#pragma unroll
      for (int v = 0; v < S::kVecs; ++v) {
        const int i = lane_.column<S>(v);
        if (has_row && i < I_) {
          copy_async<static_cast<int>(sizeof(WordX))>(slot(filling_, r, v), row + i);
        }
      }
    }
    copy_async_commit();
    ahead_.advance(S::kRows);
    filling_ = after(filling_);
  }

  WordX* ring_;
  RowSet<X, typename S::P> ahead_;
  Lane lane_;
  int I_;
  int reading_ = 0;
  int filling_ = 0;
};

// The same through registers, one step ahead: for rows that no vector access fits.
template <typename S>
class RegisterFeed {
 public:
  using X = typename S::X;
  using WordX = Word<X, S::kV>;
  static constexpr int kBlocks = 1;  // more would spill
  static constexpr int64_t shared_bytes(int) { return 0; }

  __device__ __forceinline__ RegisterFeed(unsigned char*, const RowSet<X, typename S::P>& rows,
                                          Lane lane, int I)
      : ahead_(rows), lane_(lane), I_(I) {
    read_x<S>(ahead_, lane_, I_, next_);
  }
  __device__ __forceinline__ void read(int, WordX (&x)[S::kRows][S::kVecs]) {
#pragma unroll
    for (int r = 0; r < S::kRows; ++r) {
#pragma unroll
      for (int v = 0; v < S::kVecs; ++v) x[r][v] = next_[r][v];
    }
    ahead_.advance(S::kRows);
    read_x<S>(ahead_, lane_, I_, next_);
  }
  __device__ __forceinline__ void drain() {}

 private:
  RowSet<X, typename S::P> ahead_;
  Lane lane_;
  int I_;
  WordX next_[S::kRows][S::kVecs];
};

// Contract as one_pass_rows_kernel; of as many threads as S::kColumns columns each take for a row,
// whole warps, at most kWideThreads.
template <typename S, typename Feed>
__global__ void __launch_bounds__(kWideThreads, Feed::kBlocks)
    one_pass_wide_kernel(const __grid_constant__ OnePassArgs<typename S::X, typename S::P> a) {
  constexpr int kWarps = kWideThreads / kWarp;
  // Products of the rows at hand; lane k / kLanesPerSum of each warp sees to number k.
  constexpr int kSums = S::kRows * S::kOutputs, kLanesPerSum = kWarp / kSums;
  using A = typename S::A;
  using X = typename S::X;
  __shared__ A products[2][kWarps][kSums];
  __shared__ double rest[kSums][2];
  FUSED_STEP_DYNAMIC_SHARED(ring);
  const int I = static_cast<int>(a.shape.I), O = static_cast<int>(a.shape.O);
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x), warps = threads / kWarp;
  const int in_warp = thread % kWarp, warp = thread / kWarp;
  const Lane lane{thread, threads};
  const int my_sum = in_warp / kLanesPerSum;
  const int my_row = my_sum / S::kOutputs, my_output = my_sum % S::kOutputs;
  const bool has_output = my_output < O;

  A w[S::kOutputs][S::kColumns], dweight[S::kOutputs][S::kColumns] = {};
  read_weight<S>([&](int k) { return widen(a.weight[k]); }, lane, I, O, w);
  const A bias = a.bias != nullptr && has_output ? widen(a.bias[my_output]) : A(0);
  double loss = 0.0, dbias = 0.0;

  RowSet<X, typename S::P> rows = chunk_rows(a, 0, 1);
  const int steps = (rows.left + S::kRows - 1) / S::kRows;
  const auto read_target = [&] {
    return rows.has(my_row) && has_output ? rows.target[my_row * rows.target_step + my_output]
                                          : typename S::P{};
  };
  Feed feed(ring, rows, lane, I);
  typename S::P next_target = read_target();
  for (int step = 0; step < steps; ++step) {
    const int left = rows.left;
    const A target = static_cast<A>(widen(next_target));
    rows.advance(S::kRows);
    next_target = read_target();
    Word<X, S::kV> stored[S::kRows][S::kVecs];
    feed.read(left, stored);

    A product[kSums];
#pragma unroll
    for (int r = 0; r < S::kRows; ++r) {
      A x[S::kColumns];
      widen_row<S>(stored[r], x);
#pragma unroll
      for (int o = 0; o < S::kOutputs; ++o) {
        product[r * S::kOutputs + o] = lane_product<S>(x, w[o]);
      }
    }
    // Two buffers in turn: who writes one has passed the barrier after which it was last read.
    A(&shared)[kWarps][kSums] = products[step % 2];
    const A warp_product = sum_lanes<kSums>(product, in_warp);
    if (in_warp % kLanesPerSum == 0) shared[warp][my_sum] = warp_product;
    __syncthreads();

    // Every warp adds the warps' products by itself, which saves a second barrier.
    A sum = shared[0][my_sum];
#pragma unroll
    for (int k = 1; k < kWarps; ++k) {
      if (k < warps) sum += shared[k][my_sum];
    }
    const A residual = mse_residual(sum, bias, target);
    const A there = my_row < left && has_output ? residual : A(0);
    const A my_dy = mse_dy(there, a.dy_scale);
    loss += static_cast<double>(mse_term(there));
    dbias += static_cast<double>(my_dy);
#pragma unroll
    for (int r = 0; r < S::kRows; ++r) {
      A x[S::kColumns], dy[S::kOutputs];
      widen_again<S>(stored[r], x);
#pragma unroll
      for (int o = 0; o < S::kOutputs; ++o) {
        dy[o] = __shfl_sync(kAllLanes, my_dy, (r * S::kOutputs + o) * kLanesPerSum);
#pragma unroll
        for (int e = 0; e < S::kColumns; ++e) dweight[o][e] += dy[o] * x[e];
      }
      X* const dx = dx_of(a, step * S::kRows + r);
      if (dx != nullptr && r < left) write_dx<S>(dy, w, lane, I, dx);
    }
  }
  feed.drain();

  const Partials<A> partials = partials_of(a);
  A* const out = partials.dweight(blockIdx.x);
#pragma unroll
  for (int o = 0; o < S::kOutputs; ++o) {
#pragma unroll
    for (int e = 0; e < S::kColumns; ++e) {
      const int i = lane.column<S>(e / S::kV) + e % S::kV;
      if (o < O && i < I) out[o * I + i] = dweight[o][e];
    }
  }
  // All warps have the same sums of loss and bias: the first hands them on.
  if (warp == 0 && in_warp % kLanesPerSum == 0) {
    rest[my_sum][0] = loss;
    rest[my_sum][1] = dbias;
  }
  __syncthreads();
  if (thread <= O) {
    double sum = 0.0;
    for (int k = 0; k < kSums; ++k) {
      if (thread == 0) {
        sum += rest[k][0];
      } else if (k % S::kOutputs == thread - 1) {
        sum += rest[k][1];
      }
    }
    partials.sums(blockIdx.x)[thread] = sum;
  }
  finish_one_pass(a);
}

}  // namespace fused_step::cuda
