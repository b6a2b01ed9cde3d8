// SPDX-License-Identifier: MIT
#include "bindings/head_step.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <pybind11/cast.h>
#include <pybind11/gil_simple.h>

#include "bindings/dtypes.h"
#include "bindings/engines.h"
#include "bindings/linear_mse.h"
#include "bindings/made_gradients.h"
#include "bindings/memory.h"
#include "bindings/python_bridge.h"
#include "bindings/python_objects.h"
#include "bindings/world.h"

namespace fused_step {

namespace py = pybind11;

namespace {

// What the engines read: an ordinary tensor with all of its memory, where the weight is.
bool check_operand(const char* name, PyObject* object, const at::Tensor& weight, Verdict& v) {
  if (!is_exact_tensor(object)) {
    return v.reject(std::string(name) + " is not a torch.Tensor or nn.Parameter itself");
  }
  const at::Tensor& t = tensor_of(object);
  if (!has_plain_keys(t) || t.device() != weight.device()) {
    return v.reject(std::string(name) + " is not an ordinary tensor on the weight's device");
  }
  if (v.against(t.scalar_type() != weight.scalar_type(), name, " is not of the weight's dtype")) {
    return false;
  }
  if (v.against(t._fw_grad(0).defined(), name, " has a forward-mode derivative")) return false;
  return !v.against(!has_its_storage(t), name, " has lost its storage");
}

bool has_output_shape(const at::Tensor& hidden, const at::Tensor& target,
                      const at::Tensor& weight) {
  const int64_t dim = hidden.dim();
  return dim >= 1 && target.dim() == dim && hidden.size(-1) == weight.size(1) &&
         target.size(-1) == weight.size(0) &&
         hidden.sizes().slice(0, dim - 1) == target.sizes().slice(0, dim - 1);
}

}  // namespace

// The world, the model and its loss. False once the verdict needs no more, or without a layer.
bool HeadStep::read(Verdict& v) {
  Autocast autocast;
  if (!check_world(v, autocast)) return false;
  if (v.against(autocast.cpu || autocast.cuda, "autocast is on")) return false;
  if (!v.explains() && watch_.unchanged()) return true;
  // In the watch's place only when all was read: reading calls Python, which may raise.
  Watch watch = std::move(watch_);
  watch.clear();
  Reading reading;
  reading.number = ++readings_;
  if (loss_function_.is_none()) return v.reject("the model gives its loss itself");
  LinearModel& model = reading.model;
  const bool has_layer = read_last_layer(model_.ptr(), v, watch, model, reading.body);
  const bool has_loss = (has_layer || v.explains()) &&
                        read_loss(loss_function_.ptr(), model_.ptr(), v, watch, reading.error);
  reading_ = std::move(reading);
  // What explain() has read is not kept: with a reason against it, it is not complete.
  if (!has_layer || !has_loss || v.explains() || !reading_.error.may_be_kept) watch.clear();
  watch_ = std::move(watch);
  return has_layer && has_loss;
}

bool HeadStep::check(PyObject* hidden, PyObject* target, Verdict& v) const {
  const LinearModel& model = reading_.model;
  const at::Tensor& weight = tensor_of(model.weight);
  if (v.against(!is_served(weight.device()),
                "weight is on a device that this build has no kernels for") ||
      v.against(!is_fused_dtype(weight.scalar_type()),
                "weight is not float32, float64, bfloat16 or float16")) {
    return false;
  }
  if (!check_operand("weight", model.weight, weight, v) ||
      (model.bias != nullptr && !check_operand("bias", model.bias, weight, v)) ||
      !check_operand("target", target, weight, v) ||
      (hidden != nullptr && !check_operand("the last layer's input", hidden, weight, v))) {
    return false;
  }
  if (is_tensor(target) &&
      v.against(tensor_of(target).requires_grad(), "target needs a gradient")) {
    return false;
  }
  if (v.against(weight.dim() != 2, "weight is not [O, I]")) return false;
  const bool has_bias = model.bias != nullptr;
  if (v.against(has_bias && (tensor_of(model.bias).dim() != 1 ||
                             tensor_of(model.bias).size(0) != weight.size(0)),
                "bias is not [O]")) {
    return false;
  }
  if (hidden != nullptr && is_tensor(hidden) &&
      v.against(!tensor_of(hidden).requires_grad() && !weight.requires_grad() &&
                    (!has_bias || !tensor_of(model.bias).requires_grad()),
                "nothing needs a gradient")) {
    return false;
  }
  if (!v.applies()) return false;
  // Before the model has run, what is known of its output.
  if (v.against(hidden == nullptr && model.flattening == Flattening::kNone &&
                    (tensor_of(target).dim() == 0 || tensor_of(target).size(-1) != weight.size(0)),
                "target is not [*, O], as the model's output is")) {
    return false;
  }
  if (hidden == nullptr) return true;
  const at::Tensor rows = target_of(tensor_of(hidden), tensor_of(target));
  if (!rows.defined()) return v.reject(kNotFlattened);
  return !v.against(
      !has_output_shape(tensor_of(hidden), rows, weight),
      "the last layer's input and target are not [*, I] and [*, O] with the same leading "
      "dimensions");
}

// [*, O], as the layer's output is; undefined where the target is not what the model makes of that.
at::Tensor HeadStep::target_of(const at::Tensor& hidden, const at::Tensor& target) const {
  const LinearModel& model = reading_.model;
  if (model.flattening == Flattening::kNone) return target;
  const at::Tensor& weight = tensor_of(model.weight);
  if (weight.dim() != 2) return {};
  return unflattened(target, hidden.sizes(), weight.size(0), model.flattening);
}

bool HeadStep::Reading::has_body() const {
  for (const BodyPart& part : body) {
    if (part.does_something()) return true;
  }
  return false;
}

py::object HeadStep::parts() {
  Verdict verdict(nullptr);
  if (!read(verdict)) return py::none();
  const auto or_none = [](PyObject* object) {
    return object != nullptr ? py::reinterpret_borrow<py::object>(object) : py::none();
  };
  py::tuple body(reading_.body.size());
  for (size_t k = 0; k < reading_.body.size(); ++k) {
    const BodyPart& part = reading_.body[k];
    if (part.last.module == nullptr) {
      body[k] = py::make_tuple(py::handle(part.module), py::none(), part.calls, py::none());
    } else if (part.last.code == nullptr) {
      body[k] = py::make_tuple(py::none(), py::none(), 0, or_none(part.last.flatten));
    } else {
      const auto method = py::reinterpret_steal<py::object>(method_before(part.last, part.module));
      body[k] = py::make_tuple(method, py::handle(part.last.module), 0, or_none(part.last.flatten));
    }
  }
  return py::make_tuple(body, py::handle(reading_.model.linear), reading_.number);
}

bool HeadStep::confirms(int64_t number) {
  if (number != reading_.number) return false;  // a step within that step has read another model
  Verdict verdict(nullptr);
  if (watch_.unchanged()) return read(verdict);
  const std::vector<BodyPart> body = reading_.body;
  const PyObject *const linear = reading_.model.linear, *const flatten = reading_.model.flatten;
  const bool is_same = read(verdict) && reading_.body == body && reading_.model.linear == linear &&
                       reading_.model.flatten == flatten;
  if (is_same) reading_.number = number;
  return is_same;
}

py::object HeadStep::step(py::handle hidden, py::handle target) {
  Verdict verdict(nullptr);
  // Without anything before it the layer is the model, and LinearStep has looked at that.
  if (!is_exact_tensor(hidden.ptr()) || tensor_of(hidden.ptr()).requires_grad() || !read(verdict) ||
      !reading_.has_body()) {
    return py::none();
  }
  // Another layer at the same address is read anew by LinearStep itself.
  PyObject* const linear = reading_.model.linear;
  const bool is_known = layer_.has_value() && layer_of_ == linear;
  layer_of_ = linear;
  LinearStep& layer = is_known ? *layer_ : layer_.emplace(linear, loss_function_, optimizer_);
  if (reading_.model.flattening == Flattening::kNone) return layer.step(hidden, target);
  // What a view of the target would not tell.
  if (!is_exact_tensor(target.ptr()) || tensor_of(target.ptr()).requires_grad() ||
      tensor_of(target.ptr())._fw_grad(0).defined()) {
    return py::none();
  }
  at::Tensor rows = target_of(tensor_of(hidden.ptr()), tensor_of(target.ptr()));
  if (!rows.defined()) return py::none();
  return layer.step(hidden, py::reinterpret_steal<py::object>(to_python(std::move(rows))));
}

py::object HeadStep::loss(py::handle hidden, py::handle target) {
  Verdict verdict(nullptr);
  if (!read(verdict) || !check(hidden.ptr(), target.ptr(), verdict)) return py::none();
  const LinearModel& model = reading_.model;
  // Copies: without the GIL another thread may take them out of the model.
  const at::Tensor input = tensor_of(hidden.ptr()), weight = tensor_of(model.weight);
  const at::Tensor rows = target_of(input, tensor_of(target.ptr()));
  std::optional<at::Tensor> bias;
  if (model.bias != nullptr) bias = tensor_of(model.bias);
  const bool of_input = input.requires_grad(), of_weight = weight.requires_grad(),
             of_bias = bias.has_value() && bias->requires_grad();
  at::Tensor loss;
  {
    const py::gil_scoped_release_simple no_gil;
    RECORD_FUNCTION("TrainStep.loss", {});
    LinearMseResult result;
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      result = linear_mse(input, weight, bias, rows,
                          reading_.error.reduction == Reduction::kMean ? "mean" : "sum", of_input,
                          of_weight, of_bias, /*need_dy=*/false);
    }
    auto& [made_loss, dinput, dweight, dbias, dy] = result;
    loss = std::move(made_loss);
    // In the order in which the nodes of nn.Linear come to them.
    std::vector<at::Tensor> tensors, gradients;
    const auto add = [&](const at::Tensor& t, at::Tensor& gradient) {
      tensors.push_back(t);
      gradients.push_back(std::move(gradient));
    };
    if (of_bias) add(*bias, dbias);
    if (of_weight) add(weight, dweight);
    if (of_input) add(input, dinput);
    set_made_gradients(loss, tensors, std::move(gradients));
  }
  return py::reinterpret_steal<py::object>(to_python(std::move(loss)));
}

std::pair<bool, std::vector<std::string>> HeadStep::explain(py::handle input, py::handle target) {
  std::vector<std::string> reasons;
  Verdict verdict(&reasons);
  if (read(verdict)) {
    check(!reading_.has_body() ? input.ptr() : nullptr, target.ptr(), verdict);
  }
  return {verdict.applies(), reasons};
}

}  // namespace fused_step
