// SPDX-License-Identifier: MIT
// Where a formula rounds. Compilers make one fused multiply-add, with one rounding, of a product
// and a sum wherever they find them; to have PyTorch's bits, a formula says where it may not be.
#pragma once

#include "core/inline.h"

namespace fused_step {

// a * b, rounded, whatever is added to it later. V is an accumulator type or a SIMD vector of it.
template <typename V, typename S>
FUSED_STEP_INLINE V product(const V& a, const S& b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(V) == sizeof(double)) {
    return __dmul_rn(a, b);
  } else {
    return __fmul_rn(a, b);
  }
#elif defined(__clang__)
#pragma clang fp contract(off)
  return a * b;
#else
  V rounded = a * b;
  // The empty instruction stands between the product and what uses it; it costs nothing.
#if defined(__x86_64__)
  asm("" : "+v"(rounded));
#elif defined(__aarch64__)
  asm("" : "+w"(rounded));
#endif
  return rounded;
#endif
}

}  // namespace fused_step
