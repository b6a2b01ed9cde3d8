// SPDX-License-Identifier: MIT
// The update rule over a list of tensors: a block for each chunk.
#pragma once

#include "core/sgd_math.h"
#include "cuda/launch.h"
#include "cuda/policy.h"
#include "cuda/vector.cuh"

namespace fused_step::cuda {

// What all tensors of a launch have in common, in the accumulator's type.
template <typename A>
struct SgdListRule {
  SgdCoefficients<A> coefficients;
  A unscale;
  A clip;
  GradAfter grad_after;
};

template <typename P>
struct SgdListArgs {
  SgdChunks list;
  SgdListRule<Accum<P>> rule;
  SgdScalars scalars;
};

// Where the elements are that a thread takes at once: adjacent, in as few accesses as can be, or a
// block's width apart, where they are not aligned to that: then a warp's accesses are adjacent.
struct Adjacent {
  template <typename T, int kV>
  static __device__ __forceinline__ void load(const T* p, T (&to)[kV]) {
    load_all(p, to);
  }
  template <typename T, int kV>
  static __device__ __forceinline__ void store(T* p, const T (&from)[kV]) {
    store_all(p, from);
  }
};
struct Apart {
  template <typename T, int kV>
  static __device__ __forceinline__ void load(const T* p, T (&to)[kV]) {
#pragma unroll
    for (int j = 0; j < kV; ++j) to[j] = p[j * kListThreads];
  }
  template <typename T, int kV>
  static __device__ __forceinline__ void store(T* p, const T (&from)[kV]) {
#pragma unroll
    for (int j = 0; j < kV; ++j) p[j * kListThreads] = from[j];
  }
};

// The part of a tensor that a block has.
template <typename P, typename Buf>
struct ListPart {
  P* param;  // [n]
  P* grad;   // [n]
  Buf* buf;  // [n] or null
  int n;
};

template <typename P, typename Buf>
__device__ __forceinline__ ListPart<P, Buf> part_of(const SgdTensor& t, int64_t number) {
  const int64_t begin = number * kListChunk<P>, left = t.n - begin;
  return {static_cast<P*>(t.param) + begin, static_cast<P*>(t.grad) + begin,
          t.buf != nullptr ? static_cast<Buf*>(t.buf) + begin : nullptr,
          static_cast<int>(left < kListChunk<P> ? left : kListChunk<P>)};
}

// kV elements from k on. All reads come before the first write.
template <bool kScaled, int kV, typename Place, typename P, typename Buf>
__device__ __forceinline__ void update_elements(const ListPart<P, Buf>& part, int k,
                                                const SgdListRule<Accum<P>>& rule) {
  using A = Accum<P>;
  const SgdCoefficients<A>& c = rule.coefficients;
  P value[kV], grad[kV];
  Buf momentum_buf[kV] = {};
  Place::load(part.grad + k, grad);
  Place::load(part.param + k, value);
  if (c.has_momentum && !c.first_step) Place::load(part.buf + k, momentum_buf);
#pragma unroll
  for (int j = 0; j < kV; ++j) {
    A g = widen(grad[j]);
    if constexpr (kScaled) {
      g = product(g, rule.unscale);
      grad[j] = narrow<P>(rule.grad_after == GradAfter::kZero ? A(0) : g);
      g = product(g, rule.clip);
    }
    A buf = widen(momentum_buf[j]);
    value[j] = narrow<P>(sgd_update(widen(value[j]), g, buf, c));
    momentum_buf[j] = narrow<Buf>(buf);
  }
  Place::store(part.param + k, value);
  if (c.has_momentum) Place::store(part.buf + k, momentum_buf);
  if (kScaled && rule.grad_after != GradAfter::kKept) Place::store(part.grad + k, grad);
}

template <bool kScaled, typename P, typename Buf>
__device__ __forceinline__ void update_part(const ListPart<P, Buf>& part,
                                            const SgdListRule<Accum<P>>& rule) {
  constexpr int kV = static_cast<int>(kVectorBytes / sizeof(P));
  const int thread = static_cast<int>(threadIdx.x);
  int done;
  if (is_aligned(part.param, kVectorBytes) && is_aligned(part.grad, kVectorBytes) &&
      is_aligned(part.buf, kVectorBytes)) {
    done = part.n / kV * kV;
    for (int k = thread * kV; k < done; k += kListThreads * kV) {
      update_elements<kScaled, kV, Adjacent>(part, k, rule);
    }
  } else {
    constexpr int kTile = kListThreads * kV;
    done = part.n / kTile * kTile;
    for (int k = thread; k < done; k += kTile) {
      update_elements<kScaled, kV, Apart>(part, k, rule);
    }
  }
  for (int k = done + thread; k < part.n; k += kListThreads) {
    update_elements<kScaled, 1, Adjacent>(part, k, rule);
  }
}

// Block b has chunk b. Reads gradients; reads and writes parameters and buffers; writes gradients
// where the rule says so. Of what it writes nothing overlaps.
template <typename P, typename Buf, bool kScaled>
__global__ void __launch_bounds__(kListThreads) sgd_list_kernel(const SgdListArgs<P> a) {
  using A = Accum<P>;
  const SgdChunk chunk = a.list.chunks[blockIdx.x];
  const SgdTensor tensor = a.list.tensors[chunk.tensor];
  const ListPart<P, Buf> part = part_of<P, Buf>(tensor, chunk.number);
  SgdListRule<A> rule = a.rule;
  if (a.scalars.found_inf != nullptr && *a.scalars.found_inf != 0.0f) {
    if (kScaled && rule.grad_after == GradAfter::kZero) {
      for (int k = static_cast<int>(threadIdx.x); k < part.n; k += kListThreads) {
        part.grad[k] = narrow<P>(A(0));
      }
    }
    return;
  }
  rule.coefficients.first_step = tensor.first_step != 0;
  if (a.scalars.lr_float != nullptr) rule.coefficients.lr = static_cast<A>(*a.scalars.lr_float);
  if (a.scalars.lr_double != nullptr) rule.coefficients.lr = static_cast<A>(*a.scalars.lr_double);
  if constexpr (kScaled) {
    if (a.scalars.grad_scale != nullptr) {
      rule.unscale = static_cast<A>(sgd_unscale(*a.scalars.grad_scale));
    }
    if (a.scalars.clip != nullptr) rule.clip = static_cast<A>(*a.scalars.clip);
    // Nothing to be written back, a fifth of the traffic.
    if (rule.unscale == A(1) && rule.grad_after == GradAfter::kUnscaled) {
      rule.grad_after = GradAfter::kKept;
    }
  }
  update_part<kScaled>(part, rule);
}

}  // namespace fused_step::cuda
