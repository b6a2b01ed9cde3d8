// SPDX-License-Identifier: MIT
// The tests of cpu/simd.h as one instruction set has them, and everything they need from outside.
#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "buffer.h"
#include "check.h"
#include "cpu/isa_headers.h"

namespace fused_step::test {

struct SimdCases {
  void (*load_and_store)();
  void (*splat)();
  void (*keep)();
  void (*load_first)();
  void (*store_first)();
  void (*load_strided)();
  void (*transpose_sum)();
  void (*lane_sum)();
  void (*add_widened)();
};

template <typename T>
bool same_bits(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

}  // namespace fused_step::test
