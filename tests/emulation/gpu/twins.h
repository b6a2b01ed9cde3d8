// SPDX-License-Identifier: MIT
// Tensors of an emulated GPU as tensors of the CPU, on the same memory, and back.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <unordered_map>

namespace emulation {

// Those of one call of an operator. Two that share memory share it on the CPU, too.
class Twins {
 public:
  // `any_device`: the tensors may be on several.
  explicit Twins(bool any_device) : any_device_(any_device) {}

  // Tensors on the CPU stay as they are.
  at::Tensor on_host(const at::Tensor& t);

  // What it was made from, a view of that, or a new tensor.
  at::Tensor on_gpu(const at::Tensor& host) const;

  // Whether the operator has made its memory.
  bool is_fresh(const at::Tensor& host) const;

  // An operator with `out` may have given it another size, and other memory.
  void follow_resized() const;

  // Of the tensors on a GPU; nothing if there is none.
  std::optional<c10::Device> device() const { return device_; }
  // Of results, the current one if there is none.
  c10::Device result_device() const;
  // A tensor on the CPU that is no mere number.
  bool has_host_data() const { return has_host_data_; }

 private:
  c10::Storage host_storage(const at::Tensor& t);
  c10::Storage copied(const c10::Storage& host) const;

  bool any_device_;
  bool has_host_data_ = false;
  std::optional<c10::Device> device_;
  std::unordered_map<const c10::TensorImpl*, at::Tensor> hosts_;      // by a GPU's tensor
  std::unordered_map<const c10::TensorImpl*, at::Tensor> originals_;  // by its twin
  std::unordered_map<const c10::StorageImpl*, c10::Storage> host_storages_;
  std::unordered_map<const c10::StorageImpl*, at::Tensor> owners_;  // by the twin's storage
};

}  // namespace emulation
