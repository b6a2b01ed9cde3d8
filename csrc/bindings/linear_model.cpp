// SPDX-License-Identifier: MIT
#include "bindings/linear_model.h"

#include <pybind11/cast.h>

#include <string>

#include "bindings/python_bridge.h"
#include "bindings/python_objects.h"

namespace fused_step {

namespace py = pybind11;

namespace {

// A module whose type was checked: is a call of it nothing but its class' forward?
bool check_module(PyObject* module, PyObject* dict, const ModuleClass& module_class,
                  const char* name, Verdict& v, Watch& watch) {
  const Names& n = python_objects().names;
  watch.root(module, dict);
  if (v.against(!module_class.is_as_imported(n), name, ": its class has been changed"))
    return false;
  if (v.against(get_item(dict, n.forward) != nullptr, name, " has a forward of its own"))
    return false;
  if (v.against(get_item(dict, n.call_impl) != nullptr, name, " has a _call_impl of its own"))
    return false;
  PyObject* const compiled = get_item(dict, n.compiled_call_impl);
  if (v.against(compiled != nullptr && compiled != Py_None, name, " is compiled")) return false;
  bool has_hooks = false;
  for (PyObject* key :
       {n.forward_hooks, n.forward_pre_hooks, n.backward_hooks, n.backward_pre_hooks}) {
    PyObject* const hooks = get_item(dict, key);
    watch.dict(hooks);
    has_hooks |= !is_empty_dict(hooks);
  }
  return !v.against(has_hooks, name, " has hooks");
}

bool check_functional(Verdict& v, Watch& watch) {
  const PythonObjects& o = python_objects();
  watch.dict(o.functional);
  return !v.against(get_item(o.functional, o.names.linear) != o.linear_function ||
                        get_item(o.functional, o.names.mse_loss) != o.mse_loss_function,
                    "F.linear or F.mse_loss has been replaced");
}

// The modules inside of one whose dictionary is `dict`; null where that is no dictionary.
PyObject* modules_of(PyObject* dict, Watch& watch) {
  PyObject* const modules = get_item(dict, python_objects().names.modules);
  watch.dict(modules);
  return modules != nullptr && PyDict_Check(modules) ? modules : nullptr;
}

bool read_layer(PyObject* linear, Verdict& v, Watch& watch, LinearModel& reading) {
  const PythonObjects& o = python_objects();
  const Names& n = o.names;
  const py::object dict = dict_of(linear);
  if (!check_module(linear, dict.ptr(), o.linear, "the linear layer", v, watch)) return false;
  PyObject* const parameters = get_item(dict.ptr(), n.parameters);
  watch.dict(parameters);
  PyObject* const weight = parameters != nullptr && PyDict_CheckExact(parameters)
                               ? get_item(parameters, n.weight)
                               : nullptr;
  PyObject* const bias = weight != nullptr ? get_item(parameters, n.bias) : nullptr;
  // An attribute of the same name in __dict__ hides the parameter (pruning, FSDP).
  const bool hidden =
      get_item(dict.ptr(), n.weight) != nullptr || get_item(dict.ptr(), n.bias) != nullptr;
  if (weight == nullptr || bias == nullptr || hidden || !is_tensor(weight) ||
      (bias != Py_None && !is_tensor(bias)))
    return v.reject("the layer's weight and bias are not Parameters of its own");
  reading.linear = linear;
  reading.weight = weight;
  if (bias != Py_None) reading.bias = bias;
  return true;
}

}  // namespace

bool read_only_layer(PyObject* model, PyObject* loss, Verdict& v, Watch& watch,
                     LinearModel& reading) {
  const PythonObjects& o = python_objects();
  const Names& n = o.names;
  if (!check_functional(v, watch)) return false;
  PyObject* linear = model;
  const bool gives_loss = loss == Py_None;
  const ModuleClass& outer = gives_loss ? o.linear_mse_loss : o.sequential;
  if (Py_TYPE(linear) == outer.type) {
    const py::object dict = dict_of(linear);
    if (!check_module(linear, dict.ptr(), outer, "the model", v, watch)) return false;
    PyObject* const modules = modules_of(dict.ptr(), watch);
    Py_ssize_t position = 0;
    PyObject* only = nullptr;
    const bool has_one = modules != nullptr && PyDict_GET_SIZE(modules) == 1 &&
                         PyDict_Next(modules, &position, nullptr, &only) &&
                         Py_TYPE(only) == o.linear.type;
    // LinearMSELoss asks for its layer by name, and an attribute of that name would hide it.
    const bool is_asked_for = !gives_loss || (has_one && get_item(modules, n.linear) == only &&
                                              get_item(dict.ptr(), n.linear) == nullptr);
    if (!has_one || !is_asked_for) {
      return v.reject(gives_loss
                          ? "the model's only module is not its nn.Linear"
                          : "the model is a Sequential of something else than one nn.Linear");
    }
    linear = only;
  } else if (gives_loss) {
    return v.reject(std::string("the model is ") + Py_TYPE(linear)->tp_name +
                    ", not LinearMSELoss itself");
  }
  if (Py_TYPE(linear) != o.linear.type) {
    return v.reject(std::string("the model is ") + Py_TYPE(linear)->tp_name +
                    ", not nn.Linear itself (or a Sequential of just one)");
  }
  return read_layer(linear, v, watch, reading);
}

constexpr int kMaxSequentials = 100;

bool read_last_layer(PyObject* model, Verdict& v, Watch& watch, LinearModel& reading,
                     std::vector<PyObject*>& body) {
  const PythonObjects& o = python_objects();
  if (!check_functional(v, watch)) return false;
  PyObject* last = model;
  for (int depth = 0; Py_TYPE(last) == o.sequential.type; ++depth) {
    if (depth == kMaxSequentials) {  // one may end in itself
      return v.reject("too many Sequentials are nested");
    }
    const py::object dict = dict_of(last);
    if (!check_module(last, dict.ptr(), o.sequential, "a Sequential", v, watch)) return false;
    PyObject* const modules = modules_of(dict.ptr(), watch);
    if (modules == nullptr || PyDict_GET_SIZE(modules) == 0)
      return v.reject("a Sequential is empty");
    Py_ssize_t position = 0, left = PyDict_GET_SIZE(modules);
    while (PyDict_Next(modules, &position, nullptr, &last) != 0) {
      if (--left > 0) body.push_back(last);
    }
  }
  if (Py_TYPE(last) != o.linear.type) {
    return v.reject(std::string("the model does not end in nn.Linear itself but in ") +
                    Py_TYPE(last)->tp_name +
                    " (a Sequential's last module is looked at, no other's)");
  }
  return read_layer(last, v, watch, reading);
}

bool read_loss(PyObject* loss, PyObject* model, Verdict& v, Watch& watch, LinearModel& reading) {
  const PythonObjects& o = python_objects();
  const Names& n = o.names;
  PyObject* reduction = n.mean;
  py::object owner;
  if (loss == Py_None) {
    // The model is a LinearMSELoss, and its dictionary is watched.
    owner = dict_of(model);
    reduction = get_item(owner.ptr(), n.reduction);
  } else if (Py_TYPE(loss) == o.mse_loss.type) {
    owner = dict_of(loss);
    if (!check_module(loss, owner.ptr(), o.mse_loss, "the loss", v, watch)) return false;
    reduction = get_item(owner.ptr(), n.reduction);
  } else if (Py_TYPE(loss) == o.partial) {
    // functools.partial(F.mse_loss, reduction=...), whose keywords may change unseen.
    reading.may_be_kept = false;
    const py::handle partial(loss);
    const py::object function = py::getattr(partial, "func"), args = py::getattr(partial, "args");
    owner = py::getattr(partial, "keywords");
    PyObject* const given = get_item(owner.ptr(), n.reduction);
    if (function.ptr() != o.mse_loss_function || PyTuple_GET_SIZE(args.ptr()) != 0 ||
        PyDict_GET_SIZE(owner.ptr()) != (given != nullptr ? 1 : 0))
      return v.reject("the loss is a partial of something else than F.mse_loss with a reduction");
    if (given != nullptr) reduction = given;
  } else if (loss != o.mse_loss_function) {
    return v.reject(std::string("the loss is ") + Py_TYPE(loss)->tp_name +
                    ", not nn.MSELoss itself or F.mse_loss");
  }
  const auto is = [&](PyObject* name) {
    return reduction == name || (reduction != nullptr && PyUnicode_CheckExact(reduction) &&
                                 PyUnicode_Compare(reduction, name) == 0);
  };
  if (is(n.mean)) {
    reading.reduction = Reduction::kMean;
  } else if (is(n.sum)) {
    reading.reduction = Reduction::kSum;
  } else
    return v.reject("the loss' reduction is neither 'mean' nor 'sum'");
  return true;
}

}  // namespace fused_step
