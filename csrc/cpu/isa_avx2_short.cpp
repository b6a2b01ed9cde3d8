// SPDX-License-Identifier: MIT
// Steps in registers for rows of at most 16 bytes, with AVX2 and FMA: a tile has as many rows as a
// vector has lanes, and longer vectors would be transposed for lanes and rows that are not there.
// Empty on other processors than x86-64.
#include "cpu/isa_headers.h"

#if defined(__x86_64__)
#define FUSED_STEP_ISA avx2_short
#define FUSED_STEP_VECTOR_BYTES 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace fused_step::cpu {

#include "cpu/simd.h"

#include "cpu/register_steps.h"

namespace FUSED_STEP_ISA {

void float_steps(const SerialSteps<float>& a) { register_steps<float, 1>(a); }
void double_steps(const SerialSteps<double>& a) { register_steps<double, 1>(a); }

}  // namespace FUSED_STEP_ISA

}  // namespace fused_step::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
