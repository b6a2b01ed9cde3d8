// SPDX-License-Identifier: MIT
// What a call of a module is: nothing but its class' forward()? And where that is of the user's own
// class, does it end in a call of another module?
#pragma once

#include <Python.h>

#include <optional>
#include <span>

#include "bindings/flattening.h"
#include "bindings/python_objects.h"
#include "bindings/verdict.h"
#include "bindings/watch.h"

namespace fused_step {

// `base` of the class `type`, if that is `base` itself or a subclass that is called alike, with the
// same forward().
std::optional<ModuleClass> class_like(PyTypeObject* type, const ModuleClass& base);

// The class of a module of the user's own, if its calls and attributes are nn.Module's and its
// forward() is a function.
std::optional<ModuleClass> own_class(PyTypeObject* type);

// Whether these methods of torch.Tensor, or of a subclass, are those of PyTorch.
bool are_as_imported(std::span<const TensorMethod> methods, PyTypeObject* type, Watch& watch);
constexpr const char* kMethodReplaced = "a method of torch.Tensor has been replaced";

// Of a module, with its __dict__, whose class is `module_class`: is calling it nothing but that
// class' forward? `name` is what reasons call it.
bool check_module(PyObject* module, PyObject* dict, const ModuleClass& module_class,
                  const char* name, Verdict& verdict, Watch& watch);

// The modules inside of one whose dictionary is `dict`, a dict or an OrderedDict; null where they
// are in something else.
PyObject* modules_of(PyObject* dict, Watch& watch);

// A forward() that returns what its last call, of `module`, gives, flattened or as it is.
// References are borrowed.
struct LastCall {
  PyObject* module = nullptr;
  PyObject* forward = nullptr;
  // forward() without that call: it returns the module and the argument. Lives as long as the
  // process. Null where the argument is forward()'s own input, and it does nothing else.
  PyObject* code = nullptr;
  // Of the arguments after its input, as its function has them.
  PyObject *defaults = nullptr, *keyword_defaults = nullptr;
  // What is done to the result, and a callable that does it, which lives as long as the process.
  Flattening flattening = Flattening::kNone;
  PyObject* flatten = nullptr;

  bool operator==(const LastCall&) const = default;
};

// Of a module of any class. False where its forward() is not such a one; the reason speaks of a
// model that ends in this module.
bool read_last_call(PyObject* module, Verdict& verdict, Watch& watch, LastCall& call);

// Whether torch.Tensor's methods that flatten are those of PyTorch.
bool check_flattening(Verdict& verdict, Watch& watch);

// A new reference to `call.code`, as a method of `self` beside its forward().
PyObject* method_before(const LastCall& call, PyObject* self);

}  // namespace fused_step
