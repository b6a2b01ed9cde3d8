// SPDX-License-Identifier: MIT
#include "bindings/sgd_groups.h"

#include <pybind11/cast.h>

#include <cmath>

#include "bindings/python_bridge.h"
#include "bindings/python_objects.h"

namespace fused_step {

namespace py = pybind11;

namespace {

// What every parameter's type holds: a number that it does not hold is an error of torch's.
bool is_in_range(double number) {
  constexpr double kLargest = 60000.0;  // float16 ends at 65504
  return !std::isfinite(number) || std::abs(number) <= kLargest;
}

// Not a bool, which torch's operators reject in some places.
bool read_number(PyObject* value, double& number) {
  if (value == nullptr || PyBool_Check(value)) return false;
  if (PyFloat_Check(value)) {
    number = PyFloat_AS_DOUBLE(value);
    return is_in_range(number);
  }
  if (PyLong_Check(value)) {
    number = PyLong_AsDouble(value);
    if (number == -1.0 && PyErr_Occurred()) {
      PyErr_Clear();  // beyond the range of a double: the plain loop says so
      return false;
    }
    return is_in_range(number);
  }
  return false;
}

// A learning rate may also be a tensor of one element: on the CPU it is read here, one on CUDA is
// handed on, since reading it would wait for the device.
bool read_lr(PyObject* value, double& lr, PyObject*& device_lr, bool& may_be_kept) {
  if (read_number(value, lr)) return true;
  may_be_kept = false;
  if (value == nullptr || !is_exact_tensor(value)) return false;
  const at::Tensor& t = tensor_of(value);
  if (t.is_cuda()) {
    device_lr = value;
    return true;
  }
  // Of memory that others have, too, a step may change it: torch reads it for each parameter.
  if (t.numel() != 1 || t.requires_grad() || !t.device().is_cpu() || t.layout() != at::kStrided ||
      !at::isFloatingType(t.scalar_type()) || t.storage().use_count() != 1) {
    return false;
  }
  lr = t.item().toDouble();
  return is_in_range(lr);
}

bool read_flag(PyObject* value, bool& flag) {
  flag = value == Py_True;
  return value == Py_True || value == Py_False;
}

// optimizer.state[param]["momentum_buffer"], or null; false: something else is there.
bool read_buffer(PyObject* state, PyObject* param, const Names& n, Watch& watch, PyObject*& buf) {
  watch.dict(state);
  PyObject* const entry = PyDict_GetItemWithError(state, param);
  if (entry == nullptr) {
    if (PyErr_Occurred()) throw py::error_already_set();
    return true;
  }
  if (!PyDict_Check(entry)) return false;
  watch.dict(entry);
  PyObject* const object = get_item(entry, n.momentum_buffer);
  if (object == nullptr || object == Py_None) return true;
  if (!is_exact_tensor(object)) return false;
  buf = object;
  return true;
}

}  // namespace

bool read_sgd_options(PyObject* group, SgdOptions& options, PyObject*& device_lr,
                      bool& may_be_kept) {
  const Names& n = python_objects().names;
  bool differentiable = false;
  PyObject* const is_differentiable = get_item(group, n.differentiable);
  return read_lr(get_item(group, n.lr), options.lr, device_lr, may_be_kept) &&
         read_number(get_item(group, n.momentum), options.momentum) &&
         read_number(get_item(group, n.dampening), options.dampening) &&
         read_number(get_item(group, n.weight_decay), options.weight_decay) &&
         read_flag(get_item(group, n.nesterov), options.nesterov) &&
         read_flag(get_item(group, n.maximize), options.maximize) &&
         read_flag(is_differentiable, differentiable) && !differentiable &&
         // torch's step asks for them.
         get_item(group, n.foreach) != nullptr && get_item(group, n.fused) != nullptr;
}

bool sgd_options_are_fused(PyObject* optimizer) {
  const py::list groups = py::getattr(optimizer, python_objects().names.param_groups);
  for (const py::handle group : groups) {
    SgdOptions options;
    PyObject* lr = nullptr;
    bool may_be_kept = false;
    if (!read_sgd_options(group.ptr(), options, lr, may_be_kept)) return false;
  }
  return true;
}

bool SgdReader::is_stock(PyObject* predicate, PyObject* function, py::object& last_seen) {
  if (function == last_seen.ptr()) return true;
  if (!py::handle(predicate)(py::handle(function)).cast<bool>()) return false;
  last_seen = py::reinterpret_borrow<py::object>(function);
  return true;
}

bool SgdReader::check_step(PyObject* optimizer, PyObject* dict, Verdict& v, Watch& watch,
                           SgdReading& reading) {
  const PythonObjects& o = python_objects();
  const Names& n = o.names;
  PyTypeObject* const type = Py_TYPE(optimizer);
  if (v.against(!is_stock(o.is_stock_sgd_step, _PyType_Lookup(type, n.step), class_step_) ||
                    _PyType_Lookup(type, n.zero_grad) != o.sgd_zero_grad ||
                    !is_stock(o.is_stock_init_group, _PyType_Lookup(o.sgd, n.init_group),
                              class_init_group_),
                "SGD's step, zero_grad or _init_group has been replaced")) {
    return false;
  }
  PyObject* const step = get_item(dict, n.step);
  reading.step_is_scheduled = step != nullptr;
  if (v.against((step != nullptr && !is_stock(o.is_stock_sgd_step, step, instance_step_)) ||
                    get_item(dict, n.zero_grad) != nullptr ||
                    get_item(dict, n.init_group) != nullptr,
                "the optimizer's step, zero_grad or _init_group has been replaced on the "
                "instance")) {
    return false;
  }
  // step() runs with gradients on where the defaults, not the groups, say so.
  PyObject* const defaults = get_item(dict, n.defaults);
  watch.dict(defaults);
  if (v.against(defaults == nullptr || !PyDict_Check(defaults) ||
                    get_item(defaults, n.differentiable) != Py_False,
                "the optimizer's defaults say differentiable")) {
    return false;
  }
  for (PyObject* name : {n.step_pre_hooks, n.step_post_hooks}) {
    PyObject* const hooks = get_item(dict, name);
    watch.dict(hooks);
    if (v.against(!is_empty_dict(hooks), "the optimizer has step hooks")) return false;
  }
  return !v.against(
      get_item(dict, n.grad_scale) != nullptr || get_item(dict, n.found_inf) != nullptr,
      "a GradScaler is at work on the optimizer");
}

bool SgdReader::read(PyObject* optimizer, Verdict& v, Watch& watch, SgdReading& reading) {
  const PythonObjects& o = python_objects();
  const Names& n = o.names;
  const bool is_fused = Py_TYPE(optimizer) == o.fused_sgd;
  if (Py_TYPE(optimizer) != o.sgd && !is_fused) {
    return v.reject(std::string("the optimizer is ") + Py_TYPE(optimizer)->tp_name +
                    ", not torch.optim.SGD or fused_step.SGD itself");
  }
  const py::object dict_owner = dict_of(optimizer);
  PyObject* const dict = reading.dict = dict_owner.ptr();
  watch.root(optimizer, dict);
  if (!check_step(optimizer, dict, v, watch, reading)) return false;
  PyObject* const max_norm = is_fused ? get_item(dict, n.max_grad_norm) : nullptr;
  if (v.against(max_norm != nullptr && max_norm != Py_None, "the optimizer clips gradients")) {
    return false;
  }

  PyObject* const groups = get_item(dict, n.param_groups);
  if (groups == nullptr || !PyList_Check(groups)) {
    return v.reject("the optimizer has no list of param_groups");
  }
  watch.list(groups);
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    PyObject* const group = PyList_GET_ITEM(groups, g);
    watch.dict(group);
    PyObject* const params = PyDict_CheckExact(group) ? get_item(group, n.params) : nullptr;
    SgdOptions options;
    PyObject* device_lr = nullptr;
    if (params == nullptr || !PyList_Check(params) ||
        !read_sgd_options(group, options, device_lr, reading.may_be_kept)) {
      return v.reject(
          "a param group has an option that is not fused (lr, momentum, dampening and "
          "weight_decay as numbers of at most 60000, lr also as a tensor of one element "
          "without grad and of its own memory, differentiable=False), or lacks one");
    }
    PyObject* const momentum_dtype = is_fused ? get_item(group, n.momentum_dtype) : nullptr;
    if (v.against(momentum_dtype != nullptr && momentum_dtype != Py_None && options.momentum != 0.0,
                  "a param group has a momentum_dtype")) {
      return false;
    }
    watch.list(params);
    for (Py_ssize_t k = 0; k < PyList_GET_SIZE(params); ++k) {
      PyObject* const param = PyList_GET_ITEM(params, k);
      SgdParam* const known = param == reading.weight.object ? &reading.weight
                              : param == reading.bias.object ? &reading.bias
                                                             : nullptr;
      if (v.against(known == nullptr || known->in_groups,
                    "the optimizer's parameters are not exactly the layer's, once each")) {
        return false;
      }
      if (known == nullptr) continue;
      known->in_groups = true;
      known->options = options;
      known->lr = device_lr;
    }
  }
  if (v.against(
          !reading.weight.in_groups || (reading.bias.object != nullptr && !reading.bias.in_groups),
          "the optimizer does not hold all of the layer's parameters")) {
    return false;
  }
  for (SgdParam* p : {&reading.weight, &reading.bias}) {
    if (p->object == nullptr || p->options.momentum == 0.0) continue;
    PyObject* const state = get_item(dict, n.state);
    if (state == nullptr || !PyDict_Check(state) ||
        !read_buffer(state, p->object, n, watch, p->buf)) {
      return v.reject("the optimizer's momentum_buffer is not a plain tensor");
    }
    p->options.first_step = p->buf == nullptr;
    if (p->options.first_step) reading.may_be_kept = false;  // the step itself makes the buffer
  }
  return true;
}

NewBuffer::NewBuffer(PyObject* optimizer_dict, PyObject* param, const at::Tensor& buf)
    : buf_(py::reinterpret_steal<py::object>(to_python(buf))) {
  const py::handle state(get_item(optimizer_dict, python_objects().names.state));
  entry_ = state[py::handle(param)];
}

void NewBuffer::store() const {
  PyObject* const key = python_objects().names.momentum_buffer;
  const int failed = PyDict_CheckExact(entry_.ptr())
                         ? PyDict_SetItem(entry_.ptr(), key, buf_.ptr())
                         : PyObject_SetItem(entry_.ptr(), key, buf_.ptr());
  if (failed != 0) throw py::error_already_set();
}

void note_step_called(PyObject* optimizer_dict) {
  PyObject* const key = python_objects().names.opt_called;
  // Set only once: each setting is a change that a watch would see.
  if (get_item(optimizer_dict, key) == Py_True) return;
  if (PyDict_SetItem(optimizer_dict, key, Py_True) != 0) throw py::error_already_set();
}

}  // namespace fused_step
