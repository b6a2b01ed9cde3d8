// SPDX-License-Identifier: MIT
// The CUDA engine's bindings. Builds with CUDA only.
#include "bindings/cuda_support.cpp"
#include "bindings/linear_mse_cuda.cpp"
#include "bindings/linear_mse_sgd_cuda.cpp"
#include "bindings/ops_cuda.cpp"
#include "bindings/sgd_cuda.cpp"
