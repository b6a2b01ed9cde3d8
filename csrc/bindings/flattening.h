// SPDX-License-Identifier: MIT
// Models that make [*] of their last layer's output [*, 1], since their targets are [*].
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

namespace fused_step {

enum class Flattening : int8_t {
  kNone,
  kLast,     // squeeze(-1)
  kOfTwo,    // of two dimensions: squeeze(1), flatten(), view(-1), nn.Flatten(0)
  kAllOnes,  // squeeze(): all dimensions of size 1
};

// A target as the layer's output is before that, for an input [*, I] of the layer: [*, 1], in the
// same memory. Undefined where the target is not what the model makes of the output.
inline at::Tensor unflattened(const at::Tensor& target, at::IntArrayRef input, int64_t O,
                              Flattening flattening) {
  if (O != 1 || input.empty()) return {};
  const at::IntArrayRef rows = input.slice(0, input.size() - 1);
  if (flattening == Flattening::kOfTwo && input.size() != 2) return {};
  const bool has_ones = std::find(rows.begin(), rows.end(), 1) != rows.end();
  if (flattening == Flattening::kAllOnes && has_ones) return {};
  if (target.sizes() != rows) return {};
  const at::AutoDispatchBelowADInplaceOrView below;  // nobody else sees the view
  return target.unsqueeze(-1);
}

constexpr const char* kNotFlattened =
    "target is not [*], as the model makes it of an output [*, 1]";

}  // namespace fused_step
