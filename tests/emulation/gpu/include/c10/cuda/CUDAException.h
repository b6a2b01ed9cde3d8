// SPDX-License-Identifier: MIT
// Stands in for torch's header, as far as our bindings use it.
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#define C10_CUDA_CHECK(call)                                                    \
  do {                                                                          \
    const cudaError_t error = (call);                                           \
    TORCH_CHECK(error == cudaSuccess, "CUDA error: ", static_cast<int>(error)); \
  } while (false)
