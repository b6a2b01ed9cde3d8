// SPDX-License-Identifier: MIT
// Several adjacent elements in one access of 2 to 16 bytes, kept in registers as they are stored.
#pragma once

#include <cstdint>

#include "core/float16.h"
#include "cuda/device.h"

namespace fused_step::cuda {

template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

// kV elements as one word; kV * sizeof(T) is 2, 4, 8 or 16.
template <typename T, int kV>
using Word = typename WordOf<kV* static_cast<int>(sizeof(T))>::type;

// By value: of a word in memory a reference would be copied from byte by byte.
template <typename T, int kV>
__device__ __forceinline__ void unpack(Word<T, kV> word, T (&to)[kV]) {
  __builtin_memcpy(to, &word, sizeof(word));
}

template <typename T, int kV>
__device__ __forceinline__ Word<T, kV> pack(const T (&from)[kV]) {
  Word<T, kV> word;
  __builtin_memcpy(&word, from, sizeof(word));
  return word;
}

// Read once: first to leave the caches, so that W and partial sums stay.
template <typename T, int kV>
__device__ __forceinline__ Word<T, kV> load_streaming(const T* p) {
  return __ldcs(reinterpret_cast<const Word<T, kV>*>(p));
}

// Written by other blocks in this launch: not from L1, which is not coherent.
template <typename T, int kV>
__device__ __forceinline__ void load_written(const T* p, T (&to)[kV]) {
  unpack<T, kV>(__ldcg(reinterpret_cast<const Word<T, kV>*>(p)), to);
}

template <typename T, int kV>
__device__ __forceinline__ void store(T* p, const T (&from)[kV]) {
  *reinterpret_cast<Word<T, kV>*>(p) = pack<T, kV>(from);
}

// Any number of elements, in as few accesses as there can be: p is aligned to the smaller of their
// bytes and 16.
template <typename T, int kV>
__device__ __forceinline__ void load_all(const T* p, T (&to)[kV]) {
  constexpr int kPart = kV * sizeof(T) > 16 ? 16 / sizeof(T) : kV;
#pragma unroll
  for (int at = 0; at < kV; at += kPart) {
    T part[kPart];
    unpack<T, kPart>(*reinterpret_cast<const Word<T, kPart>*>(p + at), part);
#pragma unroll
    for (int j = 0; j < kPart; ++j) to[at + j] = part[j];
  }
}

template <typename T, int kV>
__device__ __forceinline__ void store_all(T* p, const T (&from)[kV]) {
  constexpr int kPart = kV * sizeof(T) > 16 ? 16 / sizeof(T) : kV;
#pragma unroll
  for (int at = 0; at < kV; at += kPart) {
    T part[kPart];
#pragma unroll
    for (int j = 0; j < kPart; ++j) part[j] = from[at + j];
    store<T, kPart>(p + at, part);
  }
}

__host__ __device__ __forceinline__ bool is_aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace fused_step::cuda
