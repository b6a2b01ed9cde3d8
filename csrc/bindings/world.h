// SPDX-License-Identifier: MIT
// State of the process and the thread that changes what the five lines do: modes, hooks for all
// modules. A fused plan needs all of it at its default, but for autocast.
#pragma once

#include "bindings/verdict.h"

namespace fused_step {

// False once the verdict needs no more. `autocast`: whether it is on for the CPU.
bool check_world(Verdict& verdict, bool& autocast);

// Whether an operator called now on ordinary tensors is just that operator: what an update in place
// asks of the world. Autocast does not concern it.
bool operators_are_plain();

}  // namespace fused_step
