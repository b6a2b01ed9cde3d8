// SPDX-License-Identifier: MIT
// How a formula is inlined: on the device too, and always, so that the host version is compiled
// with the instruction set of the loop that calls it.
#pragma once

#if defined(__CUDACC__)
#define FUSED_STEP_INLINE __host__ __device__ __forceinline__
#else
#define FUSED_STEP_INLINE inline __attribute__((always_inline))
#endif
