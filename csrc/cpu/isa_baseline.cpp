// SPDX-License-Identifier: MIT
// The loops for the compiler's default target: SSE2 on x86-64, NEON on AArch64.
#include "cpu/isa_headers.h"

#define FUSED_STEP_ISA baseline
#define FUSED_STEP_VECTOR_BYTES 16
#include "cpu/isa_kernels.h"
