// SPDX-License-Identifier: MIT
// How this version of torch holds the nodes of its autograd graph.
#pragma once

#include <ATen/core/TensorBody.h>
#include <torch/csrc/autograd/function.h>

#include <memory>
#include <type_traits>
#include <utility>

namespace fused_step {

using NodePtr = std::remove_cvref_t<decltype(std::declval<const at::Tensor&>().grad_fn())>;

// Older versions of torch hold nodes by std::shared_ptr. A template, so that only the branch of
// this version is compiled.
template <typename Made, typename Pointer = NodePtr>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<Made>();
  } else {
    return c10::make_intrusive<Made>();
  }
}

}  // namespace fused_step
