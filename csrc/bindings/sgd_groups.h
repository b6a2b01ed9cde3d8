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

class SgdReader {
 public:
  // Fills `reading`, whose weight.object and bias.object are set, and notes in `watch` what it came
  // from. False once the verdict needs no more, or when there is nothing further to read.
  bool read(PyObject* optimizer, Verdict& verdict, Watch& watch, SgdReading& reading);

 private:
  bool check_step(PyObject* optimizer, PyObject* dict, Verdict& verdict, Watch& watch,
                  SgdReading& reading);
  // Whether predicate(function) of fused_step/_stock.py says so.
  static bool is_stock(PyObject* predicate, PyObject* function, PyObject*& last_seen);

  // The functions that were found to be PyTorch's own; compared by identity at each call, and held
  // so that no other function can take the address.
  PyObject* class_step_ = nullptr;
  PyObject* instance_step_ = nullptr;
  PyObject* class_init_group_ = nullptr;
};

// optimizer.state[param], made if it is not there, as SGD.step has it made: by the state itself,
// which may raise.
pybind11::object momentum_entry(PyObject* optimizer_dict, PyObject* param);

// Puts a buffer that the first step has made into optimizer.state[param].
void store_momentum_buffer(PyObject* optimizer_dict, PyObject* param, const at::Tensor& buf);

// Tells the scheduler that wraps optimizer.step that it has been called; otherwise the first
// scheduler.step() warns.
void note_step_called(PyObject* optimizer_dict);

}  // namespace fused_step
