// SPDX-License-Identifier: MIT
// Stands in front of csrc/cuda/pairs.h in sanitizer builds: with all six pairs they take six
// minutes to compile. The other pairs differ in how a value is widened and rounded, not in what is
// read or written; the plain builds run them all.
#pragma once

#define FUSED_STEP_FOR_EACH_PAIR(M) \
  M(float, float)                   \
  M(BFloat16, BFloat16)

#define FUSED_STEP_FOR_EACH_MMA(M) M(BFloat16)

#define FUSED_STEP_FOR_EACH_STORAGE(M) \
  M(float, float)                      \
  M(BFloat16, BFloat16)                \
  M(BFloat16, float)

#define FUSED_STEP_FOR_EACH_PARAM(M) \
  M(float)                           \
  M(BFloat16)
