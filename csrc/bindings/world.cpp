// SPDX-License-Identifier: MIT
#include "bindings/world.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/forward_grad.h>

#include "bindings/python_objects.h"

namespace fused_step {

bool check_world(Verdict& v, Autocast& autocast) {
  const PythonObjects& o = python_objects();
  if (v.against(!at::GradMode::is_enabled(),
                "gradients are disabled (no_grad or inference_mode)")) {
    return false;
  }
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  autocast.cpu = !keys.excluded_.has(c10::DispatchKey::AutocastCPU);
  autocast.cuda = !keys.excluded_.has(c10::DispatchKey::AutocastCUDA);
  constexpr c10::DispatchKeySet kAutocast(
      {c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA});
  if (v.against(keys.included_ != c10::default_included_set ||
                    (keys.excluded_ | kAutocast) != c10::default_excluded_set,
                "a mode is on that changes the dispatch of operators (functorch, tracing, a "
                "dispatch mode, inference_mode)")) {
    return false;
  }
  if (v.against(c10::impl::TorchDispatchModeTLS::any_modes_set(), "a TorchDispatchMode is on")) {
    return false;
  }
  if (v.against(at::impl::torch_function_mode_enabled(),
                "a TorchFunctionMode is on (torch.device as a context is one)")) {
    return false;
  }
  if (v.against(!at::SavedTensorDefaultHooks::get_tls_state().stack.empty(),
                "saved-tensor hooks are set")) {
    return false;
  }
  if (v.against(torch::autograd::AnomalyMode::is_enabled(), "anomaly detection is on")) {
    return false;
  }
  for (PyObject* hooks : o.global_module_hooks) {
    if (v.against(!is_empty_dict(hooks), "a global module hook is registered")) return false;
  }
  for (PyObject* hooks : o.global_optimizer_hooks) {
    if (v.against(!is_empty_dict(hooks), "a global optimizer hook is registered")) return false;
  }
  return true;
}

bool operators_are_plain() {
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  return keys.included_ == c10::default_included_set &&
         (keys.excluded_ | c10::autocast_dispatch_keyset) == c10::default_excluded_set &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         !at::impl::torch_function_mode_enabled() &&
         torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr;
}

}  // namespace fused_step
