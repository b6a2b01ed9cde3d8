// SPDX-License-Identifier: MIT
// What SgdStep reads of an optimizer at each step, from memory where nothing has changed.
#include <pybind11/cast.h>

#include <algorithm>

#include "bindings/python_bridge.h"
#include "bindings/python_objects.h"
#include "bindings/sgd_groups.h"
#include "bindings/sgd_step.h"
#include "bindings/watch.h"
#include "core/sgd_math.h"

namespace fused_step {

namespace py = pybind11;

namespace {

// False: an integer beyond the range of a double.
bool read_double(PyObject* number, double& value) {
  value = PyFloat_AsDouble(number);
  const bool failed = value == -1.0 && PyErr_Occurred() != nullptr;
  if (failed) PyErr_Clear();
  return !failed;
}

// One number that a GradScaler leaves on the optimizer: absent or None keeps `value`; one on CUDA
// is not read, which would wait for the device, but handed on.
bool read_scaler_value(PyObject* object, double& value, at::Tensor& on_device) {
  if (object == nullptr || object == Py_None) return true;
  if (PyLong_Check(object) || PyFloat_Check(object)) return read_double(object, value);
  if (!is_exact_tensor(object)) return false;
  const at::Tensor& t = tensor_of(object);
  if (t.is_cuda()) {
    if (!is_device_scalar(t) || t.scalar_type() != at::kFloat) return false;
    on_device = t;
    return true;
  }
  if (!has_plain_cpu_keys(t) || t.numel() != 1 || !has_its_storage(t)) return false;
  if (t.scalar_type() == at::kFloat) {
    value = *t.const_data_ptr<float>();
  } else if (t.scalar_type() == at::kDouble) {
    value = *t.const_data_ptr<double>();
  } else {
    return false;
  }
  return true;
}

}  // namespace

bool SgdStep::read_group(PyObject* dict, Group& group, cpu::SgdRule& rule, bool& is_repeat) {
  const Names& n = python_objects().names;
  if (!PyDict_CheckExact(dict)) return false;
  const uint64_t version = dict_version(dict);
  if (dict == group.dict && version == group.version && version != 0) return true;
  const bool had_momentum = rule.options.momentum != 0.0;
  PyObject* const lr_before = group.lr;
  bool may_be_kept = true;
  group.lr = nullptr;
  group.has_options = read_sgd_options(dict, rule.options, group.lr, may_be_kept);
  group.momentum_float = is_ours_ && is_float32(get_item(dict, n.momentum_dtype));
  if ((rule.options.momentum != 0.0) != had_momentum) {
    state_version_ = 0;
    is_repeat = false;
  }
  is_repeat = is_repeat && group.has_options && group.lr == lr_before;
  PyObject* const params = get_item(dict, n.params);
  if (params == nullptr || !PyList_CheckExact(params)) return false;
  group.dict = dict;
  group.params = params;
  group.version = may_be_kept ? version : 0;
  return true;
}

void SgdStep::read_state(PyObject* state) {
  const Names& n = python_objects().names;
  const uint64_t version = dict_version(state);
  const bool same = state == state_ && version == state_version_ && version != 0;
  const bool is_empty = PyDict_GET_SIZE(state) == 0;
  const bool has_momentum = std::any_of(rules_.begin(), rules_.end(), [](const cpu::SgdRule& rule) {
    return rule.options.momentum != 0.0;
  });
  if (!has_momentum && !has_entries_) return;
  has_entries_ = has_momentum;
  for (Slot& slot : slots_) {
    if (rules_[static_cast<size_t>(slot.group)].options.momentum == 0.0) {
      slot.entry = slot.buf = nullptr;  // the state may lose them unseen
      continue;
    }
    if (!same) {
      slot.entry = is_empty ? nullptr : PyDict_GetItemWithError(state, slot.param);
      if (slot.entry == nullptr && PyErr_Occurred()) throw py::error_already_set();
      slot.entry_version = 0;
    }
    if (slot.entry == nullptr) {
      slot.buf = nullptr;
      continue;
    }
    if (!PyDict_Check(slot.entry)) {
      slot.buf = slot.entry;  // no tensor: the parameter is left to torch
      continue;
    }
    const uint64_t entry_version = dict_version(slot.entry);
    if (entry_version == slot.entry_version && entry_version != 0) continue;
    PyObject* const buf = get_item(slot.entry, n.momentum_buffer);
    slot.buf = buf == Py_None ? nullptr : buf;
    slot.entry_version = entry_version;
  }
  state_ = state;
  state_version_ = version;
}

// Groups, parameters and state as they are now; from memory where nothing has changed.
bool SgdStep::read(PyObject* dict, bool& is_repeat) {
  const Names& n = python_objects().names;
  PyObject* const groups = get_item(dict, n.param_groups);
  PyObject* const state = get_item(dict, n.state);
  if (groups == nullptr || !PyList_CheckExact(groups) || state == nullptr || !PyDict_Check(state)) {
    return false;
  }
  const auto group_count = static_cast<size_t>(PyList_GET_SIZE(groups));
  bool same = groups == groups_list_ && group_count == groups_.size();
  if (!same) {
    groups_.assign(group_count, {});
    rules_.assign(group_count, {});
    groups_list_ = groups;
  }
  size_t count = 0;
  for (size_t g = 0; g < group_count; ++g) {
    const PyObject* const params_before = groups_[g].params;
    PyObject* const group = PyList_GET_ITEM(groups, static_cast<Py_ssize_t>(g));
    if (!read_group(group, groups_[g], rules_[g], is_repeat)) {
      groups_list_ = nullptr;
      return false;
    }
    PyObject* const params = groups_[g].params;
    same &= params == params_before;
    const auto size = static_cast<size_t>(PyList_GET_SIZE(params));
    same = same && count + size <= slots_.size();
    for (size_t k = 0; same && k < size; ++k) {
      const Slot& slot = slots_[count + k];
      same = slot.param == PyList_GET_ITEM(params, static_cast<Py_ssize_t>(k)) &&
             slot.group == static_cast<int32_t>(g);
    }
    count += size;
  }
  if (!same || count != slots_.size()) {
    is_repeat = false;
    slots_.clear();
    for (size_t g = 0; g < group_count; ++g) {
      PyObject* const params = groups_[g].params;
      for (Py_ssize_t k = 0; k < PyList_GET_SIZE(params); ++k) {
        Slot slot;
        slot.param = PyList_GET_ITEM(params, k);
        slot.group = static_cast<int32_t>(g);
        slots_.push_back(slot);
      }
    }
    state_version_ = 0;
  }
  read_state(state);
  return true;
}

bool SgdStep::read_scaling(PyObject* dict, Scaling& scaling) const {
  const Names& n = python_objects().names;
  double grad_scale = 1.0, found_inf = 0.0;
  if (!read_scaler_value(get_item(dict, n.grad_scale), grad_scale, scaling.grad_scale) ||
      !read_scaler_value(get_item(dict, n.found_inf), found_inf, scaling.found_inf)) {
    return false;
  }
  scaling.skips = found_inf != 0.0;
  if (grad_scale != 1.0) scaling.unscale = static_cast<double>(sgd_unscale(grad_scale));
  PyObject* const max_norm = is_ours_ ? get_item(dict, n.max_grad_norm) : nullptr;
  if (max_norm == nullptr || max_norm == Py_None) return true;
  if (!PyLong_Check(max_norm) && !PyFloat_Check(max_norm)) return false;
  return read_double(max_norm, scaling.max_norm.emplace());
}

}  // namespace fused_step
