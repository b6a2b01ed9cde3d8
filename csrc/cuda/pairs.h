// SPDX-License-Identifier: MIT
// The closed list of storage types that the CUDA engine is built for.
#pragma once

// M(X, P) for each: the type of x, and that of parameters, targets and the loss.
#define FUSED_STEP_FOR_EACH_PAIR(M) \
  M(float, float)                   \
  M(double, double)                 \
  M(BFloat16, BFloat16)             \
  M(Float16, Float16)               \
  M(BFloat16, float)                \
  M(Float16, float)

// M(X) for each that the matrix units multiply: the type of x, of parameters and of targets.
#define FUSED_STEP_FOR_EACH_MMA(M) \
  M(BFloat16)                      \
  M(Float16)

// M(P, Buf) for each storage of the optimizer: the type of parameters and their gradients, and that
// of their momentum buffers.
#define FUSED_STEP_FOR_EACH_STORAGE(M) \
  M(float, float)                      \
  M(double, double)                    \
  M(BFloat16, BFloat16)                \
  M(Float16, Float16)                  \
  M(BFloat16, float)                   \
  M(Float16, float)

// M(P) for each type of parameters.
#define FUSED_STEP_FOR_EACH_PARAM(M) \
  M(float)                           \
  M(double)                          \
  M(BFloat16)                        \
  M(Float16)
