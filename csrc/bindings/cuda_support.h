// SPDX-License-Identifier: MIT
// What every binding of the CUDA engine needs: the devices it serves, scratch memory, and the
// pairs of types that kernels are compiled for. Builds with CUDA only.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/device_scratch.h"
#include "core/float16.h"
#include "cuda/launch.h"

namespace fused_step {

// What the kernels were compiled for: "8.0", …, "12.0+PTX".
std::vector<std::string> cuda_archs();

// Whether one of those runs on the device. Asks the driver once for each device.
bool is_served_by_cuda(c10::Device device);

bool is_capturing(c10::cuda::CUDAStream stream);

// `bytes` of workspace and the tickets, from `kept` where it may be used and has enough. Memory
// that is replaced goes back to the caching allocator on the stream it was used on.
cuda::Scratch reserve_scratch(DeviceScratch& kept, c10::cuda::CUDAStream stream, int64_t bytes);

template <typename T>
const T* read_data(const at::Tensor& t) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) : nullptr;
}
template <typename T>
T* written_data(const at::Tensor& t) {
  return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

// Gradients of parameters of type `dtype` are kept in this one.
inline at::ScalarType accum_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// out [M, N] = a^T b of a [K, M] and b [K, N] of one dtype; `out` has its accumulator type.
void transposed_product(at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

// Calls visit.operator()<P>() for the type of parameters.
template <typename Visit>
decltype(auto) for_param_type(at::ScalarType param, const Visit& visit) {
  switch (param) {
    case at::kFloat:
      return visit.template operator()<float>();
    case at::kDouble:
      return visit.template operator()<double>();
    case at::kBFloat16:
      return visit.template operator()<BFloat16>();
    case at::kHalf:
      return visit.template operator()<Float16>();
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernels for parameters of ", param);
  }
}

// Calls visit.operator()<X, P>() for the types of x and of the parameters; the callers have checked
// that the pair is one of launch.h.
template <typename Visit>
decltype(auto) for_types(at::ScalarType x, at::ScalarType param, const Visit& visit) {
  if (param == at::kFloat && x == at::kBFloat16) {
    return visit.template operator()<BFloat16, float>();
  }
  if (param == at::kFloat && x == at::kHalf) return visit.template operator()<Float16, float>();
  TORCH_INTERNAL_ASSERT(x == param, "no kernels for ", x, " with parameters of ", param);
  return for_param_type(
      param, [&]<typename P>() -> decltype(auto) { return visit.template operator()<P, P>(); });
}

}  // namespace fused_step
