// SPDX-License-Identifier: MIT
// Door 1 for a model that ends in a linear layer under a squared error: finds out at each call
// whether that layer, the loss and their gradients may be made at once, and makes them.
#pragma once

#include <Python.h>
#include <pybind11/pytypes.h>

#include <optional>
#include <string>
#include <vector>

#include "bindings/linear_model.h"
#include "bindings/linear_step.h"
#include "bindings/squared_error.h"
#include "bindings/verdict.h"
#include "bindings/watch.h"

namespace fused_step {

// Not to be called from two threads at once. Holds no references, as LinearStep.
class HeadStep {
 public:
  HeadStep(pybind11::handle model, pybind11::handle loss_function, pybind11::handle optimizer)
      : model_(model), loss_function_(loss_function), optimizer_(optimizer) {}

  // The modules on the way to the last layer, that layer, and the number of this reading; None
  // where the head is not fused. Each is (method, module, 0, flatten), of a forward() without its
  // last call, which gives the module that would be called, `module` as far as is known, and its
  // argument; or (None, None, 0, flatten), of one that only has that call; or (sequential, None,
  // calls, None), so many of whose modules come before the next one. `flatten` is for what the last
  // call gives.
  pybind11::object parts();

  // Whether the way to the last layer is still the one of that number, whose parts are alive.
  bool confirms(int64_t number);

  // `hidden` is what the parts before the last layer gave. The whole rest of the step, by a plan
  // of that layer, if `hidden` needs no gradient; None, and nothing changed, where that is not so.
  pybind11::object step(pybind11::handle hidden, pybind11::handle target);

  // The loss, whose backward() has the gradients ready: of those among the last layer's parameters
  // and `hidden` that need one. None where the head is not fused.
  pybind11::object loss(pybind11::handle hidden, pybind11::handle target);

  // Whether the head of step(input, target) would be fused, as far as can be told without what
  // comes before the last layer; and why not.
  std::pair<bool, std::vector<std::string>> explain(pybind11::handle input,
                                                    pybind11::handle target);

 private:
  struct Reading {
    LinearModel model;
    SquaredError error;
    std::vector<BodyPart> body;  // the way to the last layer
    int64_t number = 0;

    bool has_body() const;  // whether anything comes before the last layer
  };

  bool read(Verdict& verdict);
  bool check(PyObject* hidden, PyObject* target, Verdict& verdict) const;
  at::Tensor target_of(const at::Tensor& hidden, const at::Tensor& target) const;

  pybind11::handle model_, loss_function_, optimizer_;
  Watch watch_;  // over what reading_ came from
  Reading reading_;
  int64_t readings_ = 0;
  std::optional<LinearStep> layer_;  // of layer_of_
  PyObject* layer_of_ = nullptr;
};

}  // namespace fused_step
