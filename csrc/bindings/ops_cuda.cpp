// SPDX-License-Identifier: MIT
// The ops on CUDA tensors. Builds with CUDA only.
#include <torch/library.h>

#include "bindings/linear_mse.h"
#include "bindings/linear_mse_sgd_op.h"

TORCH_LIBRARY_IMPL(fused_step, CUDA, m) {
  m.impl("linear_mse_sgd_", &fused_step::linear_mse_sgd_op);
  m.impl("linear_mse", &fused_step::linear_mse_cuda);
}
