// SPDX-License-Identifier: MIT
// The form of every error of an op: op, argument, expected, got.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <vector>

#include "bindings/memory.h"

namespace fused_step {

// Python's None arrives as an undefined tensor.
inline void check_given(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.defined(), op, ": ", name, " must be a torch.Tensor, got None");
}

inline void check_shape(const char* op, const char* name, const at::Tensor& tensor,
                        const char* meaning, at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected, op, ": ", name, " must have ", meaning, " ",
                    expected, ", got ", tensor.sizes());
}

inline void check_dtype(const char* op, const char* name, const at::Tensor& tensor,
                        at::ScalarType expected) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == expected, op, ": ", name, " must have the dtype of ",
                   "weight ", expected, ", got ", tensor.scalar_type());
}

inline void check_device(const char* op, const char* name, const at::Tensor& tensor,
                         c10::Device expected) {
  TORCH_CHECK_VALUE(tensor.device() == expected, op, ": ", name,
                    " must be on the device of weight ", expected, ", got ", tensor.device());
}

// Elements that are read or written are there: a storage may have been freed or cut under them.
inline void check_memory(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(has_its_storage(tensor), op, ": ", name, " must have memory for its shape ",
                    tensor.sizes(), ", got a storage of ", tensor.storage().nbytes(), " bytes");
}

// Memory that is written: [data, data + nbytes) without gaps. An inference tensor has no version to
// count the update by, and torch's own updates reject it as well.
inline void check_written(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(!tensor.is_inference() || c10::InferenceMode::is_enabled(), op, ": ", name,
              " must not be an inference tensor outside of inference mode: it is updated in place");
  TORCH_CHECK_VALUE(tensor.is_contiguous(), op, ": ", name, " must be contiguous, got strides ",
                    tensor.strides(), " for shape ", tensor.sizes());
}

}  // namespace fused_step
