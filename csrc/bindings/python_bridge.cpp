// SPDX-License-Identifier: MIT
#include "bindings/python_bridge.h"

#include <ATen/record_function.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include "bindings/python_objects.h"

namespace fused_step {

bool is_exact_tensor(PyObject* object) { return THPVariable_CheckExact(object); }

bool is_tensor(PyObject* object) { return THPVariable_Check(object); }

const at::Tensor& tensor_of(PyObject* object) { return THPVariable_Unpack(object); }

PyObject* to_python(at::Tensor tensor) { return THPVariable_Wrap(std::move(tensor)); }

namespace {

// Where the version of torch has it: another dtype for the gradient, or leave to have any.
template <typename Meta>
bool has_grad_dtype(const Meta& meta, at::ScalarType dtype) {
  if constexpr (requires { meta.grad_dtype_.has_value() || meta.allow_grad_dtype_mismatch_; }) {
    return meta.grad_dtype_.value_or(dtype) != dtype || meta.allow_grad_dtype_mismatch_;
  } else {
    return false;
  }
}

}  // namespace

bool changes_gradient(PyObject* object) {
  namespace impl = torch::autograd::impl;
  const auto* python = reinterpret_cast<THPVariable*>(object);
  const at::Tensor& t = THPVariable_Unpack(object);
  const auto* const meta = impl::get_autograd_meta(t);
  if (meta == nullptr) return false;
  if (has_grad_dtype(*meta, t.scalar_type())) return true;
  // After the last handle's remove() the empty dictionary stays.
  if (!meta->hooks_.empty() &&
      (meta->cpp_hooks_list_ != nullptr || !is_empty_dict(python->backward_hooks))) {
    return true;
  }
  if (meta->post_acc_grad_hooks_ != nullptr && !is_empty_dict(python->post_accumulate_grad_hooks)) {
    return true;
  }
  const auto accumulator = impl::try_get_grad_accumulator(t);
  return accumulator && (!accumulator->pre_hooks().empty() || !accumulator->post_hooks().empty());
}

bool is_float32(PyObject* object) {
  return object != nullptr && THPDtype_Check(object) &&
         reinterpret_cast<THPDtype*>(object)->scalar_type == at::kFloat;
}

bool is_observed() { return at::hasCallbacks(); }

PyObject* call_guarded(FastCall body, PyObject* self, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  return body(self, args, count);
  END_HANDLE_TH_ERRORS
}

PyObject* function_of(PyMethodDef& method, void* object, PyObject* owner) {
  PyObject* const capsule = PyCapsule_New(object, nullptr, [](PyObject* c) {
    Py_XDECREF(static_cast<PyObject*>(PyCapsule_GetContext(c)));
  });
  if (capsule == nullptr) return nullptr;
  Py_INCREF(owner);
  PyCapsule_SetContext(capsule, owner);
  PyObject* const function = PyCFunction_New(&method, capsule);
  Py_DECREF(capsule);  // the function's now
  return function;
}

}  // namespace fused_step
