// SPDX-License-Identifier: MIT
// The derivative of fused_step::linear_mse_loss. The gradients are made with the loss, as they are
// for dL/dloss = 1; the backward pass multiplies them by another one, and rounds once.
//
// A node of its own, as PyTorch's built-in operators have one, and not an autograd.Function: it
// unpacks what it needs and nothing else. A weight that was changed in place after the forward pass
// stops a second derivative, as it must, and not the plain backward, which has no use for it.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <array>
#include <mutex>
#include <string>
#include <utility>

#include "bindings/autograd_node.h"
#include "bindings/dtypes.h"
#include "bindings/engines.h"
#include "bindings/linear_mse.h"
#include "bindings/memory.h"

namespace fused_step {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Positions of the operands, and of their gradients.
enum Operand : size_t { kInput, kWeight, kBias, kTarget, kOperands };

c10::SymInt rows_in(const at::Tensor& t) {
  c10::SymInt rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) rows = rows * t.sym_size(d);
  return rows;
}

// Nothing is computed in 16 bit. A gradient that comes out in float is rounded, once, to the dtype
// of what it is the gradient of.
at::Tensor widened(const at::Tensor& t) { return t.to(accum_dtype(t.scalar_type())); }

at::Tensor as_matrix(const at::Tensor& t) { return t.reshape_symint({rows_in(t), t.sym_size(-1)}); }

// An inference tensor cannot be saved, which is an error where nn.Linear or MSELoss saves it, too.
// Where they do not, and only a second derivative needs it here, a copy is.
SavedVariable saved(const at::Tensor& t, bool plain_saves) {
  return SavedVariable(t.is_inference() && !plain_saves ? t.clone() : t, false);
}

// From dL/dy and the operands: used where a derivative of it may be asked for, and under "none".
struct Gradients {
  at::Tensor dy;  // [*, O]

  at::Tensor of_input(const at::Tensor& weight) const {
    c10::SymDimVector sizes(dy.sym_sizes());
    sizes.back() = weight.sym_size(1);
    return at::mm(as_matrix(dy), widened(weight)).reshape_symint(sizes);
  }
  at::Tensor of_weight(const at::Tensor& input) const {
    return at::mm(as_matrix(dy).t(), as_matrix(widened(input)));
  }
  at::Tensor of_bias() const { return as_matrix(dy).sum(0); }
  at::Tensor of_target() const { return at::neg(dy); }
};

class LinearMseBackward : public torch::autograd::Node {
 public:
  void save(const at::Tensor& input, const at::Tensor& weight,
            const std::optional<at::Tensor>& bias, const at::Tensor& target,
            std::string_view reduction, const LinearMseResult& result) {
    const auto& [loss, dinput, dweight, dbias, dy] = result;
    operands_[kInput] = saved(input, should_compute_output(kWeight));
    operands_[kWeight] = saved(weight, should_compute_output(kInput));
    operands_[kTarget] = saved(target, true);
    dtypes_ = {input.scalar_type(), weight.scalar_type(), weight.scalar_type(),
               target.scalar_type()};
    has_bias_ = bias.has_value();
    if (has_bias_) operands_[kBias] = saved(*bias, false);
    none_ = reduction == "none";
    mean_ = reduction == "mean";
    numel_ = target.sym_numel();
    empty_ = numel_ == 0;
    if (should_compute_output(kTarget) || none_) dy_ = SavedVariable(dy, false);
    if (none_) return;
    const std::array<const at::Tensor*, 3> stash = {&dinput, &dweight, &dbias};
    for (size_t k = 0; k < stash.size(); ++k) {
      if (should_compute_output(k)) stash_[k] = SavedVariable(*stash[k], false);
    }
  }

  std::string name() const override { return "LinearMseBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& t : operands_) t.reset_data();
    for (SavedVariable& t : stash_) t.reset_data();
    dy_.reset_data();
  }

  // Compiled autograd: what a compiled backward pass depends on, and a trace of apply().
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const SavedVariable& t : operands_) args.collect(t, /*is_output=*/false);
    for (const SavedVariable& t : stash_) args.collect(t, /*is_output=*/false);
    args.collect(dy_, /*is_output=*/false);
    args.collect(numel_);
    for (const bool flag : {has_bias_, mean_, none_, empty_}) args.collect(flag);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override {
    const auto each = [&](const auto& visit) {
      for (SavedVariable& t : operands_) visit(t);
      for (SavedVariable& t : stash_) visit(t);
      visit(dy_);
      visit(numel_);
    };
    each([&](auto& value) { saved.before(value); });
    variable_list wanted = apply(variable_list(grads));
    each([&](auto& value) { saved.after(value); });
    return wanted;
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    variable_list wanted(kOperands);
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) return wanted;
    if (at::GradMode::is_enabled()) {
      differentiable(grad, wanted);
    } else if (none_) {
      const at::Tensor input = unpacked_if(kWeight, kInput), weight = unpacked_if(kInput, kWeight);
      fill({at::mul(dy_.unpack(), widened(grad))}, input, weight, wanted);
    } else {
      from_stash(grad, wanted);
    }
    for (size_t k = 0; k < kOperands; ++k) {
      // The engine does not where a parameter's grad_dtype is None.
      if (wanted[k].defined()) wanted[k] = wanted[k].to(dtypes_[k]);
    }
    return wanted;
  }

 private:
  // Whether `t`, unpacked from `saved`, is an ordinary tensor that nobody will see again: this pass
  // frees the graph, and no hook of this node may go through it before. It may be overwritten then,
  // which spares the pages of another as large.
  bool is_last_use(const SavedVariable& saved, const at::Tensor& t) {
    return !torch::autograd::get_current_graph_task_keep_graph() && post_hooks().empty() &&
           !saved.has_hooks() && has_plain_keys(t) && t.use_count() == 2 &&
           t.storage().use_count() == 1;
  }

  void from_stash(const at::Tensor& grad, variable_list& wanted) {
    const at::Tensor factor = widened(grad);
    const bool is_plain = has_plain_keys(factor);
    const bool is_one = is_plain && factor.is_cpu() && factor.item().toDouble() == 1.0;
    const auto scaled = [&](SavedVariable& saved) {
      at::Tensor t = saved.unpack();
      // Nothing was summed over: zeros, whatever dL/dloss may be.
      if (empty_) return at::zeros_like(t);
      // With a factor of no dimensions a 16-bit tensor is multiplied in float and rounded once.
      if (!is_plain || !is_last_use(saved, t)) return at::mul(t, factor);
      saved.reset_data();  // a pass of another thread must not find it multiplied
      return is_one ? t : t.mul_(factor);
    };
    for (size_t k = 0; k < stash_.size(); ++k) {
      if (task_should_compute_output(k)) wanted[k] = scaled(stash_[k]);
    }
    if (task_should_compute_output(kTarget)) wanted[kTarget] = at::neg(scaled(dy_));
  }

  // Each operand is unpacked once in a pass: more is an error under torch.utils.checkpoint.
  at::Tensor unpacked_if(Operand wanted, Operand operand) const {
    return task_should_compute_output(wanted) ? operands_[operand].unpack() : at::Tensor();
  }

  void differentiable(const at::Tensor& grad, variable_list& wanted) const {
    const at::Tensor target = operands_[kTarget].unpack(), input = operands_[kInput].unpack(),
                     weight = operands_[kWeight].unpack();
    const std::optional<at::Tensor> bias =
        has_bias_ ? std::optional<at::Tensor>(widened(operands_[kBias].unpack())) : std::nullopt;
    const at::Tensor y = at::linear(widened(input), widened(weight), bias);
    const at::Tensor residual = at::sub(y, target);
    const c10::SymFloat dy_scale = mean_ ? 2.0 / numel_ : c10::SymFloat(2.0);
    fill({empty_ ? residual : at::mul(residual, at::mul(widened(grad), at::Scalar(dy_scale)))},
         input, weight, wanted);
  }

  // Needs the weight for dinput, the input for dweight.
  void fill(const Gradients& gradients, const at::Tensor& input, const at::Tensor& weight,
            variable_list& wanted) const {
    if (task_should_compute_output(kInput)) wanted[kInput] = gradients.of_input(weight);
    if (task_should_compute_output(kWeight)) wanted[kWeight] = gradients.of_weight(input);
    if (task_should_compute_output(kBias)) wanted[kBias] = gradients.of_bias();
    if (task_should_compute_output(kTarget)) wanted[kTarget] = gradients.of_target();
  }

  std::array<SavedVariable, kOperands> operands_;
  std::array<at::ScalarType, kOperands> dtypes_{};
  std::array<SavedVariable, 3> stash_;  // gradients of input, weight and bias for dL/dloss = 1
  SavedVariable dy_;
  c10::SymInt numel_;
  bool has_bias_ = false, mean_ = false, none_ = false, empty_ = false;
};

LinearMseResult call_linear_mse(const at::Tensor& input, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias, const at::Tensor& target,
                                std::string_view reduction, bool need_dinput, bool need_dweight,
                                bool need_dbias, bool need_dy) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow(kLinearMse, "").typed<LinearMseSignature>();
  return op.call(input, weight, bias, target, reduction, need_dinput, need_dweight, need_dbias,
                 need_dy);
}

// Where nothing is differentiated.
at::Tensor linear_mse_loss(const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, const at::Tensor& target,
                           std::string_view reduction) {
  return std::get<0>(
      call_linear_mse(input, weight, bias, target, reduction, false, false, false, false));
}

}  // namespace

at::Tensor linear_mse_loss_autograd(const at::Tensor& input, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias, const at::Tensor& target,
                                    std::string_view reduction) {
  const bool is_forward =
      torch::autograd::isFwGradDefined(input) || torch::autograd::isFwGradDefined(weight) ||
      torch::autograd::isFwGradDefined(bias) || torch::autograd::isFwGradDefined(target);
  TORCH_CHECK_NOT_IMPLEMENTED(!is_forward, kLinearMse, ": has no forward-mode derivative");
  const bool record = torch::autograd::compute_requires_grad(input, weight, bias, target);
  const auto needs = [&](const at::Tensor& t) { return record && t.requires_grad(); };
  LinearMseResult result;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    result = call_linear_mse(input, weight, bias, target, reduction, needs(input), needs(weight),
                             bias.has_value() && needs(*bias),
                             needs(target) || (record && reduction == "none"));
  }
  at::Tensor& loss = std::get<0>(result);
  if (record) {
    const auto node = make_node<LinearMseBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(input, weight, bias, target));
    node->save(input, weight, bias, target, reduction, result);
    torch::autograd::set_history(loss, node);
  }
  return loss;
}

}  // namespace fused_step

TORCH_LIBRARY_IMPL(fused_step, CompositeExplicitAutograd, m) {
  m.impl("linear_mse_loss", &fused_step::linear_mse_loss);
}

// linear_mse itself has no derivative: a gradient that would flow through it says so.
TORCH_LIBRARY_IMPL(fused_step, Autograd, m) {
  m.impl("linear_mse_loss", &fused_step::linear_mse_loss_autograd);
  m.impl("linear_mse", torch::autograd::autogradNotImplementedFallback());
}
