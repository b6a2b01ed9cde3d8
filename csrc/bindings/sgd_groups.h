// SPDX-License-Identifier: MIT
// Reads a torch.optim.SGD as it is at this call: its groups' options, its momentum buffers, and
// whether its step() is PyTorch's own.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <pybind11/pytypes.h>

#include "bindings/verdict.h"
#include "bindings/watch.h"
#include "core/params.h"

namespace fused_step {

// One parameter: its options, and its momentum buffer if it has one yet.
struct SgdParam {
  PyObject* object = nullptr;  // borrowed; null: the model has no such parameter
  SgdOptions options;
  PyObject* buf = nullptr;  // borrowed
  PyObject* lr = nullptr;   // borrowed; a CUDA tensor, instead of options.lr
  bool in_groups = false;
};

struct SgdReading {
  SgdParam weight;
  SgdParam bias;
  PyObject* dict = nullptr;        // borrowed: optimizer.__dict__
  bool step_is_scheduled = false;  // a scheduler wraps step() and wants _opt_called
  bool may_be_kept = true;         // false: a value in it may change unseen (a tensor lr)
};

// A param group's options. False: one of them is not fused. `may_be_kept` becomes false where one
// may change while the group stays as it is (a tensor lr). An lr on CUDA is not read but handed on.
bool read_sgd_options(PyObject* group, SgdOptions& options, PyObject*& device_lr,
                      bool& may_be_kept);

// Whether those of all groups are.
bool sgd_options_are_fused(PyObject* optimizer);

class SgdReader {
 public:
  // Fills `reading`, whose weight.object and bias.object are set, and notes in `watch` what it came
  // from. False once the verdict needs no more, or when there is nothing further to read.
  bool read(PyObject* optimizer, Verdict& verdict, Watch& watch, SgdReading& reading);

 private:
  bool check_step(PyObject* optimizer, PyObject* dict, Verdict& verdict, Watch& watch,
                  SgdReading& reading);
  // Whether predicate(function) of fused_step/_stock.py says so.
  static bool is_stock(PyObject* predicate, PyObject* function, pybind11::object& last_seen);

  // The functions that were found to be PyTorch's own; compared by identity at each call, and held
  // so that no other function can take the address.
  pybind11::object class_step_, instance_step_, class_init_group_;
};

// A momentum buffer that a first step makes, and its place. What of Python's may raise comes before
// the step: the state makes optimizer.state[param] as SGD.step has it made, and refuses it perhaps.
class NewBuffer {
 public:
  NewBuffer(PyObject* optimizer_dict, PyObject* param, const at::Tensor& buf);

  // After the step. It runs no code of Python's, where a Ctrl-C would be heard, if the entry is a
  // dictionary.
  void store() const;

 private:
  pybind11::object entry_, buf_;
};

// Tells the scheduler that wraps optimizer.step that it has been called; otherwise the first
// scheduler.step() warns.
void note_step_called(PyObject* optimizer_dict);

}  // namespace fused_step
