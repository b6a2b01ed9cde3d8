// SPDX-License-Identifier: MIT
// The loss with gradients: the operator and its derivative.
#include "bindings/linear_mse_autograd.cpp"
#include "bindings/linear_mse_bfloat16.cpp"
#include "bindings/linear_mse_cpu.cpp"
#include "bindings/linear_mse_eager.cpp"
#include "bindings/made_gradients.cpp"
#include "bindings/schema.cpp"
