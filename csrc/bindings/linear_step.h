// SPDX-License-Identifier: MIT
// Door 1 for a linear model: finds out at each call whether the five lines may be fused, and does
// them.
#pragma once

#include <Python.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "bindings/linear_mse_sgd.h"
#include "bindings/sgd_groups.h"
#include "bindings/verdict.h"

namespace fused_step {

// Not to be called from two threads at once.
class LinearStep {
 public:
  LinearStep(pybind11::object model, pybind11::object loss_function, pybind11::object optimizer)
      : model_(std::move(model)),
        loss_function_(std::move(loss_function)),
        optimizer_(std::move(optimizer)) {}

  // One step; None, and nothing changed, where no fused plan applies.
  pybind11::object step(pybind11::handle input, pybind11::handle target);

  // Many steps; None, and nothing changed, where no fused plan applies. `progress(steps_done)` is
  // called about ten times a second if it is not None.
  pybind11::object run(pybind11::handle inputs, pybind11::handle targets, int64_t epochs,
                       int64_t batch_size, bool shuffle, std::optional<at::Generator> generator,
                       const pybind11::object& progress);

  // The plan that step(input, target) would take, and why no deeper one.
  std::pair<std::string, std::vector<std::string>> explain(pybind11::handle input,
                                                           pybind11::handle target);

  // The plan of the last call of step or run; null where none applied.
  const char* plan() const;

 private:
  // Everything a step needs, found out anew at each call.
  struct Call {
    SgdReading sgd;
    LinearSgdState state;
    at::Tensor input;
    at::Tensor target;
    pybind11::object optimizer_dict;
  };

  bool resolve(PyObject* input, PyObject* target, Verdict& verdict, Call& call);
  bool resolve_modules(Verdict& verdict, Call& call);
  bool resolve_loss(Verdict& verdict, Call& call);
  static bool check_params(Verdict& verdict, Call& call);
  static bool check_batch(PyObject* input, PyObject* target, Verdict& verdict, Call& call);
  static void make_buffers(Call& call);
  static void leave_optimizer(const Call& call);

  pybind11::object model_, loss_function_, optimizer_;
  SgdReader sgd_reader_;
  Workspace workspace_;
  cpu::Plan plan_ = cpu::Plan::kNone;
};

}  // namespace fused_step
