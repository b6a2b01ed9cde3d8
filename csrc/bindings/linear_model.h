// SPDX-License-Identifier: MIT
// Reads the Python side of a model that is, or ends in, one nn.Linear: is calling that nothing but
// F.linear on these tensors?
#pragma once

#include <Python.h>

#include <vector>

#include "bindings/flattening.h"
#include "bindings/module_call.h"
#include "bindings/verdict.h"
#include "bindings/watch.h"

namespace fused_step {

// All references are borrowed.
struct LinearModel {
  PyObject* linear = nullptr;
  PyObject* weight = nullptr;
  PyObject* bias = nullptr;  // null: the layer has none
  // What the model does to the layer's output, and a callable that does it.
  Flattening flattening = Flattening::kNone;
  PyObject* flatten = nullptr;
};

// A module on the way to a model's last layer, the outer ones first. References are borrowed.
struct BodyPart {
  PyObject* module = nullptr;
  LastCall last;         // of the module's forward(); or none:
  Py_ssize_t calls = 0;  // of a Sequential, whose next module is on the way, too

  // Whether anything is called before the next one.
  bool does_something() const { return last.code != nullptr || calls > 0; }
  bool operator==(const BodyPart&) const = default;
};

// Each notes in `watch` what it came from, and is false once the verdict needs no more, or where
// there is nothing further to read.

// A model that is one nn.Linear: itself, in a Sequential of just one, or of a class whose forward()
// calls nothing else; or, where `loss` is None and the model gives the loss itself, in a
// LinearMSELoss.
bool read_only_layer(PyObject* model, PyObject* loss, Verdict& verdict, Watch& watch,
                     LinearModel& reading);

// A model that ends in nn.Linear: itself, or the last module of a Sequential, or the one that a
// forward() of the user's own calls last; or where such a module does. Its output may be flattened
// after that. `body` is what comes before it, in the order of the calls.
bool read_last_layer(PyObject* model, Verdict& verdict, Watch& watch, LinearModel& reading,
                     std::vector<BodyPart>& body);

}  // namespace fused_step
