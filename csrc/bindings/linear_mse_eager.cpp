// SPDX-License-Identifier: MIT
// linear_mse_loss for ordinary tensors in ordinary circumstances, as a built-in function: a call by
// way of torch.ops costs about 20 us, half of what a small forward pass takes.
#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/cast.h>
#include <pybind11/gil_simple.h>

#include <optional>
#include <string_view>

#include "bindings/engines.h"
#include "bindings/linear_mse.h"
#include "bindings/linear_mse_eager.h"
#include "bindings/memory.h"
#include "bindings/python_bridge.h"
#include "bindings/python_objects.h"

namespace fused_step {

namespace py = pybind11;

namespace {

// On the CPU or a GPU that is served, whether or not it is a view of another or requires grad.
bool is_ordinary(PyObject* object) {
  if (!is_exact_tensor(object)) return false;
  const at::Tensor& t = tensor_of(object);
  const bool is_plain = has_plain_cpu_keys(t) || (has_plain_keys(t) && is_served(t.device()));
  return is_plain && !t._fw_grad(0).defined();
}

// Autocast, functorch, tracing, inference mode and modes in Python all show here.
bool is_ordinary_world() {
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  return keys.included_ == c10::default_included_set &&
         keys.excluded_ == c10::default_excluded_set &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         !at::impl::torch_function_mode_enabled();
}

PyObject* call_linear_mse_loss(PyObject*, PyObject* const* args, Py_ssize_t count) {
  TORCH_CHECK_TYPE(count == 5, kLinearMse, ": expected 5 arguments, got ", count);
  PyObject *const input = args[0], *const weight = args[1], *const bias = args[2],
                  *const target = args[3], *const reduction = args[4];
  if (!is_ordinary_world() || !is_ordinary(input) || !is_ordinary(weight) || !is_ordinary(target) ||
      (bias != Py_None && !is_ordinary(bias)) || !PyUnicode_CheckExact(reduction) ||
      !is_fused_dtype(tensor_of(weight).scalar_type()) ||
      // Of two dtypes only under autocast.
      tensor_of(input).scalar_type() != tensor_of(weight).scalar_type()) {
    Py_RETURN_NONE;
  }
  Py_ssize_t length = 0;
  const char* const name = PyUnicode_AsUTF8AndSize(reduction, &length);
  if (name == nullptr) return nullptr;
  at::Tensor loss;
  {
    const py::gil_scoped_release_simple no_gil;
    loss = linear_mse_loss_autograd(tensor_of(input), tensor_of(weight),
                                    bias == Py_None ? std::nullopt : std::optional(tensor_of(bias)),
                                    tensor_of(target), {name, static_cast<size_t>(length)});
  }
  return to_python(std::move(loss));
}

PyMethodDef method = fast_method<call_linear_mse_loss>(
    "linear_mse_loss",
    "linear_mse_loss(input, linear_weight, linear_bias, target, reduction) -> Tensor | None");

}  // namespace

py::object linear_mse_loss_function() {
  return py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr));
}

}  // namespace fused_step
