// SPDX-License-Identifier: MIT
#include "twins.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>

#include <cstring>
#include <utility>

#include "streams.h"

namespace emulation {

using c10::Device;
using c10::DispatchKey;
using c10::DispatchKeySet;

namespace {

void give_layout(const at::Tensor& to, const at::Tensor& from) {
  to.unsafeGetTensorImpl()->set_sizes_and_strides(from.sizes(), from.strides(),
                                                  from.storage_offset());
}

void give_bits(const at::Tensor& to, const at::Tensor& from) {
  to._set_neg(from.is_neg());
  to._set_conj(from.is_conj());
}

}  // namespace

at::Tensor Twins::on_host(const at::Tensor& t) {
  if (!t.defined()) return t;
  if (!t.is_cuda()) {
    has_host_data_ = has_host_data_ || t.dim() > 0;
    return t;
  }
  TORCH_CHECK(any_device_ || !device_.has_value() || *device_ == t.device(),
              "Expected all tensors to be on the same device, but found at least two devices, ",
              *device_, " and ", t.device(), "!");
  device_ = t.device();
  at::Tensor& host = hosts_[t.unsafeGetTensorImpl()];
  if (host.defined()) return host;
  host = at::detail::make_tensor<c10::TensorImpl>(host_storage(t), DispatchKeySet(DispatchKey::CPU),
                                                  t.dtype());
  give_layout(host, t);
  give_bits(host, t);
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) {
    host.unsafeGetTensorImpl()->set_wrapped_number(true);
  }
  originals_.emplace(host.unsafeGetTensorImpl(), t);
  return host;
}

at::Tensor Twins::on_gpu(const at::Tensor& host) const {
  if (!host.defined()) return host;
  const auto same = originals_.find(host.unsafeGetTensorImpl());
  if (same != originals_.end()) return same->second;
  const auto viewed = owners_.find(host.storage().unsafeGetStorageImpl());
  at::Tensor gpu;
  if (viewed == owners_.end()) {
    gpu = at::detail::make_tensor<c10::TensorImpl>(copied(host.storage()),
                                                   DispatchKeySet(DispatchKey::CUDA), host.dtype());
  } else {
    // A view of what was made in inference mode is such a tensor, too.
    gpu = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW,
                                                   c10::Storage(viewed->second.storage()),
                                                   viewed->second.key_set(), host.dtype());
  }
  give_layout(gpu, host);
  give_bits(gpu, host);
  return gpu;
}

bool Twins::is_fresh(const at::Tensor& host) const {
  return host.defined() && !originals_.contains(host.unsafeGetTensorImpl()) &&
         !owners_.contains(host.storage().unsafeGetStorageImpl());
}

void Twins::follow_resized() const {
  for (const auto& [impl, host] : hosts_) {
    const at::Tensor& gpu = originals_.at(host.unsafeGetTensorImpl());
    c10::StorageImpl* const storage = gpu.storage().unsafeGetStorageImpl();
    if (storage->nbytes() != host.storage().nbytes()) {
      c10::Storage own = copied(host.storage());
      storage->set_data_ptr(own.set_data_ptr({}));
      storage->set_nbytes(host.storage().nbytes());
    }
    if (gpu.sizes() != host.sizes() || gpu.strides() != host.strides()) give_layout(gpu, host);
  }
}

Device Twins::result_device() const {
  return device_.value_or(Device(c10::kCUDA, current_device()));
}

c10::Storage Twins::host_storage(const at::Tensor& t) {
  const c10::Storage& gpu = t.storage();
  c10::Storage& host = host_storages_[gpu.unsafeGetStorageImpl()];
  if (!host) {
    host = c10::Storage(c10::Storage::use_byte_size_t(), gpu.nbytes(),
                        c10::DataPtr(gpu.mutable_data(), c10::kCPU), c10::GetCPUAllocator(),
                        /*resizable=*/true);
    owners_.emplace(host.unsafeGetStorageImpl(), t);
  }
  return host;
}

// In a GPU's memory.
c10::Storage Twins::copied(const c10::Storage& host) const {
  const c10::DeviceGuard guard(result_device());
  c10::Storage gpu(c10::Storage::use_byte_size_t(), host.nbytes(), c10::GetAllocator(c10::kCUDA),
                   /*resizable=*/true);
  if (host.nbytes() > 0) std::memcpy(gpu.mutable_data(), host.data(), host.nbytes());
  return gpu;
}

}  // namespace emulation
