// SPDX-License-Identifier: MIT
#include "bindings/module_call.h"

#include <pybind11/cast.h>

#include <string>

#include "bindings/code_readings.h"

namespace fused_step {

namespace py = pybind11;

namespace {

// Whether it is a class of modules whose attributes are found as nn.Module finds them.
bool finds_attributes_as_module(PyTypeObject* type) {
  const PythonObjects& o = python_objects();
  const Names& n = o.names;
  return PyType_IsSubtype(type, o.module.type) != 0 &&
         _PyType_Lookup(type, n.getattr) == o.module_getattr &&
         _PyType_Lookup(type, n.getattribute) == o.module_getattribute &&
         Py_TYPE(_PyType_Lookup(type, n.dict)) == &PyGetSetDescr_Type;
}

// Whether objects of `own.type` are called as nn.Module's are, with that forward.
bool is_called_as_module(const ModuleClass& own) {
  const Names& n = python_objects().names;
  // Something of the class in front of what is in __dict__.
  for (PyObject* name :
       {n.modules, n.forward_hooks, n.forward_pre_hooks, n.backward_hooks, n.backward_pre_hooks}) {
    if (_PyType_Lookup(own.type, name) != nullptr) return false;
  }
  return finds_attributes_as_module(own.type) && own.is_as_imported(n) &&
         _PyType_Lookup(own.type, n.compiled_call_impl) == Py_None;
}

// What read_forward() says of a function; null where it could not read just now.
PyObject* forward_of(PyObject* function) {
  static CodeReadings readings;
  return readings.of(function, [](PyObject* unread) -> py::object {
    return py::handle(python_objects().read_forward)(py::handle(unread));
  });
}

// Of the name that fused_step/_forward.py has for it.
Flattening flattening_named(const std::string& name) {
  if (name == "last") return Flattening::kLast;
  return name == "of two" ? Flattening::kOfTwo : Flattening::kAllOnes;
}

// The module at the place `number` in a ModuleList or Sequential; null where `owner` is none.
PyObject* module_at(PyObject* owner, PyObject* number, Watch& watch) {
  const PythonObjects& o = python_objects();
  if (Py_TYPE(owner) != o.module_list && Py_TYPE(owner) != o.sequential.type) return nullptr;
  const py::object dict = dict_of(owner);
  watch.root(owner, dict.ptr());
  PyObject* const modules = modules_of(dict.ptr(), watch);
  if (modules == nullptr) return nullptr;
  const py::object values = py::reinterpret_steal<py::object>(PyMapping_Values(modules));
  int overflow = 0;
  const Py_ssize_t size = PyList_GET_SIZE(values.ptr());
  const Py_ssize_t k = PyLong_AsLongAndOverflow(number, &overflow);
  if (overflow != 0 || k < -size || k >= size) return nullptr;
  return PyList_GET_ITEM(values.ptr(), k < 0 ? k + size : k);
}

// The module that `name` is as an attribute of `owner`, null where it is something else.
PyObject* module_named(PyObject* owner, PyObject* name, Watch& watch) {
  PyTypeObject* const type = Py_TYPE(owner);
  if (!finds_attributes_as_module(type) || _PyType_Lookup(type, name) != nullptr) return nullptr;
  const py::object dict = dict_of(owner);
  watch.root(owner, dict.ptr());
  PyObject* const modules = modules_of(dict.ptr(), watch);
  if (modules == nullptr || get_item(dict.ptr(), name) != nullptr) return nullptr;
  const Names& n = python_objects().names;
  for (PyObject* key : {n.parameters, n.buffers}) {  // where nn.Module looks first
    PyObject* const others = get_item(dict.ptr(), key);
    watch.dict(others);
    if (others == nullptr || !PyDict_CheckExact(others) || get_item(others, name) != nullptr) {
      return nullptr;
    }
  }
  PyObject* const module = get_item(modules, name);
  return module != Py_None ? module : nullptr;
}

}  // namespace

std::optional<ModuleClass> class_like(PyTypeObject* type, const ModuleClass& base) {
  if (type == base.type) return base;
  if (PyType_IsSubtype(type, base.type) == 0) return std::nullopt;
  ModuleClass own = base;
  own.type = type;
  return is_called_as_module(own) ? std::optional(own) : std::nullopt;
}

std::optional<ModuleClass> own_class(PyTypeObject* type) {
  const PythonObjects& o = python_objects();
  ModuleClass own = o.module;
  own.type = type;
  own.forward = _PyType_Lookup(type, o.names.forward);
  return is_called_as_module(own) ? std::optional(own) : std::nullopt;
}

bool are_as_imported(std::span<const TensorMethod> methods, PyTypeObject* type, Watch& watch) {
  watch.type(type);
  bool is_replaced = false;
  for (const TensorMethod& m : methods) is_replaced |= _PyType_Lookup(type, m.name) != m.method;
  return !is_replaced;
}

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
  bool has_hooks = false, is_made = true;
  for (PyObject* key :
       {n.forward_hooks, n.forward_pre_hooks, n.backward_hooks, n.backward_pre_hooks}) {
    PyObject* const hooks = get_item(dict, key);
    watch.dict(hooks);
    is_made &= hooks != nullptr;
    has_hooks |= !is_empty_dict(hooks);
  }
  if (v.against(!is_made, name, " has not called nn.Module.__init__")) return false;
  return !v.against(has_hooks, name, " has hooks");
}

PyObject* modules_of(PyObject* dict, Watch& watch) {
  PyObject* const modules = get_item(dict, python_objects().names.modules);
  if (modules == nullptr) return nullptr;
  if (PyDict_CheckExact(modules)) {
    watch.dict(modules);
    return modules;
  }
  // Sequential.pop() leaves one, whose move_to_end() gives it no new version.
  watch.unwatched(modules);
  return PyODict_CheckExact(modules) ? modules : nullptr;
}

bool read_last_call(PyObject* module, Verdict& v, Watch& watch, LastCall& call) {
  const PythonObjects& o = python_objects();
  PyTypeObject* const type = Py_TYPE(module);
  const auto reject = [&](const std::string& why) {
    return v.reject(std::string("the model does not end in nn.Linear itself but in ") +
                    type->tp_name + ", whose " + why);
  };
  const std::optional<ModuleClass> own = own_class(type);
  if (!own) return reject("calls or attributes are not those of nn.Module");
  if (own->forward == nullptr || !PyFunction_Check(own->forward)) {
    return reject("forward is not a function of the class");
  }
  const py::object dict = dict_of(module);
  if (!check_module(module, dict.ptr(), *own, type->tp_name, v, watch)) return false;
  const py::handle forward = forward_of(own->forward);
  if (!forward) return reject("forward could not be read: there is no memory or stack left");
  watch.code(own->forward);
  watch.defaults(own->forward);

  if (PyUnicode_Check(forward.ptr())) return reject("forward " + forward.cast<std::string>());
  PyObject* const path = PyTuple_GET_ITEM(forward.ptr(), 0);
  PyObject* const code = PyTuple_GET_ITEM(forward.ptr(), 1);
  PyObject* const flattening = PyTuple_GET_ITEM(forward.ptr(), 2);
  PyObject* last = module;
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(path); ++k) {
    PyObject* const step = PyTuple_GET_ITEM(path, k);
    last = PyLong_Check(step) ? module_at(last, step, watch) : module_named(last, step, watch);
    if (last == nullptr) return reject("forward does not end in a call of one of its modules");
  }
  call = {last, own->forward, code != Py_None ? code : nullptr,
          PyFunction_GET_DEFAULTS(own->forward), PyFunction_GET_KW_DEFAULTS(own->forward)};
  if (flattening != Py_None) {
    call.flattening =
        flattening_named(py::handle(PyTuple_GET_ITEM(flattening, 0)).cast<std::string>());
    call.flatten = PyTuple_GET_ITEM(flattening, 1);
  }
  return true;
}

bool check_flattening(Verdict& v, Watch& watch) {
  const PythonObjects& o = python_objects();
  return !v.against(!are_as_imported(o.flatten_methods, o.tensor, watch), kMethodReplaced);
}

PyObject* method_before(const LastCall& call, PyObject* self) {
  const auto steal = [](PyObject* object) {
    if (object == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(object);
  };
  const py::object function =
      steal(PyFunction_New(call.code, PyFunction_GET_GLOBALS(call.forward)));
  PyObject* const closure = PyFunction_GET_CLOSURE(call.forward);
  if ((closure != nullptr && PyFunction_SetClosure(function.ptr(), closure) != 0) ||
      (call.defaults != nullptr && PyFunction_SetDefaults(function.ptr(), call.defaults) != 0) ||
      (call.keyword_defaults != nullptr &&
       PyFunction_SetKwDefaults(function.ptr(), call.keyword_defaults) != 0)) {
    throw py::error_already_set();
  }
  return steal(PyMethod_New(function.ptr(), self)).release().ptr();
}

}  // namespace fused_step
