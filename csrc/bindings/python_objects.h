// SPDX-License-Identifier: MIT
// The Python side of PyTorch as the preconditions see it: types, attribute names, and what classes
// looked like when fused_step was imported. Looked up once; all references are borrowed from it.
#pragma once

#include <Python.h>
#include <pybind11/pytypes.h>

namespace fused_step {

// Attribute names and dictionary keys, interned: a lookup is then a pointer comparison.
struct Names {
  PyObject *forward, *call, *call_impl, *wrapped_call_impl, *compiled_call_impl;
  PyObject *getattr, *getattribute, *dict, *iter, *buffers, *start_dim, *end_dim, *F;
  PyObject *forward_hooks, *forward_pre_hooks, *backward_hooks, *backward_pre_hooks;
  PyObject *parameters, *modules, *weight, *bias, *reduction, *mean, *sum;
  PyObject *param_groups, *state, *step, *zero_grad, *init_group;
  PyObject *step_pre_hooks, *step_post_hooks;
  PyObject *grad_scale, *found_inf, *opt_called, *momentum_buffer, *defaults;
  PyObject *params, *lr, *momentum, *dampening, *weight_decay, *nesterov, *maximize;
  PyObject *differentiable, *foreach, *fused, *linear, *mse_loss, *backward;
  PyObject *momentum_dtype, *max_grad_norm, *grad_norm;
};

// A module class and the methods that a call of it goes through, as they were at import.
struct ModuleClass {
  PyTypeObject* type;
  PyObject *forward, *call, *call_impl, *wrapped_call_impl;

  // False once somebody has put another method into the class.
  bool is_as_imported(const Names& names) const;
};

// A method of torch.Tensor, as it was at import.
struct TensorMethod {
  PyObject *name, *method;
};

struct PythonObjects {
  Names names;
  ModuleClass module, linear, sequential, flatten, mse_loss;
  // nn.Module's own way to find an attribute.
  PyObject *module_getattr, *module_getattribute;
  PyObject* sequential_iter;
  PyTypeObject *tensor, *module_list;
  // What models flatten an output with, what squared errors are written with, and what a step
  // calls.
  TensorMethod flatten_methods[5], loss_methods[8], step_methods[2];
  // fused_step.LinearMSELoss; its type is null until set_linear_mse_loss() was called.
  ModuleClass linear_mse_loss;
  PyTypeObject *sgd, *parameter, *partial;
  PyTypeObject* fused_sgd;  // fused_step.SGD; null until set_sgd() was called
  PyObject* sgd_zero_grad;
  // torch.nn.functional, its dictionary, its functions as they were at import, and the dictionaries
  // of the modules that nn.Linear and nn.MSELoss find it in.
  PyObject *torch_module, *nn_module, *functional_module, *functional, *linear_function,
      *mse_loss_function;
  PyObject* functional_users[2];
  // torch.autograd's dictionary, and the function that Tensor.backward() calls.
  PyObject *autograd, *backward_function;
  // Dictionaries of hooks that hold for all modules, or for all optimizers.
  PyObject *global_module_hooks[4], *global_optimizer_hooks[2];
  // bool is_stock_...(function): see fused_step/_stock.py.
  PyObject *is_stock_sgd_step, *is_stock_init_group;
  PyObject* read_forward;        // of fused_step/_forward.py
  PyObject* read_squared_error;  // of fused_step/_squared_error.py
};

// Imports torch's modules on first use. Needs the GIL.
const PythonObjects& python_objects();

// fused_step.modules hands over its class as soon as it has made it; it needs this module to be
// imported first.
void set_linear_mse_loss(PyObject* type);
// fused_step.optim likewise.
void set_sgd(PyObject* type);

// Borrowed, null if absent; no exception is left set. PyDict_GetItem would save and restore the
// current exception around each lookup, a quarter of its time.
inline PyObject* get_item(PyObject* dict, PyObject* key) {
  PyObject* const value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred() != nullptr) PyErr_Clear();
  return value;
}

// object.__dict__, of an object whose class does not replace it; null where it has none.
inline pybind11::object dict_of(PyObject* object) {
  return pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(object, nullptr));
}

// True for None, a missing entry and an empty dictionary.
inline bool is_empty_dict(PyObject* dict) {
  return dict == nullptr || dict == Py_None || (PyDict_Check(dict) && PyDict_GET_SIZE(dict) == 0);
}

}  // namespace fused_step
