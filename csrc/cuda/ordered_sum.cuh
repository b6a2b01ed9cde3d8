// SPDX-License-Identifier: MIT
// Sums over blocks in a fixed order, in the launch that makes them: the last block of a group adds
// the group's partial sums, the last group's adds the groups'. No block waits for another, so any
// number of them may run at a time. Or, in the same order, by a launch of its own.
#pragma once

#include <cstdint>

#include "cuda/policy.h"
#include "cuda/vector.cuh"

namespace fused_step::cuda {

// True in all threads of the last of `count` blocks to arrive, which then sees what each of them
// wrote before. The ticket goes back to zero by itself. Called by all threads of a block.
__device__ __forceinline__ bool arrives_last(unsigned* ticket, int64_t count) {
  __shared__ bool last;
  __syncthreads();  // everything the block wrote lies before this
  if (threadIdx.x == 0) {
    __threadfence();  // and, being cumulative, is released here
    last = atomicInc(ticket, static_cast<unsigned>(count - 1)) == static_cast<unsigned>(count - 1);
    if (last) __threadfence();  // what others released is acquired
  }
  __syncthreads();
  return last;
}

// The sum of the values of a block's threads, in all of them. `shared`: [kThreads], a power of two.
template <int kThreads>
__device__ __forceinline__ double sum_block(double value, double* shared) {
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) shared[thread] += shared[thread + half];
    __syncthreads();
  }
  return shared[0];
}

// Adds to `total` what lies at at(0), at(1), ..., at(count - 1), in this order, each kV elements
// that other blocks have written. kAtOnce loads are on their way at once, whatever the count: one
// after the other each would take its 600 cycles.
template <int kAtOnce, typename A, int kV, typename At>
__device__ __forceinline__ void add_in_order(int64_t count, const At& at, A (&total)[kV]) {
#pragma unroll 1
  for (int64_t c = 0; c < count; c += kAtOnce) {
    A part[kAtOnce][kV];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (c + u < count) load_written<A, kV>(at(c + u), part[u]);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (c + u >= count) break;
#pragma unroll
      for (int j = 0; j < kV; ++j) total[j] += part[u][j];
    }
  }
}

// The partial sums of chunks, in a workspace aligned to 16.
template <typename A>
struct Partials {
  unsigned char* workspace;
  int64_t bytes;       // partial_bytes
  int64_t dweight_at;  // partial_dweight_at
  int O;
  int n;  // O * I

  // [1 + O] loss, dbias
  __device__ __forceinline__ double* sums(int64_t chunk) const {
    return reinterpret_cast<double*>(workspace + chunk * bytes);
  }
  // [O, I], and what fills the last vector
  __device__ __forceinline__ A* dweight(int64_t chunk) const {
    return reinterpret_cast<A*>(workspace + chunk * bytes + dweight_at);
  }
};

// Calls use(k, sums) for vectors of the elements of dW from k on: `count` chunks, `stride` apart,
// added in order.
template <typename A, typename Use>
__device__ __forceinline__ void add_dweights(const Partials<A>& p, int64_t first, int64_t stride,
                                             int64_t count, const Use& use) {
  constexpr int kV = static_cast<int>(kVectorBytes / sizeof(A));
  for (int k = static_cast<int>(threadIdx.x) * kV; k < p.n;
       k += static_cast<int>(blockDim.x) * kV) {
    A total[kV] = {};
    add_in_order<8>(count, [&](int64_t c) { return p.dweight(first + c * stride) + k; }, total);
    use(k, total);
  }
}

// Calls use(k, sum) for the 1 + O sums of loss and bias.
template <typename A, typename Use>
__device__ __forceinline__ void add_sums(const Partials<A>& p, int64_t first, int64_t stride,
                                         int64_t count, const Use& use) {
  const int k = static_cast<int>(threadIdx.x);
  if (k > p.O) return;
  double total[1] = {};
  add_in_order<8>(count, [&](int64_t c) { return p.sums(first + c * stride) + k; }, total);
  use(k, total[0]);
}

// After a block has written the partial sums of its chunk: true in the one block that is to finish.
// The sums of the groups then lie in the place of each group's first chunk.
template <typename A>
__device__ __forceinline__ bool finishes(const Partials<A>& p, unsigned* tickets,
                                         const Chunks& chunks) {
  constexpr int kV = static_cast<int>(kVectorBytes / sizeof(A));
  const int64_t group = blockIdx.x / chunks.group, first = group * chunks.group;
  const int64_t left = chunks.count - first, count = left < chunks.group ? left : chunks.group;
  if (!arrives_last(tickets + group, count)) return false;
  // Each thread overwrites only what it alone has read.
  add_dweights(p, first, 1, count,
               [&](int k, const A(&sum)[kV]) { store<A, kV>(p.dweight(first) + k, sum); });
  add_sums(p, first, 1, count, [&](int k, double sum) { p.sums(first)[k] = sum; });
  return arrives_last(tickets + kMaxGroups, chunks.groups);
}

// Calls use(lane, sums) in the first warp: for each of its lanes kV elements from at(chunk, lane)
// on, added over the chunks. A warp has a group of chunks at a time. `shared`: [groups, kWarp, kV].
template <typename A, int kV, typename At, typename Use>
__device__ __forceinline__ void add_groups(const Chunks& chunks, int lanes, A* shared, const At& at,
                                           const Use& use) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const bool has_part = lane < lanes;
  for (int64_t group = warp; has_part && group < chunks.groups; group += kSumThreads / kWarp) {
    const int64_t first = group * chunks.group, left = chunks.count - first;
    A total[kV] = {};
    add_in_order<8>(
        left < chunks.group ? left : chunks.group, [&](int64_t c) { return at(first + c, lane); },
        total);
    store<A, kV>(shared + (group * kWarp + lane) * kV, total);
  }
  __syncthreads();
  if (warp == 0 && has_part) {
    A total[kV] = {};
    for (int64_t group = 0; group < chunks.groups; ++group) {
#pragma unroll
      for (int j = 0; j < kV; ++j) total[j] += shared[(group * kWarp + lane) * kV + j];
    }
    use(lane, total);
  }
  __syncthreads();  // shared may be used again
}

// finishes() and what follows it as a launch of its own, sum_blocks() of them: calls use_dweight(k,
// sums) as add_dweights() does, use_sum(k, sum) as add_sums(), each in some block.
template <typename A, typename UseDweight, typename UseSum>
__device__ __forceinline__ void sum_apart(const Partials<A>& p, const Chunks& chunks,
                                          const UseDweight& use_dweight, const UseSum& use_sum) {
  constexpr int kV = static_cast<int>(kVectorBytes / sizeof(A));
  __shared__ uint4 shared[kMaxGroups * kWarp];
  if (blockIdx.x > 0) {
    const int first = (static_cast<int>(blockIdx.x) - 1) * kWarp * kV;
    add_groups<A, kV>(
        chunks, (p.n - first + kV - 1) / kV, reinterpret_cast<A*>(shared),
        [&](int64_t chunk, int lane) { return p.dweight(chunk) + first + lane * kV; },
        [&](int lane, const A(&sum)[kV]) { use_dweight(first + lane * kV, sum); });
    return;
  }
  for (int first = 0; first <= p.O; first += kWarp) {
    add_groups<double, 1>(
        chunks, 1 + p.O - first, reinterpret_cast<double*>(shared),
        [&](int64_t chunk, int lane) { return p.sums(chunk) + first + lane; },
        [&](int lane, const double (&sum)[1]) { use_sum(first + lane, sum[0]); });
  }
}

}  // namespace fused_step::cuda
