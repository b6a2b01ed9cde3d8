// SPDX-License-Identifier: MIT
// One step of SGD as a list of what it updates: what the optimizer's engines are handed.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "core/params.h"
#include "cpu/kernels.h"

namespace fused_step {

constexpr c10::DeviceIndex kOnCpu = -1;

// One parameter with its gradient and momentum buffer. `slice` holds all of it.
struct SgdItem {
  cpu::SgdSlice slice;
  SgdStorage storage;
  c10::DeviceIndex device;  // of CUDA, or kOnCpu
  int32_t group;            // index of its rule
  int64_t end;              // elements of the list's items up to and with this one
};

// Sets every item's `end`.
inline void count_elements(std::vector<SgdItem>& items) {
  int64_t end = 0;
  for (SgdItem& item : items) item.end = end += item.slice.n;
}

inline int64_t elements(const std::vector<SgdItem>& items) {
  return items.empty() ? 0 : items.back().end;
}

// Bytes of an element of a parameter so stored, and of its momentum buffer.
inline int64_t param_bytes(SgdStorage storage) {
  switch (storage) {
    case SgdStorage::kFloat:
      return 4;
    case SgdStorage::kDouble:
      return 8;
    default:
      return 2;
  }
}

// A momentum buffer in float32 beside a parameter of 16 bit.
inline bool has_float_buf(SgdStorage storage) {
  return storage == SgdStorage::kBFloat16FloatBuf || storage == SgdStorage::kFloat16FloatBuf;
}

inline int64_t buf_bytes(SgdStorage storage) {
  return has_float_buf(storage) ? 4 : param_bytes(storage);
}

// A step over the items that lie on CUDA. Of the rules the options count, everything else is here.
struct SgdCudaStep {
  const std::vector<SgdItem>& items;
  const std::vector<cpu::SgdRule>& rules;  // by group
  const std::vector<at::Tensor>& lrs;      // by group: [] on the items' device, or undefined
  double unscale;
  at::Tensor grad_scale;  // [] float32 on some CUDA device, instead of `unscale`, or undefined
  at::Tensor found_inf;   // [] likewise, not 0: nothing is updated
  GradAfter grad_after;
  std::optional<double> max_norm;  // all items are on one device then
};

}  // namespace fused_step
