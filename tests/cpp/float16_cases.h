// SPDX-License-Identifier: MIT
// The floats at which rounding to 16 bit may go wrong.
#pragma once

#include "buffer.h"
#include "core/float16.h"

namespace fused_step::test {

// Calls body(bits) with every 16-bit value, with the middle to the next one, with the neighbours of
// both; and with random bits, a NaN or infinity among them every 256. A multiple of 16 calls.
template <typename S, typename Body>
void for_each_float_to_round(const Body& body) {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const uint32_t value = bits_of_float(widen(S{static_cast<uint16_t>(bits)}));
    const uint32_t next = bits_of_float(widen(S{static_cast<uint16_t>(bits + 1)}));
    const uint32_t middle = value + (next - value) / 2;
    for (const uint32_t near : {value, middle}) {
      for (const uint32_t off : {0xffffffffu, 0u, 1u}) body(near + off);
    }
  }
  for (uint64_t k = 0; k < 0x40000u; ++k) body(static_cast<uint32_t>(hash(7, k)));
}

}  // namespace fused_step::test
