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
#include "float16_cases.h"

namespace fused_step::test {

struct SimdCases {
  void (*splat)();
  void (*keep)();
  void (*transpose_sum)();
  void (*lane_sum)();
  void (*add_widened)();
};

// What loads and stores do, for every type that memory may hold.
struct SimdStorageCases {
  void (*load_and_store)();
  void (*load_first)();
  void (*store_first)();
  void (*load_strided)();
};

// The conversions of the 16-bit types.
struct SimdWordCases {
  void (*widen)();
  void (*narrow)();
};

template <typename T>
bool same_bits(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

}  // namespace fused_step::test
