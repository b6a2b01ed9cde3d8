// SPDX-License-Identifier: MIT
// One-pass on the units that multiply matrices: x, W and target of one 16-bit type, more outputs
// than the other kernels' registers hold. A warp has 8 rows of x at a time in shared memory, all
// its columns of W and dW in registers, and takes the rows twice: y^T = W x^T, then dW^T = x^T dy.
//
// The products' own layout does what other kernels do by shuffles: of y^T a lane holds an output of
// two adjacent rows, and just these two make a word of dy as the second product wants it.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/mse_math.h"
#include "cuda/one_pass.cuh"

namespace fused_step::cuda {

// What a warp holds: kTiles times 8 outputs, kColumns columns of x, W and dW.
template <typename X_, int kTiles_, bool kDx_>
struct MmaPart {
  using X = X_;
  static constexpr int kTiles = kTiles_;
  static constexpr bool kDx = kDx_;  // dx is written
  static constexpr int kColumns = mma_warp_columns(kTiles, kDx);
  static constexpr int kSpans = kColumns / 32;  // what one load_matrices() brings
  // Columns in groups of so many spans: a warp without columns in one leaves it out.
  static constexpr int kGroup = kTiles == 4 ? 1 : 2;
  static constexpr int64_t kTeamSums = mma_team_sums(kTiles, kColumns);
  static constexpr int kQuads = kTiles * kSpans;                   // of words of W
  static constexpr int kStageBytes = mma_ring_bytes(kColumns, 1);  // of all warps
};

// Up to 8 rows of a matrix, from a warp's first column on.
template <typename X>
struct MmaRows {
  const X* first;
  int64_t stride;
  int rows;     // that are there, or less than 1
  int columns;  // likewise
};

// A warp's stages in shared memory, into which nobody else looks: 8 rows of kColumns each. Rows
// come in the order in which they are started, and each has its own stage until it has been read.
template <typename S>
class MmaRing {
 public:
  using X = typename S::X;
  static constexpr int kRowWords = S::kColumns / 8;

  // `columns`: that the warp has, or less than 1. `vectors`: all rows begin and end at multiples of
  // 16 bytes.
  __device__ __forceinline__ MmaRing(unsigned char* shared, int columns, bool vectors)
      : ring_(reinterpret_cast<uint4*>(shared)), vectors_(vectors) {
    while (kRowWords >> word_bits_ > 1 && 8 << word_bits_ < columns) ++word_bits_;
  }

  // Starts to copy into a stage, one group. What is not there is zero, as far as it is read: times
  // a zero of dy or W it must be no NaN.
  __device__ __forceinline__ void start(int stage, const MmaRows<X>& from) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    // Unrolled, its addresses would take the registers that dW is to have.
#pragma unroll 1
    for (int k = lane; k < kMmaRows << word_bits_; k += kWarp) {
      const int row = k >> word_bits_, word = k - (row << word_bits_);
      uint4* const to = place(stage, row, word);
      const X* const source = from.first + row * from.stride + 8 * word;
      const int left = row < from.rows ? from.columns - 8 * word : 0;
      if (vectors_) {
        if (left > 0) {  // at least 8
          copy_async<16>(to, source);
        } else {
          *to = uint4{};
        }
      } else {
        X elements[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) elements[j] = j < left ? source[j] : X{};
        *to = pack<X, 8>(elements);
      }
    }
    copy_async_commit();
  }

  // Until at most `pending` of the stages started last, up to 2, are under way.
  __device__ __forceinline__ void wait(int pending) const {
    if (pending == 2) {
      copy_async_wait<2>();
    } else if (pending == 1) {
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncwarp();  // what the other lanes have copied, too
  }

  // Span `k` of 32 columns of a stage: four matrices of 8 columns.
  template <bool kTransposed>
  __device__ __forceinline__ void read(int stage, int k, unsigned (&to)[4]) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int row = lane % kMmaRows, word = lane / kMmaRows;
    // place() of word 4 k, with few addresses for all of the spans.
    load_matrices<kTransposed>(to, place(stage, row, word ^ 4 * (k % 2)) + 8 * (k / 2));
  }

  // Where an element of a stage lies.
  __device__ __forceinline__ X* element(int stage, int row, int column) const {
    return reinterpret_cast<X*>(place(stage, row, column / 8)) + column % 8;
  }

  // Copies a stage's rows to memory, as far as they are there.
  __device__ __forceinline__ void write(int stage, X* first, const MmaRows<X>& extent) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll 1
    for (int k = lane; k < kMmaRows << word_bits_; k += kWarp) {
      const int row = k >> word_bits_, word = k - (row << word_bits_);
      const int left = row < extent.rows ? extent.columns - 8 * word : 0;
      X* const to = first + row * extent.stride + 8 * word;
      if (vectors_) {
        if (left > 0) *reinterpret_cast<uint4*>(to) = *place(stage, row, word);
      } else {
        X elements[8];
        unpack<X, 8>(*place(stage, row, word), elements);
        for (int j = 0; j < 8; ++j) {
          if (j < left) to[j] = elements[j];
        }
      }
    }
  }

 private:
  // 8 rows begin in the same bank: word w of row r lies in the place of w ^ r, so that a matrix is
  // read from all banks at once.
  __device__ __forceinline__ uint4* place(int stage, int row, int word) const {
    return ring_ + (stage * kMmaRows + row) * kRowWords + (word ^ row);
  }

  uint4* ring_;
  bool vectors_;
  // Of as many words a row is copied: a power of two, a group of spans at least.
  int word_bits_ = S::kGroup == 1 ? 2 : 3;
};

// Of W the lane's word of 8 outputs and matrix `m` of span `k`, in a factor of 16 rows. More than 8
// outputs fill them. Up to 8 stand there twice, in a span's even and in its odd matrices.
template <typename S, typename W>
__device__ __forceinline__ auto& mma_weight(W& w, int tile, int k, int m) {
  return S::kTiles == 1 ? w[k][m] : w[(tile / 2 * S::kSpans + k) * 2 + m / 2][m % 2 * 2 + tile % 2];
}

// A warp's columns of W[O, I] as the first factor of y^T, by way of the ring's first stage; zero
// where there are none.
template <typename S>
__device__ __forceinline__ void read_mma_weight(MmaRing<S>& ring, MmaRows<typename S::X> weight,
                                                unsigned (&w)[S::kQuads][4]) {
#pragma unroll
  for (int tile = 0; tile < S::kTiles; ++tile) {
    __syncwarp();  // the last tile has been read
    ring.start(0, weight);
    ring.wait(0);
#pragma unroll
    for (int k = 0; k < S::kSpans; ++k) {
      unsigned words[4];
      ring.template read<false>(0, k, words);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        mma_weight<S>(w, tile, k, m) = words[m];
      }
    }
    weight.first += kMmaOutputs * weight.stride;
    weight.rows -= kMmaOutputs;
  }
  __syncwarp();
}

// A team's warps share the outputs out where they make dy: number j of a warp's tiles, of which
// only those below kTiles are there. A warp alone has them all.
__device__ __forceinline__ int mma_tile(int j, int team) {
  unsigned thread = threadIdx.x;
  forget(thread);  // a step's registers are full
  return j * team + (static_cast<int>(thread) / kWarp & (team - 1));
}

// The targets of a lane's part of y in its warp's tiles, as multiply_rows() has it.
template <typename S>
__device__ __forceinline__ void read_mma_target(const MmaRows<typename S::X>& from, int team,
                                                typename S::X (&target)[S::kTiles][2]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < S::kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = 2 * t + e, o = kMmaOutputs * mma_tile(j, team) + g;
      const bool is_there = row < from.rows && o < from.columns;
      target[j][e] = is_there ? from.first[row * from.stride + o] : typename S::X{};
    }
  }
}

// What read_mma_target() is to find in L2.
template <typename X>
__device__ __forceinline__ void prefetch_mma_target(const MmaRows<X>& from) {
  constexpr int kSector = 32 / static_cast<int>(sizeof(X));
  unsigned thread = threadIdx.x;
  forget(thread);  // a step's registers are full
  const int lane = static_cast<int>(thread) % kWarp, row = lane % kMmaRows;
  const int o = lane / kMmaRows * kSector;
  if (row < from.rows && o < from.columns) prefetch(from.first + row * from.stride + o);
}

// y of a stage's rows over a warp's columns: y[tile][e] is that of output 8 tile + g and row 2 t +
// e, in lane 4 g + t.
template <typename S>
__device__ __forceinline__ void multiply_rows(const MmaRing<S>& ring, int stage,
                                              const unsigned (&w)[S::kQuads][4], int columns,
                                              float (&y)[S::kTiles][2]) {
  constexpr int kHeights = S::kTiles == 1 ? 1 : S::kTiles / 2;
  // Two sums in turn: each product waits some 30 cycles for the one that it adds to.
  float sums[kHeights][2][4] = {};
#pragma unroll
  for (int k = 0; k < S::kSpans; ++k) {
    if (k % S::kGroup == 0 && 32 * k >= columns) break;
    unsigned x[4];
    ring.template read<false>(stage, k, x);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (S::kTiles == 1) {
        // Even matrices, then odd ones: of each product one half of the rows counts.
        const unsigned of_x[2] = {x[half], x[2 + half]};
        multiply_add<typename S::X>(sums[0][half], w[k], of_x);
      } else {
        const unsigned of_x[2] = {x[2 * half], x[2 * half + 1]};
#pragma unroll
        for (int h = 0; h < kHeights; ++h) {
          multiply_add<typename S::X>(sums[h][half], w[(h * S::kSpans + k) * 2 + half], of_x);
        }
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < S::kTiles; ++tile) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int at = 2 * (tile % 2) + e;
      y[tile][e] = sums[tile / 2][0][at] + sums[tile / 2][1][S::kTiles == 1 ? 2 + e : at];
    }
  }
}

// What the warps of a team pass each other: y of each, then dy of the team. Between two uses of
// either lies a barrier for the other.
template <typename S>
struct MmaExchange {
  float2 y[kMmaWarps][S::kTiles][kWarp];
  uint2 dy[kMmaWarps / 2][S::kTiles][kWarp];  // of each team
};

// dy of two adjacent rows as words of X: the value rounded, then what that left out. Together they
// have 16 bits or more of it, where the plain loop's dy has the 8 or 11 of X. As the second factor
// of a product they stand one below the other, and the first factor is there twice.
template <typename X>
struct SplitPair {
  unsigned words[2];

  SplitPair() = default;
  __device__ __forceinline__ explicit SplitPair(uint2 both) : words{both.x, both.y} {}
  __device__ __forceinline__ explicit SplitPair(const float (&value)[2]) {
    X rounded[2], rest[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      // Beyond the largest number of X the rest takes over, and is infinite when that is too much.
      const float within = fminf(fmaxf(value[e], -kLargest), kLargest);
      rounded[e] = narrow<X>(within);
      rest[e] = narrow<X>(value[e] - widen(rounded[e]));
    }
    words[0] = pack<X, 2>(rounded);
    words[1] = pack<X, 2>(rest);
  }

 private:
  static constexpr float kLargest = kIsFloat16<X> ? 65504.0f : 0x1.fep127f;
};

// dW^T of a warp's columns: adds x^T dy of a stage's rows. Number e of dweight[tile][k] is that of
// column 16 k + g + 8 (e / 2) and output 8 tile + 2 t + e % 2.
template <typename S>
__device__ __forceinline__ void add_mma_dweight(const MmaRing<S>& ring, int stage,
                                                const SplitPair<typename S::X> (&dy)[S::kTiles],
                                                int columns,
                                                float (&dweight)[S::kTiles][2 * S::kSpans][4]) {
#pragma unroll
  for (int k = 0; k < S::kSpans; ++k) {
    if (k % S::kGroup == 0 && 32 * k >= columns) break;
    unsigned x[4];
    ring.template read<true>(stage, k, x);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned of_x[4] = {x[2 * half], x[2 * half + 1], x[2 * half], x[2 * half + 1]};
#pragma unroll
      for (int tile = 0; tile < S::kTiles; ++tile) {
        multiply_add<typename S::X>(dweight[tile][2 * k + half], of_x, dy[tile].words);
      }
    }
  }
}

// dx^T = W^T dy^T of a stage's rows and a warp's columns, times `scale`, in the place of x.
template <typename S>
__device__ __forceinline__ void replace_by_dx(const MmaRing<S>& ring, int stage,
                                              const unsigned (&w)[S::kQuads][4],
                                              const SplitPair<typename S::X> (&dy)[S::kTiles],
                                              float scale, int columns) {
  using X = typename S::X;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  unsigned of_dy[S::kTiles][2];
#pragma unroll
  for (int tile = 0; tile < S::kTiles; ++tile) {
#pragma unroll
    for (int e = 0; e < 2; ++e) of_dy[tile][e] = transposed(dy[tile].words[e]);
  }
  __syncwarp();  // every lane has read x
#pragma unroll
  for (int k = 0; k < S::kSpans; ++k) {
    if (k % S::kGroup == 0 && 32 * k >= columns) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum[4] = {};
#pragma unroll
      for (int tile = 0; tile < S::kTiles; ++tile) {
        const unsigned even = transposed(mma_weight<S>(w, tile, k, 2 * half)),
                       odd = transposed(mma_weight<S>(w, tile, k, 2 * half + 1));
        const unsigned of_w[4] = {even, odd, even, odd};
        multiply_add<X>(sum, of_w, of_dy[tile]);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        *ring.element(stage, 2 * t + e % 2, 32 * k + 16 * half + 8 * (e / 2) + g) =
            narrow<X>(sum[e] * scale);
      }
    }
  }
  __syncwarp();
}

// Adds dW of all teams into the first team's, halving the teams each time, by way of shared memory:
// kMmaWarps / 2 warps' dW at most.
template <typename S>
__device__ __forceinline__ void add_teams(float (&dweight)[S::kTiles][2 * S::kSpans][4],
                                          float* shared, int warp, int team) {
  constexpr int kNumbers = S::kTiles * 2 * S::kSpans * 4;
  static_assert(kNumbers * kWarp * sizeof(float) * kMmaWarps / 2 == S::kTeamSums);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int warps = kMmaWarps / 2; warps >= team; warps /= 2) {
    __syncthreads();  // what lay here has been read
    float* const place = shared + warp % warps * kNumbers * kWarp + lane;
    const auto number = [&](int n) -> float& {
      return dweight[n / 4 / (2 * S::kSpans)][n / 4 % (2 * S::kSpans)][n % 4];
    };
    if (warp >= warps && warp < 2 * warps) {
#pragma unroll
      for (int n = 0; n < kNumbers; ++n) place[n * kWarp] = number(n);
    }
    __syncthreads();
    if (warp < warps) {
#pragma unroll
      for (int n = 0; n < kNumbers; ++n) number(n) += place[n * kWarp];
    }
  }
}

// Contract as one_pass_rows_kernel; `team` warps share a row, a power of two with
// team * S::kColumns >= I, and rows come through `stages` stages, 1 to 3.
template <typename S>
__global__ void __launch_bounds__(kMmaThreads, 1)
    one_pass_mma_kernel(const __grid_constant__ OnePassArgs<typename S::X, typename S::X> a,
                        const int team, const int stages, const bool vectors) {
  using X = typename S::X;
  // float16 would lose small dy, where the mean is over many: its r is used, and scaled at the end.
  constexpr bool kScalesLast = kIsFloat16<X>;
  FUSED_STEP_DYNAMIC_SHARED(all_shared);
  // Of each lane: loss, dbias of its warp's tiles. Lanes 4 g to 4 g + 3 have their share of the
  // same outputs.
  using LaneSums = double[1 + S::kTiles][kMmaThreads];
  LaneSums& sums = *reinterpret_cast<LaneSums*>(all_shared);
  unsigned char* const shared = all_shared + sizeof(LaneSums);
  const int I = static_cast<int>(a.shape.I), O = static_cast<int>(a.shape.O);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp, lane = thread % kWarp, g = lane / 4, t = lane % 4;
  const int teams = kMmaWarps / team, my_team = warp / team;
  const bool is_first = warp % team == 0;
  const int first_column = warp % team * S::kColumns, columns = I - first_column;

  MmaRing<S> ring(shared + warp * stages * (S::kStageBytes / kMmaWarps), columns, vectors);
  unsigned w[S::kQuads][4];
  read_mma_weight<S>(ring, {a.weight + first_column, I, O, columns}, w);
  float dweight[S::kTiles][2 * S::kSpans][4] = {};
#pragma unroll
  for (int k = 0; k < 1 + S::kTiles; ++k) sums[k][thread] = 0.0;

  // A team's rows are adjacent, the teams' follow each other.
  const int rows = rows_in_chunk(a), step_rows = teams * kMmaRows;
  int row = my_team * kMmaRows;
  const auto rows_at = [&](int first) -> MmaRows<X> {
    return {a.batch.x + (blockIdx.x * a.chunks.rows + first) * a.batch.x_stride + first_column,
            a.batch.x_stride, rows - first, columns};
  };
  const auto target_at = [&](int first) -> MmaRows<X> {
    return {a.batch.target + (blockIdx.x * a.chunks.rows + first) * a.batch.target_stride,
            a.batch.target_stride, rows - first, O};
  };
  const auto start = [&](int stage, int first) {
    ring.start(stage, rows_at(first));
    if (is_first) prefetch_mma_target(target_at(first));
  };
  for (int k = 0; k < stages; ++k) start(k, row + k * step_rows);
  int stage = 0;
  // Without rows a mean's scale is infinite, and dW is zero all the same.
  const auto last_scale = [&] { return kScalesLast && rows > 0 ? a.dy_scale : 1.0f; };
  // Whole steps of the block: a team without rows has zeros.
  for (int step = 0; step * step_rows < rows; ++step) {
    X target[S::kTiles][2];
    read_mma_target<S>(target_at(row), team, target);
    ring.wait(stages - 1);
    float y[S::kTiles][2];
    multiply_rows<S>(ring, stage, w, columns, y);
    // Behind the ring.
    auto& exchange = *reinterpret_cast<MmaExchange<S>*>(shared + stages * S::kStageBytes);
    if (team > 1) {
#pragma unroll
      for (int tile = 0; tile < S::kTiles; ++tile) {
        exchange.y[warp][tile][lane] = make_float2(y[tile][0], y[tile][1]);
      }
      __syncthreads();
    }
    SplitPair<X> dy[S::kTiles];
    float loss = 0.0f;
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j) {
      const int tile = mma_tile(j, team), o = kMmaOutputs * tile + g;
      if (tile >= S::kTiles) break;
      if (team > 1) {
        y[j][0] = y[j][1] = 0.0f;
        for (int k = 0; k < team; ++k) {
          const float2 part = exchange.y[my_team * team + k][tile][lane];
          y[j][0] += part.x;
          y[j][1] += part.y;
        }
      }
      // Read anew with each step: in registers it would be the one too many.
      const float bias = a.bias != nullptr && o < O ? widen(a.bias[o]) : 0.0f;
      float passed_on[2], dbias = 0.0f;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float residual = mse_residual(y[j][e], bias, widen(target[j][e]));
        const bool is_there = row + 2 * t + e < rows && o < O;
        const float there = is_there ? residual : 0.0f, scaled = mse_dy(there, a.dy_scale);
        loss += mse_term(there);
        dbias += scaled;
        passed_on[e] = kScalesLast ? there : scaled;
      }
      sums[1 + j][thread] += static_cast<double>(dbias);
      dy[j] = SplitPair<X>(passed_on);
      if (team > 1) exchange.dy[my_team][tile][lane] = uint2{dy[j].words[0], dy[j].words[1]};
    }
    sums[0][thread] += static_cast<double>(loss);
    if (team > 1) {
      __syncthreads();
#pragma unroll
      for (int tile = 0; tile < S::kTiles; ++tile) {
        dy[tile] = SplitPair<X>(exchange.dy[my_team][tile][lane]);
      }
    }
    add_mma_dweight<S>(ring, stage, dy, columns, dweight);
    if constexpr (S::kDx) {
      replace_by_dx<S>(ring, stage, w, dy, last_scale(), columns);
      ring.write(stage, dx_of(a, row) + first_column, {nullptr, I, rows - row, columns});
    }
    __syncwarp();  // every lane has read: the stage is free
    start(stage, row + stages * step_rows);
    row += step_rows;
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
  ring.wait(0);

  add_teams<S>(dweight, reinterpret_cast<float*>(shared), warp, team);
  const Partials<float> partials = partials_of(a);
  float* const out = partials.dweight(blockIdx.x);
#pragma unroll
  for (int tile = 0; tile < S::kTiles; ++tile) {
#pragma unroll
    for (int k = 0; k < 2 * S::kSpans; ++k) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int o = kMmaOutputs * tile + 2 * t + e % 2;
        const int i = first_column + 16 * k + g + 8 * (e / 2);
        const float value = dweight[tile][k][e];
        if (my_team == 0 && o < O && i < I) out[o * I + i] = value * last_scale();
      }
    }
  }
  sums[0][thread] = sum_teams(sums[0][thread], 1);
#pragma unroll
  for (int tile = 0; tile < S::kTiles; ++tile) {
    double dbias = sums[1 + tile][thread];
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      dbias += __shfl_xor_sync(kAllLanes, dbias, lanes);
    }
    sums[1 + tile][thread] = dbias;
  }
  __syncthreads();
  if (thread <= O) {
    const int o = thread - 1, tile = o / kMmaOutputs;
    const int owner = tile % team;  // of a team's warps
    const double* const from =
        thread == 0 ? sums[0] : sums[1 + tile / team] + owner * kWarp + 4 * (o % kMmaOutputs);
    double sum = 0.0;
    for (int k = 0; k < kMmaWarps; k += thread == 0 ? 1 : team) sum += from[k * kWarp];
    partials.sums(blockIdx.x)[thread] = sum;
  }
  finish_one_pass(a);
}

}  // namespace fused_step::cuda
