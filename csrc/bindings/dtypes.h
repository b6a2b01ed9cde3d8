// SPDX-License-Identifier: MIT
// Which dtypes the ops take, and what C++ type stands behind each: the one place that knows.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <type_traits>

#include "core/float16.h"

namespace fused_step {

constexpr const char* kFusedDtypes = "float32, float64, bfloat16 or float16";

inline bool is_16_bit(at::ScalarType dtype) { return dtype == at::kBFloat16 || dtype == at::kHalf; }

inline bool is_fused_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || is_16_bit(dtype);
}

// What sums over elements of `dtype` are made and kept in.
inline at::ScalarType accum_dtype(at::ScalarType dtype) {
  return is_16_bit(dtype) ? at::kFloat : dtype;
}

// What dL/dx and the residual are kept in until backward: cpu::Unscaled as a dtype.
inline at::ScalarType unscaled_dtype(at::ScalarType dtype) {
  return dtype == at::kHalf ? at::kFloat : dtype;
}

// Whether an input of dtype `input` may meet parameters and a target of dtype `param`: the same,
// or 16 bit with float32, as under autocast.
inline bool is_fused_pair(at::ScalarType input, at::ScalarType param) {
  return input == param || (param == at::kFloat && is_16_bit(input));
}

template <typename S>
constexpr bool kIs16Bit = !std::is_same_v<S, Accum<S>>;

// Calls body(S{}) with the type that elements of `dtype` are stored in.
template <typename Body>
decltype(auto) with_storage(at::ScalarType dtype, const Body& body) {
  switch (dtype) {
    case at::kFloat:
      return body(float{});
    case at::kDouble:
      return body(double{});
    case at::kBFloat16:
      return body(BFloat16{});
    case at::kHalf:
      return body(Float16{});
    default:
      TORCH_INTERNAL_ASSERT(false, "unchecked dtype ", dtype);
  }
}

// Calls body(X{}, P{}) for a pair that is_fused_pair() allows.
template <typename Body>
decltype(auto) with_pair(at::ScalarType input, at::ScalarType param, const Body& body) {
  return with_storage(input, [&](auto x) -> decltype(auto) {
    if constexpr (kIs16Bit<decltype(x)>) {
      if (param == at::kFloat) return body(x, float{});
    }
    return body(x, x);
  });
}

// Elements of `t`; null for an undefined tensor.
template <typename S>
const S* read(const at::Tensor& t) {
  return t.defined() ? static_cast<const S*>(t.const_data_ptr()) : nullptr;
}

template <typename S>
S* written(const at::Tensor& t) {
  return t.defined() ? static_cast<S*>(t.mutable_data_ptr()) : nullptr;
}

}  // namespace fused_step
