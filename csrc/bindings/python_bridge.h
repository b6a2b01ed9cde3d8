// SPDX-License-Identifier: MIT
// Between Python and C++: tensors, and calls whose errors become Python's. torch's headers for that
// take 15 s of compile time in each file that has them, so that python_bridge.cpp alone does.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

namespace fused_step {

// Whether `object` is a torch.Tensor or an nn.Parameter itself, no subclass.
bool is_exact_tensor(PyObject* object);

// Whether it is one of any class.
bool is_tensor(PyObject* object);

// The tensor of an object that is one; lives as long as the object.
const at::Tensor& tensor_of(PyObject* object);

// A new reference to the tensor's object.
PyObject* to_python(at::Tensor tensor);

// Whether a gradient may be another one once it is accumulated: by hooks, or in a dtype of its own.
bool changes_gradient(PyObject* object);

// Whether `object` is torch.float32.
bool is_float32(PyObject* object);

// Whether a profiler or another observer of PyTorch's operators is on.
bool is_observed();

// The body of a built-in function. It may throw, and PyTorch may warn in it.
using FastCall = PyObject* (*)(PyObject* self, PyObject* const* args, Py_ssize_t count);

// The result of the body, with exceptions and warnings made Python's.
PyObject* call_guarded(FastCall body, PyObject* self, PyObject* const* args, Py_ssize_t count);

template <FastCall kBody>
PyObject* guarded(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return call_guarded(kBody, self, args, count);
}

// Definition of a built-in function that takes positional arguments only.
template <FastCall kBody>
PyMethodDef fast_method(const char* name, const char* doc) {
  const auto any = reinterpret_cast<void (*)()>(guarded<kBody>);
  return {name, reinterpret_cast<PyCFunction>(any), METH_FASTCALL, doc};
}

// A new built-in function whose `self` is a capsule of `object`; it keeps `owner`, whose object
// that is, alive. For a small step the dispatch of a pybind11 method is a good part of the time.
PyObject* function_of(PyMethodDef& method, void* object, PyObject* owner);

}  // namespace fused_step
