// SPDX-License-Identifier: MIT
// The whole step of one linear layer on tensors: allocates, picks the plan, runs it. Arguments are
// checked by the callers (linear_mse_sgd_op.cpp, linear_step.cpp).
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>

#include "bindings/linear_mse_passes.h"
#include "core/params.h"
#include "cpu/policy.h"

namespace fused_step {

// What a step changes, and how. Undefined tensors: no bias, no momentum.
struct LinearSgdState {
  at::Tensor weight;      // [O, I] contiguous; all of its dtype
  at::Tensor bias;        // [O] contiguous
  at::Tensor weight_buf;  // [O, I] contiguous, defined with momentum
  at::Tensor bias_buf;    // [O] contiguous, defined with bias and momentum
  SgdOptions weight_options;
  SgdOptions bias_options;
  Reduction reduction = Reduction::kMean;
  // On CUDA, instead of the options' lr and read by the kernels alone: [] float32, or undefined.
  at::Tensor weight_lr{};
  at::Tensor bias_lr{};

  // Everything that a step changes has been changed in place.
  void bump_versions() const {
    for (const at::Tensor* t : {&weight, &bias, &weight_buf, &bias_buf}) {
      if (t->defined()) t->unsafeGetTensorImpl()->bump_version();
    }
  }
};

// The plan for a batch of B rows.
cpu::Plan plan_for(const LinearSgdState& state, int64_t B);

// One step on input [*, I] and target [*, O], dtypes as is_fused_pair() has them; returns the loss
// before the update, 0-dim.
at::Tensor linear_mse_sgd_cpu(const LinearSgdState& state, const at::Tensor& input,
                              const at::Tensor& target, Workspace& workspace);

struct RunOptions {
  int64_t epochs;
  int64_t batch_size;
  bool shuffle;
  std::optional<at::Generator> generator;
};

// Who started a run, and what it is told.
struct RunWatch {
  std::function<void()> poll;  // called every few milliseconds; may throw to end the run there
  int64_t steps = 0;           // done so far, whole ones
};

// epochs * ceil(n / batch_size) steps on inputs [n, ..., I] and targets [n, ..., O], in the order
// of the rows or of torch.randperm; returns their losses, 1-dim.
at::Tensor run_linear_mse_sgd_cpu(LinearSgdState state, const at::Tensor& inputs,
                                  const at::Tensor& targets, const RunOptions& options,
                                  Workspace& workspace, RunWatch& watch);

}  // namespace fused_step
