// SPDX-License-Identifier: MIT
// A loss whose gradients were made with it.
#pragma once

#include <ATen/core/TensorBody.h>

#include <vector>

namespace fused_step {

// From now on loss.backward() gives each of `tensors` its gradient, as it is: the factor that the
// backward pass brings is taken to be 1, as it is for a loss that nothing was done with. The
// gradients are given away, not shared, so that a parameter may keep its own instead of a copy.
void set_made_gradients(const at::Tensor& loss, const std::vector<at::Tensor>& tensors,
                        std::vector<at::Tensor> gradients);

}  // namespace fused_step
