// SPDX-License-Identifier: MIT
#include "bindings/linear_model.h"

#include <pybind11/cast.h>

#include <optional>
#include <string>

#include "bindings/python_bridge.h"
#include "bindings/python_objects.h"

namespace fused_step {

namespace py = pybind11;

namespace {

bool check_functional(Verdict& v, Watch& watch) {
  const PythonObjects& o = python_objects();
  bool is_replaced = get_item(o.functional, o.names.linear) != o.linear_function ||
                     get_item(o.functional, o.names.mse_loss) != o.mse_loss_function;
  watch.dict(o.functional);
  for (PyObject* user : o.functional_users) {
    is_replaced |= get_item(user, o.names.F) != o.functional_module;
    watch.dict(user);
  }
  if (v.against(is_replaced, "F.linear or F.mse_loss has been replaced")) return false;
  if (v.against(!are_as_imported(o.step_methods, o.tensor, watch), kMethodReplaced)) return false;
  watch.dict(o.autograd);
  return !v.against(get_item(o.autograd, o.names.backward) != o.backward_function,
                    "torch.autograd.backward has been replaced");
}

bool read_layer(PyObject* linear, const ModuleClass& as_linear, Verdict& v, Watch& watch,
                LinearModel& reading) {
  const Names& n = python_objects().names;
  const py::object dict = dict_of(linear);
  if (!check_module(linear, dict.ptr(), as_linear, "the linear layer", v, watch)) return false;
  PyObject* const parameters = get_item(dict.ptr(), n.parameters);
  watch.dict(parameters);
  PyObject* const weight = parameters != nullptr && PyDict_CheckExact(parameters)
                               ? get_item(parameters, n.weight)
                               : nullptr;
  PyObject* const bias = weight != nullptr ? get_item(parameters, n.bias) : nullptr;
  // An attribute of the same name hides the parameter: in __dict__ (pruning, FSDP), or of the class
  // (parametrizations).
  bool hidden = false;
  for (PyObject* name : {n.weight, n.bias}) {
    hidden |=
        get_item(dict.ptr(), name) != nullptr || _PyType_Lookup(as_linear.type, name) != nullptr;
  }
  if (weight == nullptr || bias == nullptr || hidden || !is_tensor(weight) ||
      (bias != Py_None && !is_tensor(bias)))
    return v.reject("the layer's weight and bias are not Parameters of its own");
  reading.linear = linear;
  reading.weight = weight;
  if (bias != Py_None) reading.bias = bias;
  return true;
}

// Whether it is nn.Flatten(0) or nn.Flatten(0, 1).
bool flattens_two(PyObject* module, Verdict& v, Watch& watch) {
  const PythonObjects& o = python_objects();
  if (Py_TYPE(module) != o.flatten.type) return false;
  const py::object dict = dict_of(module);
  PyObject* const first = get_item(dict.ptr(), o.names.start_dim);
  PyObject* const last = get_item(dict.ptr(), o.names.end_dim);
  const auto is = [](PyObject* number, long value) {
    int overflow = 0;
    return number != nullptr && PyLong_CheckExact(number) &&
           PyLong_AsLongAndOverflow(number, &overflow) == value && overflow == 0;
  };
  return check_module(module, dict.ptr(), o.flatten, "nn.Flatten", v, watch) && is(first, 0) &&
         (is(last, -1) || is(last, 1));
}

// One may end in itself.
constexpr int kMaxDepth = 100;

// Goes from the model to its last layer. `body` null: nothing may come before it.
bool read_way_to_layer(PyObject* model, Verdict& v, Watch& watch, LinearModel& reading,
                       std::vector<BodyPart>* body) {
  const PythonObjects& o = python_objects();
  PyObject* last = model;
  const auto add = [&](const BodyPart& part, const char* whose) {
    if (body != nullptr) {
      body->push_back(part);
    } else if (part.does_something()) {
      return v.reject(std::string("the model is more than one nn.Linear: ") +
                      Py_TYPE(last)->tp_name + whose);
    }
    return true;
  };
  const auto flatten = [&](Flattening how, PyObject* callable) {
    if (reading.flattening != Flattening::kNone) return v.reject("the model flattens twice");
    if (!check_flattening(v, watch)) return false;
    reading.flattening = how;
    reading.flatten = callable;
    return true;
  };
  for (int depth = 0; depth < kMaxDepth; ++depth) {
    const std::optional<ModuleClass> as_linear = class_like(Py_TYPE(last), o.linear);
    if (as_linear) return read_layer(last, *as_linear, v, watch, reading);
    const std::optional<ModuleClass> as_sequential = class_like(Py_TYPE(last), o.sequential);
    if (!as_sequential) {
      LastCall call;
      if (!read_last_call(last, v, watch, call)) return false;
      if (call.flatten != nullptr && !flatten(call.flattening, call.flatten)) return false;
      if (!add({last, call, 0}, "'s forward does more than to call it")) return false;
      last = call.module;
      continue;
    }
    const py::object dict = dict_of(last);
    if (!check_module(last, dict.ptr(), *as_sequential, "a Sequential", v, watch)) return false;
    if (v.against(_PyType_Lookup(as_sequential->type, o.names.iter) != o.sequential_iter,
                  "a Sequential has an __iter__ of its own")) {
      return false;
    }
    PyObject* const modules = modules_of(dict.ptr(), watch);
    if (modules == nullptr || PyDict_GET_SIZE(modules) == 0) {
      return v.reject("a Sequential is empty");
    }
    const py::object inner = py::reinterpret_steal<py::object>(PyMapping_Values(modules));
    Py_ssize_t count = PyList_GET_SIZE(inner.ptr());
    const auto module = [&](Py_ssize_t k) { return PyList_GET_ITEM(inner.ptr(), k); };
    if (count > 1 && flattens_two(module(count - 1), v, watch)) {
      --count;
      if (!flatten(Flattening::kOfTwo, module(count))) return false;
    }
    if (!add({last, {}, count - 1}, " of several modules")) return false;
    last = module(count - 1);
  }
  return v.reject("too many modules are nested");
}

// The layer of a LinearMSELoss, which is the model.
bool read_layer_of_loss(PyObject* model, Verdict& v, Watch& watch, LinearModel& reading) {
  const PythonObjects& o = python_objects();
  if (Py_TYPE(model) != o.linear_mse_loss.type) {
    return v.reject(std::string("the model is ") + Py_TYPE(model)->tp_name +
                    ", not LinearMSELoss itself");
  }
  const py::object dict = dict_of(model);
  if (!check_module(model, dict.ptr(), o.linear_mse_loss, "the model", v, watch)) return false;
  PyObject* const modules = modules_of(dict.ptr(), watch);
  PyObject* const linear = modules != nullptr ? get_item(modules, o.names.linear) : nullptr;
  // An attribute of that name would hide it.
  if (linear == nullptr || Py_TYPE(linear) != o.linear.type || PyDict_GET_SIZE(modules) != 1 ||
      get_item(dict.ptr(), o.names.linear) != nullptr) {
    return v.reject("the model's only module is not its nn.Linear");
  }
  return read_layer(linear, o.linear, v, watch, reading);
}

}  // namespace

bool read_only_layer(PyObject* model, PyObject* loss, Verdict& v, Watch& watch,
                     LinearModel& reading) {
  if (!check_functional(v, watch)) return false;
  if (loss == Py_None) return read_layer_of_loss(model, v, watch, reading);
  return read_way_to_layer(model, v, watch, reading, nullptr);
}

bool read_last_layer(PyObject* model, Verdict& v, Watch& watch, LinearModel& reading,
                     std::vector<BodyPart>& body) {
  return check_functional(v, watch) && read_way_to_layer(model, v, watch, reading, &body);
}

}  // namespace fused_step
