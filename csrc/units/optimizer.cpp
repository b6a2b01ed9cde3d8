// SPDX-License-Identifier: MIT
// The optimizer's steps.
#include "bindings/sgd_cpu.cpp"
#include "bindings/sgd_groups.cpp"
#include "bindings/sgd_read.cpp"
#include "bindings/sgd_step.cpp"
