// SPDX-License-Identifier: MIT
#include "bindings/python_objects.h"

#include <pybind11/cast.h>

#include <initializer_list>

namespace fused_step {

namespace py = pybind11;

namespace {

PyObject* interned(const char* name) {
  PyObject* const object = PyUnicode_InternFromString(name);
  if (object == nullptr) throw py::error_already_set();
  return object;
}

Names make_names() {
  return {interned("forward"),
          interned("__call__"),
          interned("_call_impl"),
          interned("_wrapped_call_impl"),
          interned("_compiled_call_impl"),
          interned("__getattr__"),
          interned("__getattribute__"),
          interned("__dict__"),
          interned("__iter__"),
          interned("_buffers"),
          interned("start_dim"),
          interned("end_dim"),
          interned("F"),
          interned("_forward_hooks"),
          interned("_forward_pre_hooks"),
          interned("_backward_hooks"),
          interned("_backward_pre_hooks"),
          interned("_parameters"),
          interned("_modules"),
          interned("weight"),
          interned("bias"),
          interned("reduction"),
          interned("mean"),
          interned("sum"),
          interned("param_groups"),
          interned("state"),
          interned("step"),
          interned("zero_grad"),
          interned("_init_group"),
          interned("_optimizer_step_pre_hooks"),
          interned("_optimizer_step_post_hooks"),
          interned("grad_scale"),
          interned("found_inf"),
          interned("_opt_called"),
          interned("momentum_buffer"),
          interned("defaults"),
          interned("params"),
          interned("lr"),
          interned("momentum"),
          interned("dampening"),
          interned("weight_decay"),
          interned("nesterov"),
          interned("maximize"),
          interned("differentiable"),
          interned("foreach"),
          interned("fused"),
          interned("linear"),
          interned("mse_loss"),
          interned("backward"),
          interned("momentum_dtype"),
          interned("max_grad_norm"),
          interned("grad_norm")};
}

// Lives as long as the process: the references below are never given back.
PyObject* keep(const py::object& object) { return object.inc_ref().ptr(); }
PyTypeObject* keep_type(const py::object& object) {
  return reinterpret_cast<PyTypeObject*>(keep(object));
}

PyObject* class_attribute(PyTypeObject* type, PyObject* name) {
  return keep(py::reinterpret_borrow<py::object>(_PyType_Lookup(type, name)));
}

ModuleClass make_module_class(const py::object& type, const Names& names) {
  PyTypeObject* const t = keep_type(type);
  return {t, class_attribute(t, names.forward), class_attribute(t, names.call),
          class_attribute(t, names.call_impl), class_attribute(t, names.wrapped_call_impl)};
}

// pybind11's own import would take all of pybind11, 5 s of compile time.
py::object import_module(const char* name) {
  PyObject* const module = PyImport_ImportModule(name);
  if (module == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(module);
}

PythonObjects import_objects() {
  const py::object nn = import_module("torch.nn");
  const py::object module = import_module("torch.nn.modules.module");
  const py::object functional = import_module("torch.nn.functional");
  const py::object optimizer = import_module("torch.optim.optimizer");
  const py::object sgd = import_module("torch.optim").attr("SGD");
  PythonObjects o{};
  o.names = make_names();
  o.module = make_module_class(nn.attr("Module"), o.names);
  o.module_getattr = class_attribute(o.module.type, o.names.getattr);
  o.module_getattribute = class_attribute(o.module.type, o.names.getattribute);
  o.tensor = keep_type(import_module("torch").attr("Tensor"));
  const auto take_methods = [&](std::initializer_list<const char*> names, TensorMethod* methods) {
    for (const char* name : names) {
      PyObject* const key = interned(name);
      *methods++ = {key, class_attribute(o.tensor, key)};
    }
  };
  take_methods({"squeeze", "flatten", "view", "reshape", "__getitem__"}, o.flatten_methods);
  take_methods({"__sub__", "__rsub__", "__mul__", "__pow__", "pow", "square", "mean", "sum"},
               o.loss_methods);
  take_methods({"backward", "detach"}, o.step_methods);
  const py::object autograd = import_module("torch.autograd");
  o.autograd = keep(autograd.attr("__dict__"));
  o.backward_function = keep(autograd.attr("backward"));
  o.linear = make_module_class(nn.attr("Linear"), o.names);
  o.sequential = make_module_class(nn.attr("Sequential"), o.names);
  o.sequential_iter = class_attribute(o.sequential.type, o.names.iter);
  o.module_list = keep_type(nn.attr("ModuleList"));
  o.flatten = make_module_class(nn.attr("Flatten"), o.names);
  o.mse_loss = make_module_class(nn.attr("MSELoss"), o.names);
  o.sgd = keep_type(sgd);
  o.parameter = keep_type(nn.attr("Parameter"));
  o.partial = keep_type(import_module("functools").attr("partial"));
  o.sgd_zero_grad = class_attribute(o.sgd, o.names.zero_grad);
  o.torch_module = keep(import_module("torch"));
  o.nn_module = keep(nn);
  o.functional_module = keep(functional);
  o.functional = keep(functional.attr("__dict__"));
  o.functional_users[0] = keep(import_module("torch.nn.modules.linear").attr("__dict__"));
  o.functional_users[1] = keep(import_module("torch.nn.modules.loss").attr("__dict__"));
  o.linear_function = keep(functional.attr("linear"));
  o.mse_loss_function = keep(functional.attr("mse_loss"));
  o.global_module_hooks[0] = keep(module.attr("_global_forward_hooks"));
  o.global_module_hooks[1] = keep(module.attr("_global_forward_pre_hooks"));
  o.global_module_hooks[2] = keep(module.attr("_global_backward_hooks"));
  o.global_module_hooks[3] = keep(module.attr("_global_backward_pre_hooks"));
  o.global_optimizer_hooks[0] = keep(optimizer.attr("_global_optimizer_pre_hooks"));
  o.global_optimizer_hooks[1] = keep(optimizer.attr("_global_optimizer_post_hooks"));
  const py::object stock = import_module("fused_step._stock");
  o.is_stock_sgd_step = keep(stock.attr("is_stock_sgd_step"));
  o.is_stock_init_group = keep(stock.attr("is_stock_init_group"));
  o.read_forward = keep(import_module("fused_step._forward").attr("read_forward"));
  o.read_squared_error =
      keep(import_module("fused_step._squared_error").attr("read_squared_error"));
  return o;
}

}  // namespace

bool ModuleClass::is_as_imported(const Names& names) const {
  return _PyType_Lookup(type, names.forward) == forward &&
         _PyType_Lookup(type, names.call) == call &&
         _PyType_Lookup(type, names.call_impl) == call_impl &&
         _PyType_Lookup(type, names.wrapped_call_impl) == wrapped_call_impl;
}

namespace {

PythonObjects& objects() {
  static PythonObjects objects = import_objects();
  return objects;
}

}  // namespace

const PythonObjects& python_objects() { return objects(); }

void set_linear_mse_loss(PyObject* type) {
  objects().linear_mse_loss =
      make_module_class(py::reinterpret_borrow<py::object>(type), objects().names);
}

void set_sgd(PyObject* type) {
  objects().fused_sgd = keep_type(py::reinterpret_borrow<py::object>(type));
}

}  // namespace fused_step
