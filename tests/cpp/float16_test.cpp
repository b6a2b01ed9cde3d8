// SPDX-License-Identifier: MIT
// The 16-bit types of core/ against their definition in real numbers.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "check.h"
#include "core/float16.h"
#include "float16_cases.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

using namespace fused_step;
using namespace fused_step::test;

namespace {

// Bits of mantissa with the leading one, and the exponent of the smallest normal value.
template <typename S>
constexpr int kDigits = std::is_same_v<S, BFloat16> ? 8 : 11;
template <typename S>
constexpr int kMinExponent = std::is_same_v<S, BFloat16> ? -126 : -14;
template <typename S>
constexpr int kExponentBits = 16 - kDigits<S>;

template <typename Body>
void for_both_types(const Body& body) {
  body(BFloat16{});
  body(Float16{});
}

// What the bits stand for. NaN where they say so.
template <typename S>
double value_of(uint16_t bits) {
  constexpr int kMantissaBits = kDigits<S> - 1;
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  const int exponent = bits >> kMantissaBits & ((1 << kExponentBits<S>)-1);
  const int mantissa = bits & ((1 << kMantissaBits) - 1);
  if (exponent == (1 << kExponentBits<S>)-1) {
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN()
                         : sign * std::numeric_limits<double>::infinity();
  }
  const double digits = exponent == 0 ? mantissa : mantissa + (1 << kMantissaBits);
  const int of_last = (exponent == 0 ? kMinExponent<S> : exponent - 1 + kMinExponent<S>);
  return sign * std::ldexp(digits, of_last - kMantissaBits);
}

// The nearest value of S, ties to even; nearbyint() does the same by default.
template <typename S>
double rounded(double value) {
  if (std::isnan(value) || std::isinf(value) || value == 0.0) return value;
  const int exponent = std::max(std::ilogb(value), kMinExponent<S>) - (kDigits<S> - 1);
  const double nearest = std::ldexp(std::nearbyint(std::ldexp(value, -exponent)), exponent);
  const double beyond = std::ldexp(1.0, (1 << (kExponentBits<S> - 1)));
  return std::fabs(nearest) >= beyond
             ? std::copysign(std::numeric_limits<double>::infinity(), value)
             : nearest;
}

bool same(double a, double b) {
  return std::isnan(b) ? std::isnan(a) : a == b && std::signbit(a) == std::signbit(b);
}

}  // namespace

TEST(widen_gives_the_value_of_all_16_bit_numbers) {
  for_both_types([](auto type) {
    using S = decltype(type);
    for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
      const S value{static_cast<uint16_t>(bits)};
      describe("%s %04x", type_name<S>(), bits);
      const double wide = static_cast<double>(widen(value)), want = value_of<S>(value.bits);
      check(same(wide, want), "is %a, want %a", wide, want);
    }
  });
}

#if defined(__x86_64__)
// As torch.set_flush_denormal(True) has it: subnormal floats are read as zero and written as zero.
TEST(widen_gives_the_value_of_all_float16_numbers_where_subnormal_floats_are_zero) {
  const unsigned int before = _mm_getcsr();
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    _mm_setcsr(before | 0x8040u);
    const float wide = widen(Float16{static_cast<uint16_t>(bits)});
    _mm_setcsr(before);
    const double want = value_of<Float16>(static_cast<uint16_t>(bits));
    check(same(static_cast<double>(wide), want), "%04x is %a, want %a", bits,
          static_cast<double>(wide), want);
  }
}
#endif

TEST(narrow_rounds_to_nearest_even_with_subnormals_overflow_and_nan) {
  for_both_types([](auto type) {
    using S = decltype(type);
    describe("%s", type_name<S>());
    for_each_float_to_round<S>([](uint32_t bits) {
      const double value = static_cast<double>(float_from_bits(bits));
      const double got = value_of<S>(narrow<S>(float_from_bits(bits)).bits);
      check(same(got, rounded<S>(value)), "%a becomes %a, want %a", value, got, rounded<S>(value));
    });
  });
}

TEST(narrow_undoes_widen) {
  for_both_types([](auto type) {
    using S = decltype(type);
    for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
      const S value{static_cast<uint16_t>(bits)};
      if (std::isnan(widen(value))) continue;
      describe("%s %04x", type_name<S>(), bits);
      check(narrow<S>(widen(value)).bits == bits, "comes back as %04x",
            narrow<S>(widen(value)).bits);
    }
  });
}
