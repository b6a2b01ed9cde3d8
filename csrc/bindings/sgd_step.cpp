// SPDX-License-Identifier: MIT
#include "bindings/sgd_step.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/impl/COWDeleter.h>
#include <pybind11/cast.h>
#include <pybind11/gil_simple.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>

#include "bindings/dtypes.h"
#include "bindings/extents.h"
#include "bindings/linear_mse_passes.h"
#include "bindings/python_bridge.h"
#include "bindings/python_objects.h"
#include "bindings/sgd_cpu.h"
#include "bindings/sgd_groups.h"
#include "bindings/watch.h"
#include "bindings/world.h"
#include "core/sgd_math.h"

namespace fused_step {

namespace py = pybind11;

namespace {

// A step on the CPU gives the GIL away where it takes 20 times as long as that costs: 0.1 us, and
// 0.02 us for each tensor that is held meanwhile. Above 1 M elements, about 1 ms, always.
bool is_worth_the_gil(int64_t elements, size_t tensors) {
  constexpr int64_t kElements = 64 * 1024, kElementsPerTensor = 4096, kMaxElements = 1024 * 1024;
  const int64_t least = kElements + kElementsPerTensor * static_cast<int64_t>(tensors);
  return elements > std::min(least, kMaxElements);
}

// So many parameters ahead, what the checks look at is asked for: that of 1000 parameters does not
// fit the L1 cache, and a step takes a tenth less.
constexpr size_t kPrefetchDistance = 6;

// What is done to so many tensors is worth a thread: some 30 ns each, most of them spent waiting
// for memory, against 2-5 us for a parallel region.
constexpr int64_t kTensorsPerThread = 256;

// Calls body(begin, end) for ranges that make up [0, count), on threads where there are many. The
// GIL stays with the caller, who waits: they may read Python objects, and change none.
template <typename Body>
void for_each_range(size_t count, const Body& body) {
  const auto n = static_cast<int64_t>(count);
  if (n < 2 * kTensorsPerThread) return body(size_t{0}, count);
  at::parallel_for(0, n, kTensorsPerThread, [&](int64_t begin, int64_t end) {
    body(static_cast<size_t>(begin), static_cast<size_t>(end));
  });
}

bool has_hooks_or_profiler(PyObject* dict) {
  const PythonObjects& o = python_objects();
  for (PyObject* hooks : o.global_optimizer_hooks) {
    if (!is_empty_dict(hooks)) return true;
  }
  return !is_empty_dict(get_item(dict, o.names.step_pre_hooks)) ||
         !is_empty_dict(get_item(dict, o.names.step_post_hooks)) || is_observed();
}

// The first element of a dense tensor on `device`, whose elements fill a range of memory without
// gaps. False for any other.
bool dense_memory(const at::Tensor& t, c10::Device device, bool writes, void*& data) {
  if (!has_plain_keys(t) || t.device() != device || !t.is_non_overlapping_and_dense()) return false;
  const c10::Storage& storage = t.unsafeGetTensorImpl()->unsafe_storage();
  const auto bytes_each = static_cast<int64_t>(t.dtype().itemsize());
  const int64_t begin = t.storage_offset() * bytes_each;
  // Less: it was freed or cut under the tensor.
  if (!storage || static_cast<int64_t>(storage.nbytes()) < begin + t.numel() * bytes_each) {
    return false;
  }
  char* const first =
      static_cast<char*>(writes ? storage.mutable_data() : const_cast<void*>(storage.data()));
  data = first + begin;
  return true;
}

// Whether the elements of two dense tensors lie in the same order.
bool same_order(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes()) return false;
  if (a.is_contiguous() && b.is_contiguous()) return true;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// The first element of a contiguous tensor of `n` elements of `bytes_each`, with these dispatch
// keys and this type, in a storage that holds all of it; null for any other, and for one that is to
// be written and copies on write: tensors may share it, and none is copied here.
void* contiguous_data(const c10::TensorImpl& t, c10::DispatchKeySet keys, caffe2::TypeMeta dtype,
                      int64_t n, int64_t bytes_each, bool writes) {
  if (t.key_set() != keys || t.dtype() != dtype || t.numel() != n || !t.is_contiguous()) {
    return nullptr;
  }
  const c10::Storage& storage = t.unsafe_storage();
  const int64_t begin = t.storage_offset() * bytes_each;
  if (!storage || static_cast<int64_t>(storage.nbytes()) < begin + n * bytes_each) return nullptr;
  if (writes && storage.data_ptr().get_deleter() == c10::impl::cow::cow_deleter) return nullptr;
  void* const data = writes ? storage.mutable_data() : const_cast<void*>(storage.data());
  return static_cast<char*>(data) + begin;
}

// Whether two tensors of as many elements have the same sizes.
bool same_sizes(const c10::TensorImpl& a, const c10::TensorImpl& b) {
  const int64_t dim = a.dim();
  return dim == b.dim() && (dim == 1 || a.sizes() == b.sizes());
}

bool storage_of(at::ScalarType param, at::ScalarType buf, SgdStorage& storage) {
  const bool float_buf = buf == at::kFloat;
  switch (param) {
    case at::kFloat:
      storage = SgdStorage::kFloat;
      return buf == param;
    case at::kDouble:
      storage = SgdStorage::kDouble;
      return buf == param;
    case at::kBFloat16:
      storage = float_buf ? SgdStorage::kBFloat16FloatBuf : SgdStorage::kBFloat16;
      return float_buf || buf == param;
    case at::kHalf:
      storage = float_buf ? SgdStorage::kFloat16FloatBuf : SgdStorage::kFloat16;
      return float_buf || buf == param;
    default:
      return false;
  }
}

// param.grad(), which asks first whether there may be one.
const at::Tensor& grad_of(const at::Tensor& param) {
  const at::Tensor& grad = param.unsafeGetTensorImpl()->grad();
  return grad.defined() ? grad : param.grad();
}

// Memory of a tensor that torch's loop will read or write, as far as it can be told.
Extent extent_of_left(const at::Tensor& t) {
  const bool is_told = t.defined() && (t.is_cpu() || t.is_cuda()) && t.layout() == at::kStrided &&
                       !t.key_set().has(c10::DispatchKey::Python) && t.has_storage();
  return is_told ? extent_of(t) : Extent{0, 0};
}

// Whether it is of no class with operators of its own. A gradient has a Python object only where
// Python has seen it.
bool is_exact(const c10::TensorImpl& t) {
  PyObject* const object = t.pyobj_slot()->load_pyobj();
  return object == nullptr || is_exact_tensor(object);
}

}  // namespace

SgdStep::LookedAt::LookedAt(const at::Tensor& param, const at::Tensor& grad)
    : param(param.unsafeGetTensorImpl()),
      grad(grad.unsafeGetTensorImpl()),
      param_storage(this->param->unsafe_storage().unsafeGetStorageImpl()),
      grad_storage(this->grad->unsafe_storage().unsafeGetStorageImpl()),
      grad_object(this->grad->pyobj_slot()->load_pyobj()) {}

// One line of each storage, and those of a TensorImpl that hold keys, sizes and type. Asking for
// all their lines costs what it gains.
void SgdStep::LookedAt::prefetch() const {
  const auto line = [](const void* object, int number) {
    __builtin_prefetch(static_cast<const char*>(object) + 64 * number);
  };
  line(param, 1);
  line(param, 2);
  line(grad, 0);
  line(grad, 1);
  line(grad, 2);
  line(param_storage, 0);
  line(grad_storage, 0);
}

// Whether the kernels may update a parameter on `device` under its group's options.
bool SgdStep::is_for_cuda(const Slot& slot, c10::Device device, const Scaling& scaling) const {
  const auto g = static_cast<size_t>(slot.group);
  if (!device.is_cuda() || !is_served(device)) return false;
  if (groups_[g].lr != nullptr) {
    const at::Tensor& lr = tensor_of(groups_[g].lr);
    const bool is_read = lr.scalar_type() == at::kFloat || lr.scalar_type() == at::kDouble;
    if (!is_device_scalar(lr) || !is_read || lr.device() != device) return false;
  }
  // Whether the scaler skips this step is known to the device alone. The buffer of a first step is
  // made of zeros then, and if it is skipped the next one averages it as a history: that is the
  // first step's rule only where g is not dampened.
  const SgdOptions& o = rules_[g].options;
  const bool is_first = o.momentum != 0.0 && slot.buf == nullptr;
  return !is_first || !scaling.found_inf.defined() ||
         (o.dampening == 0.0 && std::isfinite(o.momentum));
}

// False: the parameter is left to torch.
bool SgdStep::add_work(Slot& slot, const at::Tensor& param, const at::Tensor& grad,
                       bool writes_grads, const Scaling& scaling) {
  const auto g = static_cast<size_t>(slot.group);
  const bool has_momentum = rules_[g].options.momentum != 0.0;
  const c10::Device device = param.device();
  void *param_data = nullptr, *grad_data = nullptr, *buf_data = nullptr;
  // A tensor that copies on write is copied when its memory is asked for to be written.
  if (!groups_[g].has_options || grad.scalar_type() != param.scalar_type() ||
      !is_exact(*grad.unsafeGetTensorImpl()) || !same_order(param, grad) ||
      !dense_memory(grad, device, writes_grads, grad_data)) {
    return false;
  }
  const bool on_cpu = device.is_cpu();
  if (on_cpu ? groups_[g].lr != nullptr || scaling.is_on_device()
             : !is_for_cuda(slot, device, scaling)) {
    return false;
  }
  const at::ScalarType dtype = param.scalar_type();
  const bool is_16_bit = dtype == at::kHalf || dtype == at::kBFloat16;
  at::ScalarType buf_dtype = is_16_bit && groups_[g].momentum_float ? at::kFloat : dtype;
  const at::Tensor* buf = nullptr;
  if (has_momentum && slot.buf != nullptr) {
    if (!is_exact_tensor(slot.buf)) return false;
    buf = &tensor_of(slot.buf);
    if (!same_order(param, *buf) || buf->requires_grad() ||
        !dense_memory(*buf, device, true, buf_data)) {
      return false;
    }
    buf_dtype = buf->scalar_type();
  }
  SgdItem item{};
  if (!storage_of(dtype, buf_dtype, item.storage) ||
      !dense_memory(param, device, true, param_data)) {
    return false;
  }
  item.device = on_cpu ? kOnCpu : device.index();
  item.group = slot.group;
  item.slice = {param_data, grad_data, buf_data, param.numel(), has_momentum && buf == nullptr};
  slot.work = work_.size();
  items_.push_back(item);
  work_.push_back(
      {&slot, &param, &grad, buf, param.key_set(), param.dtype(), LookedAt(param, grad)});
  return true;
}

// Whether the slot's work is the last step's, but for where its gradient lies, which is clear of
// all that is written. For contiguous tensors it takes half the instructions of add_work, which any
// other goes through again. Called for many slots at once: it takes no reference, and touches
// nothing that two slots may share. Flattened: with calls of torch's accessors it takes 300
// instructions, now 240.
__attribute__((flatten)) bool SgdStep::is_as_before(Slot& slot, bool writes_grads, Moved& moved) {
  if (Py_TYPE(slot.param) != slot.type) return false;
  const at::Tensor& param = *slot.tensor;
  const c10::TensorImpl& p = *param.unsafeGetTensorImpl();
  const at::Tensor& grad = p.grad();
  if (slot.work == kNoWork) return !grad.defined();
  if (!grad.defined()) return false;
  Work& work = work_[slot.work];
  SgdItem& item = items_[slot.work];
  cpu::SgdSlice& slice = item.slice;
  if (slice.first_step) return false;
  const c10::TensorImpl& g = *grad.unsafeGetTensorImpl();
  const int64_t bytes_each = param_bytes(item.storage);
  // Of an lr on CUDA, too, type and place would have to be looked at.
  if (item.device != kOnCpu &&
      (g.device().index() != item.device || groups_[item.group].lr != nullptr)) {
    return false;
  }
  const c10::DispatchKeySet keys = work.keys;
  void* const grad_data = contiguous_data(g, keys, work.dtype, slice.n, bytes_each, writes_grads);
  // An object that was looked at before is not touched: it would be one more line of memory.
  const bool is_known =
      &g == work.looked_at.grad && g.pyobj_slot()->load_pyobj() == work.looked_at.grad_object;
  if (grad_data == nullptr || !(is_known || is_exact(g)) || !same_sizes(p, g) ||
      contiguous_data(p, keys, work.dtype, slice.n, bytes_each, true) != slice.param) {
    return false;
  }
  if (slice.buf != nullptr) {
    if (slot.buf == nullptr || !is_exact_tensor(slot.buf)) return false;
    work.buf = &tensor_of(slot.buf);
    const c10::TensorImpl& buf = *work.buf->unsafeGetTensorImpl();
    const caffe2::TypeMeta dtype =
        has_float_buf(item.storage) ? caffe2::TypeMeta::Make<float>() : work.dtype;
    if (!same_sizes(p, buf) || work.buf->requires_grad() ||
        contiguous_data(buf, keys, dtype, slice.n, buf_bytes(item.storage), true) != slice.buf) {
      return false;
    }
  }
  if (grad_data != slice.grad) {
    moved.any = true;
    if (!is_clear_of(sorted_, range_of(grad_data, slice.n * bytes_each), slot.place, moved.place)) {
      return false;
    }
    moved.place = slot.place;
    slice.grad = grad_data;
  }
  work.param = &param;
  work.grad = &grad;
  work.looked_at = LookedAt(param, grad);
  return true;
}

// Whether all slots' work is the last step's. It changes nothing but where the items' gradients
// lie.
bool SgdStep::all_are_as_before(bool writes_grads) {
  std::atomic<bool> all = true, grads_moved = false;
  for_each_range(slots_.size(), [&](size_t begin, size_t end) {
    Moved moved;
    for (size_t k = begin; k < end && all.load(std::memory_order_relaxed); ++k) {
      if (k + kPrefetchDistance < end) {
        const size_t ahead = slots_[k + kPrefetchDistance].work;
        if (ahead != kNoWork) work_[ahead].looked_at.prefetch();
      }
      if (!is_as_before(slots_[k], writes_grads, moved)) all = false;
    }
    if (moved.any) grads_moved = true;
  });
  grads_moved_ = grads_moved;
  return all;
}

// False: everything is to be left.
bool SgdStep::add_all(bool writes_grads, const Scaling& scaling) {
  items_.clear();
  work_.clear();
  for (Slot& slot : slots_) {
    slot.work = kNoWork;
    slot.type = nullptr;
    if (!is_exact_tensor(slot.param)) {
      if (!is_tensor(slot.param)) return false;
      left_.push_back(&slot);
      continue;
    }
    const at::Tensor& param = tensor_of(slot.param);
    slot.type = Py_TYPE(slot.param);
    slot.tensor = &param;
    const at::Tensor& grad = grad_of(param);
    if (!grad.defined()) continue;
    if (!add_work(slot, param, grad, writes_grads, scaling)) left_.push_back(&slot);
  }
  survey_items();
  return true;
}

// Which memory the items write, and on what kinds of device they are.
void SgdStep::survey_items() {
  written_.clear();
  has_cpu_items_ = has_cuda_items_ = has_first_steps_ = false;
  count_elements(items_);
  for (const SgdItem& item : items_) {
    has_first_steps_ |= item.slice.first_step;
    (item.device == kOnCpu ? has_cpu_items_ : has_cuda_items_) = true;
    const cpu::SgdSlice& slice = item.slice;
    written_.push_back(range_of(slice.param, slice.n * param_bytes(item.storage)));
    if (slice.buf == nullptr) continue;
    written_.push_back(range_of(slice.buf, slice.n * buf_bytes(item.storage)));
  }
}

// Whether nothing that is written shares memory with anything else, in this step's items or in what
// is left to torch: then the order of the updates does not matter.
bool SgdStep::is_disjoint(bool writes_grads, const Scaling& scaling) {
  if (!same_extents(written_, checked_)) {
    sorted_ = written_;
    if (!sort_disjoint(sorted_)) {
      checked_.clear();
      sorted_.clear();
      return false;
    }
    checked_ = written_;
  }
  std::vector<Extent> grads;
  size_t near = 0;
  for (size_t k = 0; k < items_.size(); ++k) {
    const SgdItem& item = items_[k];
    const Extent grad = range_of(item.slice.grad, item.slice.n * param_bytes(item.storage));
    size_t& place = work_[k].slot->place;
    if (!is_clear_of(sorted_, grad, place, near)) return false;
    near = place;
    if (writes_grads) grads.push_back(grad);
  }
  if (writes_grads && !sort_disjoint(grads)) return false;
  const auto is_clear = [&](const at::Tensor& t) {
    size_t place = 0, grad_place = 0;
    return is_clear_of(sorted_, extent_of_left(t), place) &&
           (!writes_grads || is_clear_of(grads, extent_of_left(t), grad_place));
  };
  for (const Slot* slot : left_) {
    const at::Tensor& param = tensor_of(slot->param);
    const bool has_buf = slot->buf != nullptr && is_exact_tensor(slot->buf);
    const at::Tensor buf = has_buf ? tensor_of(slot->buf) : at::Tensor();
    for (const at::Tensor& t : {param, at::Tensor(param.grad()), buf}) {
      if (!is_clear(t)) return false;
    }
  }
  if (!has_cuda_items_) return true;
  // What the kernels read while they write.
  for (const Group& group : groups_) {
    if (group.lr != nullptr && !is_clear(tensor_of(group.lr))) return false;
  }
  return is_clear(scaling.grad_scale) && is_clear(scaling.found_inf);
}

bool SgdStep::is_on_one_device() const {
  for (const SgdItem& item : items_) {
    if (item.device != items_[0].device) return false;
  }
  return true;
}

bool SgdStep::gather(PyObject* optimizer, PyObject* dict, ZeroGrad zero_grad, Scaling& scaling) {
  left_.clear();
  PyTypeObject* const ours = python_objects().fused_sgd;
  const bool is_ours = ours != nullptr && PyType_IsSubtype(Py_TYPE(optimizer), ours) != 0;
  if (is_ours != std::exchange(is_ours_, is_ours)) groups_list_ = nullptr;  // to be read again
  bool is_repeat = std::exchange(is_repeatable_, false);
  const Names& n = python_objects().names;
  PyObject* const defaults = get_item(dict, n.defaults);
  if (defaults == nullptr || !PyDict_Check(defaults) ||
      get_item(defaults, n.differentiable) != Py_False || !operators_are_plain() ||
      !read_scaling(dict, scaling) || !read(dict, is_repeat)) {
    return false;
  }
  const bool writes_grads = zero_grad == ZeroGrad::kToZero || scaling.unscales();
  is_repeat = is_repeat && writes_grads == wrote_grads_ && !scaling.is_on_device() &&
              all_are_as_before(writes_grads);
  if (!is_repeat && !add_all(writes_grads, scaling)) return false;
  // The norm is over all gradients.
  if (scaling.max_norm.has_value() && !(left_.empty() && is_on_one_device())) return false;
  // Of gradients that moved, what is left to see is whether they share memory with each other.
  const bool is_known = is_repeat && !(grads_moved_ && writes_grads);
  if (!is_known && !is_disjoint(writes_grads, scaling)) return false;
  wrote_grads_ = writes_grads;
  is_repeatable_ = true;
  return true;
}

// The buffers of a first step, which SGD would make from the gradient.
std::vector<NewBuffer> SgdStep::make_buffers(PyObject* dict, const Scaling& scaling) {
  std::vector<NewBuffer> bufs;
  if (!has_first_steps_) return bufs;
  for (size_t k = 0; k < items_.size(); ++k) {
    SgdItem& item = items_[k];
    if (!item.slice.first_step) continue;
    const at::Tensor& param = *work_[k].param;
    const at::TensorOptions options =
        param.options().dtype(has_float_buf(item.storage) ? at::kFloat : param.scalar_type());
    at::Tensor buf;
    if (item.device == kOnCpu) {
      buf = at::Tensor(at::detail::empty_strided_cpu(param.sizes(), param.strides(), options));
    } else {
      buf = at::empty_strided(param.sizes(), param.strides(), options);
      // It stays so if the step is skipped.
      if (scaling.found_inf.defined()) buf.zero_();
    }
    item.slice.buf = buf.mutable_data_ptr();
    bufs.emplace_back(dict, work_[k].slot->param, buf);
  }
  return bufs;
}

std::vector<SgdStep::Held> SgdStep::hold() {
  std::vector<Held> held;
  held.reserve(work_.size());
  for (Work& w : work_) {
    PyObject* const buf = w.buf != nullptr ? w.slot->buf : nullptr;
    held.push_back({py::reinterpret_borrow<py::object>(w.slot->param),
                    py::reinterpret_borrow<py::object>(buf), *w.grad});
    w.grad = &held.back().grad;
  }
  return held;
}

// Items [begin, end) have been updated.
void SgdStep::bump_versions(size_t begin, size_t end, bool wrote_grads) const {
  for (size_t k = begin; k < end; ++k) {
    const Work& w = work_[k];
    w.param->unsafeGetTensorImpl()->bump_version();
    if (wrote_grads) w.grad->unsafeGetTensorImpl()->bump_version();
    if (w.buf != nullptr) w.buf->unsafeGetTensorImpl()->bump_version();
  }
}

// What the step leaves behind beside the parameters.
void SgdStep::leave_optimizer(PyObject* dict, const std::vector<NewBuffer>& new_bufs,
                              const at::Tensor& norm) {
  for (const NewBuffer& buf : new_bufs) buf.store();
  if (!norm.defined()) return;
  const py::object wrapped = py::reinterpret_steal<py::object>(to_python(norm));
  if (PyDict_SetItem(dict, python_objects().names.grad_norm, wrapped.ptr()) != 0) {
    throw py::error_already_set();
  }
}

void SgdStep::drop_grads() {
  for (const Work& w : work_) w.param->mutable_grad().reset();
}

// The norm of all gradients where it is asked for, else undefined.
at::Tensor SgdStep::update_cpu_items(const std::vector<SgdItem>& items, const Scaling& scaling,
                                     ItemsUpdated updated) {
  at::Tensor norm;
  if (scaling.max_norm.has_value()) {
    const double value = sgd_grad_norm_cpu(items) * scaling.unscale;
    for (cpu::SgdRule& rule : rules_) rule.clip = sgd_clip(*scaling.max_norm, value);
    const bool is_double = !items.empty() && items[0].storage == SgdStorage::kDouble;
    norm =
        at::scalar_tensor(value, at::TensorOptions().dtype(is_double ? at::kDouble : at::kFloat));
  }
  sgd_cpu(items, rules_, updated);
  return norm;
}

// By group; undefined where it is a number, or nobody needs it.
std::vector<at::Tensor> SgdStep::device_lrs() const {
  std::vector<at::Tensor> lrs;
  if (!has_cuda_items_) return lrs;
  for (const Group& group : groups_) {
    lrs.push_back(group.lr != nullptr ? tensor_of(group.lr) : at::Tensor());
  }
  return lrs;
}

at::Tensor SgdStep::update_items(const std::vector<at::Tensor>& lrs, const Scaling& scaling,
                                 GradAfter grad_after) {
  for (cpu::SgdRule& rule : rules_) {
    rule.unscale = scaling.unscale;
    rule.clip = 1.0;
    rule.grad_after = grad_after;
  }
  const auto updated = [&](size_t begin, size_t end) {
    bump_versions(begin, end, grad_after != GradAfter::kKept);
  };
  if (!has_cuda_items_) return update_cpu_items(items_, scaling, updated);
  // First, for it may find no memory, and then nothing has changed.
  const at::Tensor norm = sgd_cuda({items_, rules_, lrs, scaling.unscale, scaling.grad_scale,
                                    scaling.found_inf, grad_after, scaling.max_norm},
                                   cuda_memory_);
  if (has_cpu_items_) {
    std::vector<SgdItem> on_cpu;
    for (const SgdItem& item : items_) {
      if (item.device == kOnCpu) on_cpu.push_back(item);
    }
    count_elements(on_cpu);
    update_cpu_items(on_cpu, scaling, [](size_t, size_t) {});
  }
  updated(0, items_.size());
  return norm;
}

void SgdStep::run(PyObject* dict, const Scaling& scaling, ZeroGrad zero_grad) {
  const GradAfter grad_after = zero_grad == ZeroGrad::kToZero ? GradAfter::kZero
                               : scaling.unscales()           ? GradAfter::kUnscaled
                                                              : GradAfter::kKept;
  const std::vector<NewBuffer> new_bufs = make_buffers(dict, scaling);
  const std::vector<at::Tensor> lrs = device_lrs();
  std::vector<Held> held;
  at::Tensor norm;
  {
    std::optional<py::gil_scoped_release_simple> no_gil;
    // On CUDA a launch waits where the queue is full, and the GPU perhaps for another thread.
    if (has_cuda_items_ || is_worth_the_gil(elements(items_), items_.size())) {
      held = hold();
      no_gil.emplace();
    }
    norm = update_items(lrs, scaling, grad_after);
  }
  leave_optimizer(dict, new_bufs, norm);
  if (zero_grad == ZeroGrad::kToNone) drop_grads();
}

bool SgdStep::step(PyObject* optimizer, ZeroGrad zero_grad) {
  if (busy_) return false;
  const InUse in_use(*this);
  const py::object dict = dict_of(optimizer);
  Scaling scaling;
  if (has_hooks_or_profiler(dict.ptr()) || !gather(optimizer, dict.ptr(), zero_grad, scaling) ||
      !left_.empty()) {
    return false;
  }
  if (zero_grad == ZeroGrad::kToZero) {
    // Of a gradient that requires grad, and where the update is skipped, zero_grad() knows more.
    if (scaling.skips) return false;
    for (const Work& w : work_) {
      if (w.grad->requires_grad()) return false;
    }
  }
  if (!scaling.skips) {
    run(dict.ptr(), scaling, zero_grad);
  } else if (zero_grad == ZeroGrad::kToNone) {
    drop_grads();
  }
  return true;
}

bool SgdStep::update(PyObject* optimizer, const py::object& update_left) {
  if (busy_) return false;
  const InUse in_use(*this);
  const py::object dict = dict_of(optimizer);
  Scaling scaling;
  if (!gather(optimizer, dict.ptr(), ZeroGrad::kNo, scaling)) return false;
  if (scaling.skips) return true;
  std::vector<Held> held;
  if (!left_.empty()) {
    py::list left;
    int32_t group = -1;
    for (const Slot* slot : left_) {
      if (slot->group != group) left.append(py::make_tuple(slot->group, py::list()));
      group = slot->group;
      left[left.size() - 1].cast<py::tuple>()[1].cast<py::list>().append(py::handle(slot->param));
    }
    held = hold();  // whatever runs there
    update_left(left);
  }
  run(dict.ptr(), scaling, ZeroGrad::kNo);
  return true;
}

namespace {

PyObject* call_step(PyObject* capsule, PyObject* const* args, Py_ssize_t count) {
  TORCH_CHECK_TYPE(count == 2, "step: expected optimizer and zero_grad, got ", count, " arguments");
  auto* const step = static_cast<SgdStep*>(PyCapsule_GetPointer(capsule, nullptr));
  const long zero_grad = PyLong_AsLong(args[1]);
  TORCH_CHECK_VALUE(zero_grad >= 0 && zero_grad <= 2, "step: zero_grad must be 0, 1 or 2");
  return PyBool_FromLong(step->step(args[0], static_cast<ZeroGrad>(zero_grad)));
}

PyMethodDef step_method = fast_method<call_step>("step", "step(optimizer, zero_grad) -> bool");

}  // namespace

py::object sgd_step_function(SgdStep& step, const py::object& self) {
  const py::object function =
      py::reinterpret_steal<py::object>(function_of(step_method, &step, self.ptr()));
  if (!function) throw py::error_already_set();
  return function;
}

}  // namespace fused_step
