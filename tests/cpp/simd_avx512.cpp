// SPDX-License-Identifier: MIT
// cpu/simd.h for AVX-512 (F, DQ, VL, BW). Empty on other processors than x86-64.
#include "simd_test.h"

#if defined(__x86_64__)
#define FUSED_STEP_ISA avx512
#define FUSED_STEP_AVX512
#define FUSED_STEP_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma")
#endif

#include "simd_cases.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
