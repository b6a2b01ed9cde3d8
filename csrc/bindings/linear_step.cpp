// SPDX-License-Identifier: MIT
#include "bindings/linear_step.h"

#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <pybind11/cast.h>
#include <pybind11/gil_simple.h>

#include <array>
#include <chrono>

#include "bindings/autocast.h"
#include "bindings/dtypes.h"
#include "bindings/engines.h"
#include "bindings/linear_model.h"
#include "bindings/linear_mse_bfloat16.h"
#include "bindings/memory.h"
#include "bindings/python_bridge.h"
#include "bindings/python_objects.h"

namespace fused_step {

namespace py = pybind11;

namespace {

// Above this a step gives the GIL away, which costs about 0.1 us.
constexpr int64_t kMinWorkWithoutGil = 256 * 1024;

// A tensor whose memory an engine may use: ordinary, and where the weight is.
bool is_plain(const at::Tensor& t, c10::Device device) {
  return has_plain_keys(t) && t.device() == device;
}
constexpr const char* kNotPlain = " is not an ordinary tensor on the weight's device";

// The caller's, of the kind that the engine for `device` sets another of; none for the CPU.
std::optional<c10::Device> current_device(c10::Device device) {
  if (device.is_cpu()) return std::nullopt;
  return c10::impl::VirtualGuardImpl(device.type()).getDevice();
}

// What is written: a leaf of the model.
bool check_param(const char* name, PyObject* object, const at::Tensor& weight, Verdict& v) {
  const at::ScalarType dtype = weight.scalar_type();
  if (v.against(Py_TYPE(object) != python_objects().parameter, name,
                " is not an nn.Parameter itself")) {
    return false;
  }
  const at::Tensor& t = tensor_of(object);
  if (v.against(!is_plain(t, weight.device()), name, kNotPlain)) return false;
  if (v.against(t.scalar_type() != dtype || !is_fused_dtype(dtype), name,
                " is not float32, float64, bfloat16 or float16, or not of the weight's dtype")) {
    return false;
  }
  if (v.against(!t.is_contiguous(), name, " is not contiguous")) return false;
  if (v.against(!has_its_storage(t), name, " has lost its storage")) return false;
  if (v.against(!t.requires_grad() || !t.is_leaf(), name, " is frozen, or no leaf")) return false;
  if (v.against(t.grad().defined(), name, ".grad is not None: gradients accumulate")) return false;
  return !v.against(changes_gradient(object), name, " has gradient hooks or a grad_dtype");
}

// The momentum buffer of a parameter.
bool check_buffer(PyObject* object, const at::Tensor& param, Verdict& v) {
  const at::Tensor& buf = tensor_of(object);
  return !v.against(
      !is_exact_tensor(object) || !is_plain(buf, param.device()) ||
          buf.scalar_type() != param.scalar_type() || buf.sizes() != param.sizes() ||
          !buf.is_contiguous() || buf.requires_grad() || !has_its_storage(buf),
      "a momentum_buffer is not like its parameter (device, dtype, shape, contiguous)");
}

// A learning rate in a tensor on CUDA, which the kernels read; one on the CPU was read already.
bool check_lr(PyObject* object, const at::Tensor& weight, Verdict& v, at::Tensor& lr) {
  if (object == nullptr) return true;
  lr = tensor_of(object);
  return !v.against(!is_plain(lr, weight.device()) || lr.scalar_type() != at::kFloat ||
                        lr.numel() != 1 || lr.requires_grad() || !has_its_storage(lr),
                    "the learning rate is a CUDA tensor, but not one of float32, one element and "
                    "the weight's device");
}

// Autocast casts float32 parameters to 16 bit and computes the loss in float32; float64 it leaves
// alone. It keeps its copies of the parameters, and the five lines go on with those after an
// update.
bool check_autocast(at::ScalarType dtype, Verdict& v) {
  if (dtype == at::kDouble) return true;
  if (v.against(dtype != at::kFloat, "autocast is on, over parameters that are not float32")) {
    return false;
  }
  return !v.against(at::autocast::is_autocast_cache_enabled(),
                    "autocast is on with cache_enabled=True: its copies of the parameters do not "
                    "see an update");
}

// What is read. Under autocast, with float32 parameters, it may also be 16 bit.
bool check_data(const char* name, const at::Tensor& t, const at::Tensor& weight, bool autocast,
                Verdict& v) {
  if (v.against(!is_plain(t, weight.device()), name, kNotPlain)) return false;
  const at::ScalarType given = t.scalar_type(), dtype = weight.scalar_type();
  if (v.against(given != dtype && !(autocast && is_fused_pair(given, dtype)), name,
                " is not of the weight's dtype")) {
    return false;
  }
  const bool is_differentiated = t.requires_grad() || t._fw_grad(0).defined();
  if (v.against(is_differentiated, name, " needs a gradient")) return false;
  return !v.against(!has_its_storage(t), name, " has lost its storage");
}

// Nothing that is read overlaps what is written, and no two that are written overlap.
bool check_overlap(const LinearSgdState& s, const at::Tensor& input, const at::Tensor& target,
                   Verdict& v) {
  const Extent x = extent_of(input), t = extent_of(target);
  std::array<Extent, 4> written;
  size_t count = 0;
  bool overlap = false;
  for (const at::Tensor* tensor : {&s.weight, &s.bias, &s.weight_buf, &s.bias_buf}) {
    if (!tensor->defined()) continue;
    const Extent extent = extent_of(*tensor);
    overlap |= extent.overlaps(x) || extent.overlaps(t);
    for (size_t k = 0; k < count; ++k) overlap |= extent.overlaps(written[k]);
    written[count++] = extent;
  }
  for (const at::Tensor* lr : {&s.weight_lr, &s.bias_lr}) {
    if (!lr->defined()) continue;
    for (size_t k = 0; k < count; ++k) overlap |= written[k].overlaps(extent_of(*lr));
  }
  return !v.against(overlap, "input, target, parameters or momentum buffers share memory");
}

bool has_suffix_shape(const at::Tensor& input, const at::Tensor& target, int64_t I, int64_t O) {
  const int64_t dim = input.dim();
  if (dim < 1 || target.dim() != dim || input.size(-1) != I || target.size(-1) != O) return false;
  for (int64_t d = 0; d + 1 < dim; ++d) {
    if (input.size(d) != target.size(d)) return false;
  }
  return true;
}

}  // namespace

void LinearStep::Call::borrow(at::Tensor& tensor, PyObject* object) {
  Py_INCREF(object);
  c10::MaybeOwnedTraits<at::Tensor>::assignBorrow(tensor, tensor_of(object));
  loans_[loan_count_++] = {&tensor, object};
}

void LinearStep::Call::give_back(bool as_own) {
  for (size_t k = 0; k < loan_count_; ++k) {
    at::Tensor& tensor = *loans_[k].tensor;
    at::Tensor own = as_own ? tensor : at::Tensor();
    c10::MaybeOwnedTraits<at::Tensor>::destroyBorrow(tensor);
    tensor = std::move(own);
    Py_DECREF(loans_[k].object);
  }
  loan_count_ = 0;
}

// The model, the loss and the optimizer; from memory where none of them has changed. False when
// there is no layer to look at further, or no need.
bool LinearStep::read_objects(Verdict& v, Reading& reading) {
  if (!v.explains() && watch_.unchanged()) {
    reading = kept_;
    return true;
  }
  // In the watch's place only when all was read: reading calls Python, which may raise.
  Watch watch = std::move(watch_);
  watch.clear();
  LinearModel layer;
  const bool model = read_only_layer(model_.ptr(), loss_function_.ptr(), v, watch, layer);
  const bool loss = (model || v.explains()) &&
                    read_loss(loss_function_.ptr(), model_.ptr(), v, watch, reading.error);
  reading.sgd.weight.object = layer.weight;
  reading.sgd.bias.object = layer.bias;
  reading.flattening = layer.flattening;
  // Without a layer only the kind of optimizer can still be said.
  const PyTypeObject* const type = Py_TYPE(optimizer_.ptr());
  const bool has_groups =
      model || (type != python_objects().sgd && type != python_objects().fused_sgd);
  const bool optimizer = (loss || v.explains()) && has_groups &&
                         sgd_reader_.read(optimizer_.ptr(), v, watch, reading.sgd);
  const bool complete = model && loss && optimizer && v.applies();
  if (complete && reading.sgd.may_be_kept && reading.error.may_be_kept) {
    kept_ = reading;
  } else {
    watch.clear();
  }
  watch_ = std::move(watch);
  return complete || (v.explains() && model);
}

bool LinearStep::check_params(const Autocast& autocast, Verdict& v, Call& call) {
  const SgdParam &weight = call.reading.sgd.weight, &bias = call.reading.sgd.bias;
  LinearSgdState& s = call.state;
  call.borrow(s.weight, weight.object);
  if (v.against(!is_served(s.weight.device()),
                "weight is on a device that this build has no kernels for")) {
    return false;
  }
  if (!check_param("weight", weight.object, s.weight, v)) return false;
  call.autocast = autocast.is_on(s.weight.device());
  if (call.autocast && !check_autocast(s.weight.scalar_type(), v)) return false;
  if (s.weight.dim() != 2) return !v.against(true, "weight is not [O, I]");
  s.weight_options = weight.options;
  s.reduction = call.reading.error.reduction;
  if (weight.buf != nullptr) {
    if (!check_buffer(weight.buf, s.weight, v)) return false;
    call.borrow(s.weight_buf, weight.buf);
  }
  if (!check_lr(weight.lr, s.weight, v, s.weight_lr)) return false;
  if (bias.object == nullptr) return true;
  call.borrow(s.bias, bias.object);
  if (!check_param("bias", bias.object, s.weight, v)) return false;
  if (s.bias.dim() != 1 || s.bias.size(0) != s.weight.size(0)) {
    return !v.against(true, "bias is not [O]");
  }
  s.bias_options = bias.options;
  if (!check_lr(bias.lr, s.weight, v, s.bias_lr)) return false;
  if (bias.buf == nullptr) return true;
  if (!check_buffer(bias.buf, s.bias, v)) return false;
  call.borrow(s.bias_buf, bias.buf);
  return true;
}

bool LinearStep::check_batch(PyObject* input, PyObject* target, Verdict& v, Call& call) {
  if (!is_exact_tensor(input) || !is_exact_tensor(target)) {
    return v.reject("input or target is not a torch.Tensor itself");
  }
  call.borrow(call.input, input);
  const at::Tensor& given = tensor_of(target);
  if (!check_data("input", call.input, call.state.weight, call.autocast, v)) return false;
  const bool may_be_cast = call.autocast && call.reading.error.is_mse_loss;
  if (!check_data("target", given, call.state.weight, may_be_cast, v)) return false;
  if (!v.applies()) return false;  // what follows looks at memory
  const int64_t O = call.state.weight.size(0), I = call.state.weight.size(1);
  at::Tensor made;  // of the target, where that is not taken as it is
  if (call.reading.flattening != Flattening::kNone) {
    made = unflattened(given, call.input.sizes(), O, call.reading.flattening);
    if (!made.defined()) return v.reject(kNotFlattened);
  }
  const at::Tensor& rows = made.defined() ? made : given;
  if (v.against(!has_suffix_shape(call.input, rows, I, O),
                "input and target are not [*, I] and [*, O] with the same leading dimensions")) {
    return false;
  }
  if (!check_overlap(call.state, call.input, rows, v)) return false;
  const at::ScalarType dtype = call.state.weight.scalar_type();
  if (rows.scalar_type() != dtype) made = rows.to(dtype);
  if (made.defined()) {
    call.target = std::move(made);
  } else {
    call.borrow(call.target, target);
  }
  return true;
}

bool LinearStep::resolve(PyObject* input, PyObject* target, Verdict& v, Call& call) {
  Autocast autocast;
  return check_world(v, autocast) && read_objects(v, call.reading) &&
         check_params(autocast, v, call) && check_batch(input, target, v, call) && v.applies();
}

bool LinearStep::check_rows(const Call& call, int64_t rows, Verdict& v) {
  const at::Tensor& weight = call.state.weight;
  return !call.autocast || weight.scalar_type() != at::kFloat ||
         !v.against(
             is_left_to_autocast(weight.device(), {rows, weight.size(1), weight.size(0)},
                                 call.input.scalar_type(), /*whole_step=*/true),
             "autocast is on, and its GEMMs of 16 bit are faster for such a layer on this device");
}

// The buffers of a first step, which SGD would make from the gradient.
void LinearStep::make_buffers(Call& call) {
  LinearSgdState& s = call.state;
  const SgdReading& sgd = call.reading.sgd;
  const auto make = [&](const at::Tensor& param, PyObject* object) {
    const at::Tensor buf = param.new_empty(param.sizes());
    call.new_buffers.emplace_back(sgd.dict, object, buf);
    return buf;
  };
  if (s.weight_options.momentum != 0.0 && !s.weight_buf.defined()) {
    s.weight_buf = make(s.weight, sgd.weight.object);
  }
  if (s.bias.defined() && s.bias_options.momentum != 0.0 && !s.bias_buf.defined()) {
    s.bias_buf = make(s.bias, sgd.bias.object);
  }
}

// What SGD.step leaves behind beside the parameters.
void LinearStep::leave_optimizer(Call& call) {
  for (const NewBuffer& buffer : call.new_buffers) buffer.store();
  call.new_buffers.clear();
  if (call.reading.sgd.step_is_scheduled) note_step_called(call.reading.sgd.dict);
}

py::object LinearStep::step(py::handle input, py::handle target) {
  if (busy_) return py::none();
  const InUse in_use(*this);
  plan_ = nullptr;
  Verdict verdict(nullptr);
  Call call;
  if (!resolve(input.ptr(), target.ptr(), verdict, call)) return py::none();
  const int64_t O = call.state.weight.size(0);
  const int64_t rows = O > 0 ? call.target.numel() / O : 0;
  if (!check_rows(call, rows, verdict)) return py::none();
  RECORD_FUNCTION("TrainStep.step", {});  // in a profile; the loops call no operator
  make_buffers(call);
  at::Tensor loss;
  {
    std::optional<py::gil_scoped_release_simple> no_gil;
    // On CUDA a launch waits where the queue is full, an allocation where it frees memory.
    if (call.state.weight.is_cuda() || call.input.numel() * O > kMinWorkWithoutGil) {
      call.own();
      no_gil.emplace();
    }
    loss = linear_mse_sgd(call.state, call.input, call.target, memory_);
  }
  leave_optimizer(call);
  plan_ = plan_name(call.state, call.input, rows);
  return py::reinterpret_steal<py::object>(to_python(std::move(loss)));
}

py::object LinearStep::run(py::handle inputs, py::handle targets, int64_t epochs,
                           int64_t batch_size, bool shuffle, std::optional<at::Generator> generator,
                           const py::object& progress) {
  if (busy_) return py::none();
  const InUse in_use(*this);
  Verdict verdict(nullptr);
  Call call;
  if (!resolve(inputs.ptr(), targets.ptr(), verdict, call)) return py::none();
  // A 1-dim tensor has no rows to make batches of; no steps, no change.
  if (call.input.dim() < 2 || call.input.size(0) == 0 || epochs == 0) return py::none();
  // Of a batch of one row nothing would be left.
  if (call.reading.flattening == Flattening::kAllOnes) return py::none();
  const int64_t per_sample =
      call.input.numel() / std::max<int64_t>(1, call.input.size(0) * call.input.size(-1));
  const int64_t rows = std::min(batch_size, call.input.size(0)) * per_sample;
  if (!check_rows(call, rows, verdict)) return py::none();
  // A replay would go through the rows in one order again and again: the plain loop says so.
  if (shuffle && is_captured(call.state.weight.device())) return py::none();
  RECORD_FUNCTION("TrainStep.run", {});
  plan_ = nullptr;
  call.own();
  make_buffers(call);

  using Clock = std::chrono::steady_clock;
  auto last_signals = Clock::now(), last_progress = last_signals;
  // Handlers of signals and the progress are the caller's code: they run in the world it is in.
  const c10::impl::LocalDispatchKeySet callers_keys = c10::impl::tls_local_dispatch_key_set();
  const std::optional<c10::Device> callers_device = current_device(call.state.weight.device());
  RunWatch watch;
  watch.poll = [&] {
    const auto now = Clock::now();
    if (now - last_signals < std::chrono::milliseconds(50)) return;
    last_signals = now;
    const c10::impl::ForceDispatchKeyGuard keys(callers_keys);
    const c10::OptionalDeviceGuard device(callers_device);
    const py::gil_scoped_acquire_simple gil;
    if (watch.steps > 0) leave_optimizer(call);
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress.is_none() && now - last_progress >= std::chrono::milliseconds(100)) {
      last_progress = now;
      progress(watch.steps);
    }
  };
  at::Tensor losses;
  try {
    const py::gil_scoped_release_simple no_gil;
    losses =
        run_linear_mse_sgd(call.state, call.input, call.target,
                           {epochs, batch_size, shuffle, std::move(generator)}, memory_, watch);
  } catch (...) {
    if (watch.steps > 0) leave_optimizer(call);
    throw;
  }
  leave_optimizer(call);
  plan_ = plan_name(call.state, call.input, rows);
  if (!progress.is_none()) progress(losses.numel());
  return py::reinterpret_steal<py::object>(to_python(std::move(losses)));
}

std::pair<std::string, std::vector<std::string>> LinearStep::explain(py::handle input,
                                                                     py::handle target) {
  std::vector<std::string> reasons;
  Verdict verdict(&reasons);
  Call call;
  if (!resolve(input.ptr(), target.ptr(), verdict, call)) return {"plain", reasons};
  const int64_t O = call.state.weight.size(0);
  const int64_t B = O > 0 ? call.target.numel() / O : 0;
  if (!check_rows(call, B, verdict) || !verdict.applies()) return {"plain", reasons};
  const std::string why = why_no_deeper(call.state, call.input, B);
  if (!why.empty()) reasons.push_back(why);
  return {plan_name(call.state, call.input, B), reasons};
}

const char* LinearStep::plan() const { return plan_; }

namespace {

PyObject* call_step(PyObject* capsule, PyObject* const* args, Py_ssize_t count) {
  TORCH_CHECK_TYPE(count == 2, "step: expected input and target, got ", count, " arguments");
  auto* const step = static_cast<LinearStep*>(PyCapsule_GetPointer(capsule, nullptr));
  return step->step(args[0], args[1]).release().ptr();
}

PyMethodDef step_method = fast_method<call_step>("step", "step(input, target) -> Tensor | None");

}  // namespace

py::object step_function(LinearStep& step, const py::object& self) {
  const py::object function =
      py::reinterpret_steal<py::object>(function_of(step_method, &step, self.ptr()));
  if (!function) throw py::error_already_set();
  return function;
}

}  // namespace fused_step
