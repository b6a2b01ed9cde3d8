// SPDX-License-Identifier: MIT
// cpu/simd.h for the compiler's default target.
#include "simd_test.h"

#define FUSED_STEP_ISA baseline
#define FUSED_STEP_VECTOR_BYTES 16
#include "simd_cases.h"
