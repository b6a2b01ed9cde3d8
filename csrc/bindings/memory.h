// SPDX-License-Identifier: MIT
// What kind of tensor it is, and where its elements lie in memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace fused_step {

// Dispatch keys of an ordinary tensor on the CPU or on CUDA. Inference tensors, subclasses, views
// with a negative or conjugate bit, sparse, meta, fake and functorch tensors all differ. Not taken
// from a tensor: one that is made in inference mode is none of these.
constexpr c10::DispatchKeySet kPlainCpuKeys{c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                            c10::DispatchKey::AutocastCPU,
                                            c10::DispatchKey::ADInplaceOrView};
constexpr c10::DispatchKeySet kPlainCudaKeys{c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCUDA,
                                             c10::DispatchKey::AutocastCUDA,
                                             c10::DispatchKey::ADInplaceOrView};

inline bool has_plain_cpu_keys(const at::Tensor& t) { return t.key_set() == kPlainCpuKeys; }
inline bool has_plain_keys(const at::Tensor& t) {
  return has_plain_cpu_keys(t) || t.key_set() == kPlainCudaKeys;
}

// The half-open range of addresses that holds every element; empty for a tensor without elements.
struct Extent {
  uintptr_t begin;
  uintptr_t end;

  bool overlaps(const Extent& other) const { return begin < other.end && other.begin < end; }
};

inline Extent extent_of(const at::Tensor& t) {
  if (t.numel() == 0) return {0, 0};
  int64_t last = 0;  // elements between the first and the last, strides being non-negative
  const at::IntArrayRef sizes = t.sizes(), strides = t.strides();
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  return {begin, begin + static_cast<uintptr_t>(last + 1) * t.element_size()};
}

// False for a tensor whose storage was freed or cut under it (resize_(0), FSDP): reading its
// elements would read somebody else's memory.
inline bool has_its_storage(const at::Tensor& t) {
  if (t.numel() == 0) return true;
  int64_t last = t.storage_offset();
  const at::IntArrayRef sizes = t.sizes(), strides = t.strides();
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  const auto bytes = static_cast<size_t>(last + 1) * t.element_size();
  return t.has_storage() && t.storage().nbytes() >= bytes;
}

// Whether kernels may read one number from `t`.
inline bool is_device_scalar(const at::Tensor& t) {
  return t.is_cuda() && has_plain_keys(t) && t.numel() == 1 && !t.requires_grad() &&
         has_its_storage(t);
}

}  // namespace fused_step
