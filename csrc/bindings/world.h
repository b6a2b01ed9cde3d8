// SPDX-License-Identifier: MIT
// State of the process and the thread that changes what the five lines do: modes, hooks for all
// modules. A fused plan needs all of it at its default, but for autocast.
#pragma once

#include <c10/core/Device.h>

#include "bindings/verdict.h"

namespace fused_step {

// For which devices autocast is on: that of one is nothing to tensors on another.
struct Autocast {
  bool cpu = false;
  bool cuda = false;

  bool is_on(c10::Device device) const { return device.is_cuda() ? cuda : device.is_cpu() && cpu; }
};

// False once the verdict needs no more.
bool check_world(Verdict& verdict, Autocast& autocast);

// Whether an operator called now on ordinary tensors is just that operator: what an update in place
// asks of the world. Autocast does not concern it.
bool operators_are_plain();

}  // namespace fused_step
