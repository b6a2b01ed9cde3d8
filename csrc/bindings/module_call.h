// SPDX-License-Identifier: MIT
// What a call of a module is: nothing but its class' forward()? And where that is of the user's own
// class, does it end in a call of another module?
#pragma once

#include <Python.h>

#include "bindings/flattening.h"
#include "bindings/python_objects.h"
#include "bindings/verdict.h"
#include "bindings/watch.h"

namespace fused_step {

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
