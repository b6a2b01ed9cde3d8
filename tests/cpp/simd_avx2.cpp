// SPDX-License-Identifier: MIT
// cpu/simd.h for AVX2, FMA and F16C. Empty on other processors than x86-64.
#include "simd_test.h"

#if defined(__x86_64__)
#define FUSED_STEP_ISA avx2
#define FUSED_STEP_AVX2
#define FUSED_STEP_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "simd_cases.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
