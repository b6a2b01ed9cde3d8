// SPDX-License-Identifier: MIT
// Operators that make memory of an emulated GPU, or give a tensor other memory.
#include <ATen/EmptyTensor.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <optional>
#include <utility>

#include "streams.h"

namespace emulation {
namespace {

using c10::Device;
using c10::DispatchKey;
using c10::DispatchKeySet;

at::Tensor empty(c10::SymIntArrayRef sizes, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout> /*layout*/, std::optional<Device> device,
                 std::optional<bool> /*pinned*/, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), c10::GetAllocator(c10::kCUDA),
                                   DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype),
                                   format);
}

at::Tensor empty_strided(c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout> /*layout*/,
                         std::optional<Device> device, std::optional<bool> /*pinned*/) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides),
      c10::GetAllocator(c10::kCUDA), DispatchKeySet(DispatchKey::CUDA),
      c10::dtype_or_default(dtype));
}

class NoMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t /*bytes*/) override {
    return {nullptr, Device(c10::kCUDA, current_device())};
  }
  void copy_data(void* /*to*/, const void* /*from*/, size_t /*bytes*/) const override {}
};

// The zeros of forward-mode differentiation.
at::Tensor zeros_without_memory(c10::SymIntArrayRef sizes, std::optional<at::ScalarType> dtype,
                                std::optional<at::Layout> /*layout*/, std::optional<Device> device,
                                std::optional<bool> /*pinned*/) {
  static NoMemory no_memory;
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), &no_memory,
                                   DispatchKeySet({DispatchKey::CUDA, DispatchKey::ZeroTensor}),
                                   c10::dtype_or_default(dtype), std::nullopt);
}

at::Tensor& set_storage(at::Tensor& t, c10::Storage source, c10::SymInt offset,
                        c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides) {
  c10::TensorImpl* const impl = t.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides),
                              offset.expect_int());
  return t;
}

at::Tensor& set_whole_storage(at::Tensor& t, c10::Storage source) {
  const c10::SymInt count(static_cast<int64_t>(source.nbytes() / t.element_size()));
  return set_storage(t, std::move(source), 0, {count}, {c10::SymInt(1)});
}

}  // namespace
}  // namespace emulation

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &emulation::empty);
  m.impl("empty_strided", &emulation::empty_strided);
  m.impl("_efficientzerotensor", &emulation::zeros_without_memory);
  m.impl("set_.source_Storage", &emulation::set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &emulation::set_storage);
}
