// SPDX-License-Identifier: MIT
// Door 3: finds out at each step which parameters the fused loops and kernels may update, and
// updates them; the rest is left to torch's own loop.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <pybind11/pytypes.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "bindings/engines.h"
#include "bindings/memory.h"
#include "bindings/sgd_cpu.h"
#include "bindings/sgd_groups.h"
#include "bindings/sgd_items.h"

namespace fused_step {

// What a step does to the gradients when it has used them.
enum class ZeroGrad : int8_t { kNo, kToNone, kToZero };

// One per optimizer. What it remembers between steps are borrowed references, each compared with
// the optimizer before it is used.
class SgdStep {
 public:
  // A whole step. False, and nothing changed, where any of it is not for the fused loops: hooks, a
  // profiler that wants to see the step, a parameter that is no ordinary tensor of a served device.
  bool step(PyObject* optimizer, ZeroGrad zero_grad);

  // The update without hooks and profiler. Before it, so that nothing has changed when it raises,
  // update_left([(index of a group, [its parameters that are left to torch's loop])]) is called if
  // there are any. False, and nothing changed, where everything is left.
  bool update(PyObject* optimizer, const pybind11::object& update_left);

 private:
  struct Group {
    PyObject* dict = nullptr;
    uint64_t version = 0;         // of dict; 0: to be read again
    PyObject* params = nullptr;   // the list in dict
    bool has_options = false;     // false: an option is not for the fused loops
    bool momentum_float = false;  // momentum_dtype is float32
    PyObject* lr = nullptr;       // a tensor on CUDA, instead of the rule's
  };
  static constexpr size_t kNoWork = SIZE_MAX;
  // A parameter of a group, and what the optimizer's state has for it.
  struct Slot {
    PyObject* param = nullptr;
    int32_t group = 0;
    PyObject* entry = nullptr;  // state[param], null if absent
    uint64_t entry_version = 0;
    PyObject* buf = nullptr;             // entry["momentum_buffer"], null if absent or None
    size_t place = 0;                    // where its gradient lay among the ranges that are written
    size_t work = kNoWork;               // index of its work
    const PyTypeObject* type = nullptr;  // of param if it is an exact tensor: types that never go
    const at::Tensor* tensor = nullptr;  // what it holds then
  };
  // What the checks of a parameter and its gradient read, to be prefetched at the next step. Never
  // read through: by then it may be gone.
  struct LookedAt {
    const c10::TensorImpl* param;
    const c10::TensorImpl* grad;
    const c10::StorageImpl* param_storage;
    const c10::StorageImpl* grad_storage;
    const PyObject* grad_object;  // of Python, null where it has not seen the gradient

    LookedAt(const at::Tensor& param, const at::Tensor& grad);
    void prefetch() const;
  };
  // Gradients that lie elsewhere than at the last step: whether any does, and the place of the
  // last.
  struct Moved {
    bool any = false;
    size_t place = 0;
  };
  // A parameter with a gradient that this step updates; its slice is the item of the same index.
  // Not held: a reference more and one less take the GIL, 0.02 us for each tensor.
  struct Work {
    Slot* slot;
    const at::Tensor* param;
    const at::Tensor* grad;
    const at::Tensor* buf;     // null before the first step and without momentum
    c10::DispatchKeySet keys;  // of all three: ordinary tensors of the parameter's kind of device
    caffe2::TypeMeta dtype;    // of the parameter
    LookedAt looked_at;
  };
  // The same held, for while the loops run another thread may have the GIL. The objects hold the
  // tensors that Work points to.
  struct Held {
    pybind11::object param;
    pybind11::object buf;
    at::Tensor grad;
  };
  // What a GradScaler and max_grad_norm want of this step.
  struct Scaling {
    bool skips = false;  // found_inf
    double unscale = 1.0;
    at::Tensor grad_scale;  // [] on CUDA, instead of `unscale`
    at::Tensor found_inf;   // [] on CUDA, instead of `skips`
    std::optional<double> max_norm;

    bool is_on_device() const { return grad_scale.defined() || found_inf.defined(); }
    bool unscales() const { return unscale != 1.0 || grad_scale.defined(); }
  };

  // `is_repeat` becomes false where anything is other than at the last step that the work, the list
  // of what to update, depends on: a change of the options' values alone is none.
  bool read(PyObject* dict, bool& is_repeat);
  bool read_group(PyObject* dict, Group& group, cpu::SgdRule& rule, bool& is_repeat);
  void read_state(PyObject* state);
  bool read_scaling(PyObject* dict, Scaling& scaling) const;
  // False: everything is to be left. What is left by itself is in left_.
  bool gather(PyObject* optimizer, PyObject* dict, ZeroGrad zero_grad, Scaling& scaling);
  bool add_work(Slot& slot, const at::Tensor& param, const at::Tensor& grad, bool writes_grads,
                const Scaling& scaling);
  bool add_all(bool writes_grads, const Scaling& scaling);
  bool is_as_before(Slot& slot, bool writes_grads, Moved& moved);
  bool all_are_as_before(bool writes_grads);
  void survey_items();
  bool is_for_cuda(const Slot& slot, c10::Device device, const Scaling& scaling) const;
  bool is_disjoint(bool writes_grads, const Scaling& scaling);
  bool is_on_one_device() const;
  std::vector<NewBuffer> make_buffers(PyObject* dict, const Scaling& scaling);
  std::vector<Held> hold();
  void bump_versions(size_t begin, size_t end, bool wrote_grads) const;
  void leave_optimizer(PyObject* dict, const std::vector<NewBuffer>& new_bufs,
                       const at::Tensor& norm);
  void drop_grads();
  std::vector<at::Tensor> device_lrs() const;
  at::Tensor update_items(const std::vector<at::Tensor>& lrs, const Scaling& scaling,
                          GradAfter grad_after);
  at::Tensor update_cpu_items(const std::vector<SgdItem>& items, const Scaling& scaling,
                              ItemsUpdated updated);
  void run(PyObject* dict, const Scaling& scaling, ZeroGrad zero_grad);

  bool is_ours_ = false;  // a fused_step.SGD, with options of its own
  PyObject* groups_list_ = nullptr;
  std::vector<Group> groups_;
  std::vector<Slot> slots_;
  PyObject* state_ = nullptr;
  uint64_t state_version_ = 0;
  bool has_entries_ = false;         // some slot may have one
  std::vector<cpu::SgdRule> rules_;  // by group

  // Of this step, and until the next one: most of it is the same then.
  std::vector<Work> work_;
  std::vector<SgdItem> items_;
  bool is_repeatable_ = false;  // work_ and items_ are of the optimizer as it was, and disjoint
  bool wrote_grads_ = false;    // they were made for a step that writes gradients
  bool grads_moved_ = false;    // some gradient lies elsewhere than at the last step
  bool has_cpu_items_ = false;
  bool has_cuda_items_ = false;
  bool has_first_steps_ = false;
  std::vector<Slot*> left_;
  std::vector<Extent> written_;  // of this step, in order of the items
  std::vector<Extent> checked_;  // of the last step whose ranges were found disjoint
  std::vector<Extent> sorted_;   // checked_ by address
  SgdCudaMemory cuda_memory_;
  bool busy_ = false;  // a step is under way, in another thread

  struct InUse {
    explicit InUse(SgdStep& step) : step(step) { step.busy_ = true; }
    ~InUse() { step.busy_ = false; }
    SgdStep& step;
  };
};

// `step`.step, kept alive by its Python object `self`, as a built-in function: for a small step the
// dispatch of a pybind11 method is a good part of the time.
pybind11::object sgd_step_function(SgdStep& step, const pybind11::object& self);

}  // namespace fused_step
