// SPDX-License-Identifier: MIT
// The 16-bit types that tensors are stored in. Nothing is computed in them: a value is widened to
// its accumulator type on load and rounded once, to nearest even, on store.
#pragma once

#include <cstdint>

#include "core/inline.h"

namespace fused_step {

// Sign, 8 bits of exponent, 7 of mantissa: the upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

// IEEE 754 binary16: sign, 5 bits of exponent, 10 of mantissa.
struct Float16 {
  uint16_t bits;
};

template <typename T>
constexpr bool kIsFloat16 = false;
template <>
inline constexpr bool kIsFloat16<Float16> = true;

// What arithmetic on values stored as T is done in.
template <typename T>
struct AccumOf {
  using type = T;
};
template <>
struct AccumOf<BFloat16> {
  using type = float;
};
template <>
struct AccumOf<Float16> {
  using type = float;
};
template <typename T>
using Accum = typename AccumOf<T>::type;

FUSED_STEP_INLINE float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return __builtin_bit_cast(float, bits);
#endif
}

FUSED_STEP_INLINE uint32_t bits_of_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  return __builtin_bit_cast(uint32_t, value);
#endif
}

FUSED_STEP_INLINE float widen(float value) { return value; }
FUSED_STEP_INLINE double widen(double value) { return value; }

FUSED_STEP_INLINE float widen(BFloat16 value) {
  return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

FUSED_STEP_INLINE float widen(Float16 value) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity and NaN keep the largest exponent; a NaN becomes quiet
    const uint32_t quiet = magnitude > 0x7c00u ? 0x00400000u : 0u;
    return float_from_bits(sign | 0x7f800000u | quiet | (magnitude & 0x3ffu) << 13);
  }
  if (magnitude >= 0x0400u) {  // the exponents' biases differ by 112
    return float_from_bits(sign | ((magnitude << 13) + 0x38000000u));
  }
  // Units of 2^-24, that of a float from 0.5 to 1: exact, and without a subnormal float, which
  // torch.set_flush_denormal() would have read as zero.
  const float units = float_from_bits(0x3f000000u | magnitude) - 0.5f;
  return float_from_bits(sign | bits_of_float(units));
#endif
}

template <typename T>
FUSED_STEP_INLINE T narrow(Accum<T> value) {
  return value;
}

// The bits of the nearest BFloat16, ties to even, in the low half. U is the bits of a float or a
// SIMD vector of them.
template <typename U>
FUSED_STEP_INLINE U bfloat16_bits(const U& bits) {
  const U to_even = (bits >> 16 & 1u) + 0x7fffu;
  const U is_number = (bits & 0x7fffffffu) <= 0x7f800000u ? ~U{} : U{};
  return ((bits + to_even) >> 16 & is_number) | (~is_number & 0x7fc0u);
}

template <>
FUSED_STEP_INLINE BFloat16 narrow<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)
  BFloat16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
  return rounded;
#else
  return {static_cast<uint16_t>(bfloat16_bits(bits_of_float(value)))};
#endif
}

template <>
FUSED_STEP_INLINE Float16 narrow<Float16>(float value) {
#if defined(__CUDA_ARCH__)
  Float16 rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
  return rounded;
#else
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t rounded;
  if (magnitude > 0x7f800000u) {
    rounded = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520, half way from the largest value to the next
    rounded = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 a unit in the last place is 2^-24: that of a float from 0.5 to 1. The addition
    // rounds there, and leaves the count of units in the low bits.
    rounded = bits_of_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    const uint32_t to_even = 0xfffu + (magnitude >> 13 & 1u);
    rounded = (magnitude + to_even - 0x38000000u) >> 13;
  }
  return {static_cast<uint16_t>(sign | rounded)};
#endif
}

}  // namespace fused_step
