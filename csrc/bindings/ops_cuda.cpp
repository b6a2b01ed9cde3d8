// SPDX-License-Identifier: MIT
// The ops of ops_cpu.cpp on CUDA tensors. Builds with CUDA only.
#include <torch/library.h>

#include "bindings/linear_mse_sgd_op.h"

TORCH_LIBRARY_IMPL(fused_step, CUDA, m) {
  m.impl("linear_mse_sgd_", &fused_step::linear_mse_sgd_op);
}
