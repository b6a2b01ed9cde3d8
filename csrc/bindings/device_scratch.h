// SPDX-License-Identifier: MIT
// Scratch memory on a CUDA device, as cuda_support.h makes and uses it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

namespace fused_step {

// Kept from one step to the next by whoever makes both. Steps that share it are ordered by their
// stream; on another stream it is made anew.
struct DeviceScratch {
  at::Tensor workspace;  // [bytes] uint8
  at::Tensor tickets;    // [kTickets] int32, zero between launches
  c10::StreamId stream = 0;
};

}  // namespace fused_step
