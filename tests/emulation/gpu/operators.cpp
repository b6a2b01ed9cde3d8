// SPDX-License-Identifier: MIT
// torch's operators on the emulated GPUs: the CPU's, on the same memory.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string_view>
#include <utility>

#include "streams.h"
#include "twins.h"

namespace emulation {
namespace {

using c10::Device;
using c10::DispatchKey;
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

// `value` with map(tensor) for every tensor in it.
template <typename Map>
IValue replaced(const IValue& value, const Map& map) {
  if (value.isTensor()) return map(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& t : value.toTensorVector()) list.push_back(map(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector()) {
      list.push_back(t.has_value() ? std::optional(map(*t)) : std::nullopt);
    }
    return list;
  }
  return value;
}

std::string_view name_of(const OperatorHandle& op) {
  std::string_view name = op.schema().name();
  name.remove_prefix(std::min(name.size(), name.find("::") + 2));
  return name;
}

// Whether it takes tensors of several devices.
bool takes_several_devices(std::string_view name) {
  constexpr std::array kPrefixes{"copy_", "index", "_index", "_pin_memory"};
  return std::any_of(kPrefixes.begin(), kPrefixes.end(),
                     [&](const char* prefix) { return name.starts_with(prefix); });
}

// Whether the host waits for what it returns.
bool waits(std::string_view name, const Stack& arguments) {
  constexpr std::array<std::string_view, 4> kReading{"_local_scalar_dense", "equal", "nonzero",
                                                     "masked_select"};
  if (std::find(kReading.begin(), kReading.end(), name) != kReading.end()) return true;
  return name == "copy_" && !arguments[2].toBool() &&
         arguments[0].toTensor().is_cuda() != arguments[1].toTensor().is_cuda();
}

at::ScalarType sum_type(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// A product of matrices as cuBLAS makes it, where that is not what the CPU does: 16-bit products
// are summed in float and rounded once, to whatever type, and C is added to the whole sum. False:
// it is none of these.
bool call_product(const OperatorHandle& op, Stack& stack) {
  const std::string name = c10::toString(op.operator_name());
  const bool widens = name == "aten::mm.dtype" || name == "aten::mm.dtype_out";
  const bool adds = name == "aten::addmm_" || name == "aten::addmm.out";
  if (!widens && !adds) return false;
  const at::Tensor a = stack[adds ? 1 : 0].toTensor(), b = stack[adds ? 2 : 1].toTensor();
  at::Tensor sum = at::mm(a.to(sum_type(a)), b.to(sum_type(b)));
  if (adds) {
    const at::Tensor c = stack[0].toTensor();
    const at::Scalar beta = stack[3].toScalar(), alpha = stack[4].toScalar();
    sum.mul_(alpha);
    if (beta.toDouble() != 0.0) sum.add_(c.to(sum_type(c)), beta);
  }
  if (name == "aten::mm.dtype") {
    stack = {sum.to(stack[2].toScalarType())};
  } else {
    at::Tensor out = (name == "aten::addmm_" ? stack.front() : stack.back()).toTensor();
    stack = {out.copy_(sum)};
  }
  return true;
}

void call(const OperatorHandle& op, Stack& stack) {
  const c10::impl::ExcludeDispatchKeyGuard below(
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset);
  const at::DisableRecordFunctionGuard unseen;  // by the profiler
  if (!call_product(op, stack)) op.callBoxed(&stack);
}

// The call when its time has come, with its new results put where `results` already are.
std::function<bool()> later(const OperatorHandle& op, Stack inputs, std::shared_ptr<Twins> twins,
                            Stack results) {
  return [op, inputs = std::move(inputs), twins = std::move(twins), results = std::move(results)] {
    Stack stack = inputs;
    call(op, stack);
    for (size_t k = 0; k < results.size(); ++k) {
      if (!results[k].isTensor() || !twins->is_fresh(stack[k].toTensor())) continue;
      Twins(true).on_host(results[k].toTensor()).copy_(stack[k].toTensor());
    }
    return true;
  };
}

// A graph does not keep the host's memory that it copies from.
IValue borrowed(const IValue& value) {
  return replaced(value, [](const at::Tensor& t) {
    if (!t.defined() || t.is_cuda()) return t;
    return at::from_blob(t.mutable_data_ptr(), t.sizes(), t.strides(), t.options());
  });
}

// What an operator returns that writes in place or to `out`, and is not called yet.
void push_written(const OperatorHandle& op, const Stack& arguments, Stack& results) {
  for (const c10::Argument& returned : op.schema().returns()) {
    for (size_t k = 0; k < arguments.size(); ++k) {
      const c10::AliasInfo* const written = op.schema().arguments()[k].alias_info();
      if (written != nullptr && returned.alias_info() != nullptr &&
          *written == *returned.alias_info()) {
        results.push_back(arguments[k]);
        break;
      }
    }
  }
}

void run_on_host(const OperatorHandle& op, Stack* stack) {
  const std::string_view name = name_of(op);
  const size_t count = op.schema().arguments().size();
  const Stack arguments(stack->end() - static_cast<std::ptrdiff_t>(count), stack->end());
  torch::jit::drop(*stack, count);
  if (waits(name, arguments)) wait(name.data());

  Queue* const queue = current_queue();
  const bool any_device = takes_several_devices(name);
  const auto twins = std::make_shared<Twins>(any_device);
  Stack inputs;
  for (const IValue& value : arguments) {
    const bool is_gpu = value.isDevice() && value.toDevice().is_cuda();
    const IValue& given = queue->is_captured() ? borrowed(value) : value;
    inputs.push_back(is_gpu ? IValue(Device(c10::kCPU))
                            : replaced(given, [&](const auto& t) { return twins->on_host(t); }));
  }
  TORCH_CHECK(any_device || !twins->has_host_data() || !twins->device().has_value(),
              "Expected all tensors to be on the same device, but found at least two devices, ",
              twins->result_device(), " and cpu! (", name, ")");

  Kept* const kept = queue->kept.get();
  if (op.schema().is_mutable()) {
    count_launch();
    if (kept != nullptr) {
      kept->work.push_back(later(op, inputs, twins, {}));
      return push_written(op, arguments, *stack);
    }
  }
  Stack on_host = inputs, on_gpu;
  call(op, on_host);
  twins->follow_resized();
  for (const IValue& value : on_host) {
    if (value.isTensor() && twins->is_fresh(value.toTensor())) count_launch();
    on_gpu.push_back(replaced(value, [&](const auto& t) { return twins->on_gpu(t); }));
  }
  if (kept != nullptr) kept->work.push_back(later(op, inputs, twins, on_gpu));
  stack->insert(stack->end(), on_gpu.begin(), on_gpu.end());
}

torch::CppFunction boxed() { return torch::CppFunction::makeFromBoxedFunction<&run_on_host>(); }

}  // namespace
}  // namespace emulation

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(emulation::boxed()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  // Of these torch's CPU build has no kernel for the CPU.
  m.impl("mm.dtype", emulation::boxed());
  m.impl("mm.dtype_out", emulation::boxed());
  // Written for every device, by way of a table of kernels that has none for CUDA here.
  m.impl("copy_", emulation::boxed());
  // A fallback comes after what is composed of other operators; the CPU's own shall come before.
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    const bool is_torchs = name.name.starts_with("aten::");
    if (is_torchs && op->hasKernelForDispatchKey(c10::DispatchKey::CPU) &&
        !op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) {
      m.impl(c10::toString(name).c_str(), emulation::boxed());
    }
  }
}
