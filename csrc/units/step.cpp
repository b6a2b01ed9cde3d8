// SPDX-License-Identifier: MIT
// Whole steps of a layer or a head.
#include "bindings/head_step.cpp"
#include "bindings/linear_model.cpp"
#include "bindings/linear_mse_sgd_cpu.cpp"
#include "bindings/linear_mse_sgd_op.cpp"
#include "bindings/linear_step.cpp"
#include "bindings/module_call.cpp"
#include "bindings/squared_error.cpp"
#include "bindings/world.cpp"
