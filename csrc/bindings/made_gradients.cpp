// SPDX-License-Identifier: MIT
#include "bindings/made_gradients.h"

#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <string>
#include <utility>

#include "bindings/autograd_node.h"
#include "bindings/engines.h"

namespace fused_step {
namespace {

using torch::autograd::variable_list;

class MadeGradientsBackward : public torch::autograd::Node {
 public:
  void hold(variable_list gradients) { gradients_ = std::move(gradients); }

  std::string name() const override { return "MadeGradientsBackward"; }

  // After apply(): what it has returned is then the only reference.
  void release_variables() override { gradients_.clear(); }

  // Compiled autograd: what a compiled backward pass depends on, and a trace of apply().
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(gradients_);
  }

  variable_list apply_with_saved(const variable_list&,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override {
    saved.before(gradients_);
    variable_list traced = gradients_;
    saved.after(gradients_);
    return traced;
  }

  variable_list apply(variable_list&&) override {
    if (!gradients_.empty()) prepare_thread(gradients_[0].device());
    return gradients_;
  }

 private:
  variable_list gradients_;
};

}  // namespace

void set_made_gradients(const at::Tensor& loss, const std::vector<at::Tensor>& tensors,
                        std::vector<at::Tensor> gradients) {
  const auto node = make_node<MadeGradientsBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(tensors));
  for (size_t k = 0; k < tensors.size(); ++k) {
    // The engine does not where a parameter's grad_dtype is None.
    gradients[k] = gradients[k].to(tensors[k].scalar_type());
  }
  node->hold(std::move(gradients));
  torch::autograd::set_history(loss, node);
}

}  // namespace fused_step
