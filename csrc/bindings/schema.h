// SPDX-License-Identifier: MIT
// The schema of each op, in one place for registration and for messages.
#pragma once

namespace fused_step {

// One training step of a linear layer under MSE and SGD; changes the parameters and their momentum
// buffers in place and returns the loss before the update, 0-dim.
//   weight [O, I], bias [O], buffers alike, input [*, I], target [*, O].
// All of one dtype; an input of 16 bit may also meet float32.
constexpr const char* kLinearMseSgdSchema =
    "linear_mse_sgd_(Tensor(a!) weight, Tensor(b!)? bias, Tensor(c!)? weight_momentum_buffer, "
    "Tensor(d!)? bias_momentum_buffer, Tensor input, Tensor target, *, float lr, "
    "float momentum=0., float dampening=0., float weight_decay=0., bool nesterov=False, "
    "bool maximize=False, str reduction=\"mean\", bool first_step=False) -> Tensor";

// Mean squared error of a linear layer, differentiable in every tensor.
//   input [*, I], linear_weight [O, I], linear_bias [O], target [*, O]; loss [], or [*, O] for
//   reduction "none". dtypes as above; the loss has that of linear_weight.
constexpr const char* kLinearMseLossSchema =
    "linear_mse_loss(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, "
    "str reduction=\"mean\") -> Tensor";

// The same as a pure function that gives the gradients along: see linear_mse.h.
constexpr const char* kLinearMseSchema =
    "linear_mse(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, "
    "str reduction, bool need_dinput, bool need_dweight, bool need_dbias, bool need_dy) -> "
    "(Tensor loss, Tensor dinput, Tensor dweight, Tensor dbias, Tensor dy)";

}  // namespace fused_step
