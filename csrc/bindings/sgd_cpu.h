// SPDX-License-Identifier: MIT
// One step of SGD over all tensors of all param groups on the CPU: one list of work, cut by its
// length alone.
#pragma once

#include <c10/util/FunctionRef.h>

#include <cstdint>
#include <vector>

#include "bindings/sgd_items.h"
#include "cpu/kernels.h"

namespace fused_step {

// Told of items [begin, end) by the thread that has updated the last of their elements.
using ItemsUpdated = c10::function_ref<void(size_t begin, size_t end)>;

// Updates every item, all on the CPU, by its group's rule. The elements of all items are one range,
// divided among the threads; up to 64 k elements, kItemCost more for each item, there is but the
// calling one.
void sgd_cpu(const std::vector<SgdItem>& items, const std::vector<cpu::SgdRule>& rules,
             ItemsUpdated updated);

// The 2-norm of all gradients, summed in double in a fixed order: the same bits on any number of
// threads.
double sgd_grad_norm_cpu(const std::vector<SgdItem>& items);

}  // namespace fused_step
