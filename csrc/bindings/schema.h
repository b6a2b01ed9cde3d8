// SPDX-License-Identifier: MIT
// The schema of each op, in one place for registration and for messages.
#pragma once

namespace fused_step {

// One training step of a linear layer under MSE and SGD; changes the parameters and their momentum
// buffers in place and returns the loss before the update, 0-dim.
//   weight [O, I], bias [O], buffers alike, input [*, I], target [*, O].
constexpr const char* kLinearMseSgdSchema =
    "linear_mse_sgd_(Tensor(a!) weight, Tensor(b!)? bias, Tensor(c!)? weight_momentum_buffer, "
    "Tensor(d!)? bias_momentum_buffer, Tensor input, Tensor target, *, float lr, "
    "float momentum=0., float dampening=0., float weight_decay=0., bool nesterov=False, "
    "bool maximize=False, str reduction=\"mean\", bool first_step=False) -> Tensor";

}  // namespace fused_step
