// SPDX-License-Identifier: MIT
#include "bindings/squared_error.h"

#include <pybind11/cast.h>

#include <optional>
#include <string>

#include "bindings/code_readings.h"
#include "bindings/module_call.h"
#include "bindings/python_objects.h"

namespace fused_step {

namespace py = pybind11;

namespace {

// "mean" or "sum", as nn.MSELoss takes it.
bool read_reduction(PyObject* name, Verdict& v, SquaredError& reading) {
  const Names& n = python_objects().names;
  const auto is = [&](PyObject* other) {
    return name == other ||
           (name != nullptr && PyUnicode_CheckExact(name) && PyUnicode_Compare(name, other) == 0);
  };
  if (!is(n.mean) && !is(n.sum)) {
    return v.reject("the loss' reduction is neither 'mean' nor 'sum'");
  }
  reading.reduction = is(n.mean) ? Reduction::kMean : Reduction::kSum;
  return true;
}

// functools.partial(F.mse_loss, reduction=...).
bool read_partial(PyObject* loss, Verdict& v, SquaredError& reading) {
  const PythonObjects& o = python_objects();
  reading.may_be_kept = false;
  const py::handle partial(loss);
  const py::object function = py::getattr(partial, "func"), args = py::getattr(partial, "args"),
                   keywords = py::getattr(partial, "keywords");
  PyObject* const given = get_item(keywords.ptr(), o.names.reduction);
  if (function.ptr() != o.mse_loss_function || PyTuple_GET_SIZE(args.ptr()) != 0 ||
      PyDict_GET_SIZE(keywords.ptr()) != (given != nullptr ? 1 : 0)) {
    return v.reject("the loss is a partial of something else than F.mse_loss with a reduction");
  }
  return read_reduction(given != nullptr ? given : o.names.mean, v, reading);
}

// What read_squared_error() says of a function; null where that is no squared error.
PyObject* squared_error_of(PyObject* function, bool is_method) {
  static CodeReadings readings[2];
  return readings[is_method].of(function, [&](PyObject* unread) -> py::object {
    return py::handle(python_objects().read_squared_error)(py::handle(unread),
                                                           py::bool_(is_method));
  });
}

// Whether a path of names leads from a function's globals, through torch's own modules, to `end`.
bool leads_to(PyObject* globals, PyObject* path, PyObject* end, Watch& watch) {
  const PythonObjects& o = python_objects();
  if (!PyDict_CheckExact(globals)) return false;
  PyObject* const name = PyTuple_GET_ITEM(path, 0);
  PyObject* at = get_item(globals, name);
  // Each that it may be lives as long as the process: nothing else can have its address.
  const auto is_module = [&] {
    return at == o.torch_module || at == o.nn_module || at == o.functional_module;
  };
  if (at != end && !is_module()) return false;
  watch.item(globals, name, at);
  for (Py_ssize_t k = 1; k < PyTuple_GET_SIZE(path); ++k) {
    if (!is_module() || !PyModule_CheckExact(at)) return false;
    PyObject* const dict = PyModule_GetDict(at);
    watch.root(at, dict);
    at = get_item(dict, PyTuple_GET_ITEM(path, k));
  }
  return at == end;
}

// A function that computes it, or a class' forward(); `is` is what reasons say of the loss.
bool read_function(PyObject* function, bool is_method, const std::string& is, Verdict& v,
                   Watch& watch, SquaredError& reading) {
  const PythonObjects& o = python_objects();
  watch.code(function);
  PyObject* const read = squared_error_of(function, is_method);
  if (read == nullptr) return v.reject(is + " not read as a mean or sum of squared errors");
  PyObject* const calls = PyTuple_GET_ITEM(read, 1);
  reading.is_mse_loss = false;
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(calls); ++k) {
    PyObject* const call = PyTuple_GET_ITEM(calls, k);
    PyObject* const end = PyTuple_GET_ITEM(call, 1);
    reading.is_mse_loss |= end == o.mse_loss_function;
    if (!leads_to(PyFunction_GET_GLOBALS(function), PyTuple_GET_ITEM(call, 0), end, watch)) {
      return v.reject(is + " calling something else than PyTorch's functions");
    }
  }
  // The output is a Tensor, the target may be a Parameter.
  const bool is_stock = are_as_imported(o.loss_methods, o.tensor, watch) &&
                        are_as_imported(o.loss_methods, o.parameter, watch);
  return !v.against(!is_stock, kMethodReplaced) &&
         read_reduction(PyTuple_GET_ITEM(read, 0), v, reading);
}

// An nn.MSELoss, or a loss of the user's own class.
bool read_module(PyObject* loss, Verdict& v, Watch& watch, SquaredError& reading) {
  const PythonObjects& o = python_objects();
  PyTypeObject* const type = Py_TYPE(loss);
  const std::optional<ModuleClass> as_mse_loss = class_like(type, o.mse_loss);
  const std::optional<ModuleClass> own = as_mse_loss ? as_mse_loss : own_class(type);
  if (!own || own->forward == nullptr || !PyFunction_Check(own->forward)) {
    return v.reject(std::string("the loss is ") + type->tp_name +
                    ", whose calls or attributes are not those of nn.Module");
  }
  const py::object dict = dict_of(loss);
  if (!check_module(loss, dict.ptr(), *own, "the loss", v, watch)) return false;
  if (!as_mse_loss) {
    return read_function(own->forward, /*is_method=*/true,
                         std::string("the loss is ") + type->tp_name + ", whose forward is", v,
                         watch, reading);
  }
  if (v.against(_PyType_Lookup(type, o.names.reduction) != nullptr,
                "the loss' reduction is one of its class")) {
    return false;
  }
  return read_reduction(get_item(dict.ptr(), o.names.reduction), v, reading);
}

}  // namespace

bool read_loss(PyObject* loss, PyObject* model, Verdict& v, Watch& watch, SquaredError& reading) {
  const PythonObjects& o = python_objects();
  if (loss == Py_None) {
    // The model is a LinearMSELoss, and its dictionary is watched.
    const py::object dict = dict_of(model);
    return read_reduction(get_item(dict.ptr(), o.names.reduction), v, reading);
  }
  if (loss == o.mse_loss_function) return true;
  if (Py_TYPE(loss) == o.partial) return read_partial(loss, v, reading);
  if (PyFunction_Check(loss)) {
    return read_function(loss, /*is_method=*/false, "the loss is a function that is", v, watch,
                         reading);
  }
  if (PyType_IsSubtype(Py_TYPE(loss), o.module.type) != 0) {
    return read_module(loss, v, watch, reading);
  }
  return v.reject(std::string("the loss is ") + Py_TYPE(loss)->tp_name +
                  ", not nn.MSELoss, F.mse_loss or a function");
}

}  // namespace fused_step
