// SPDX-License-Identifier: MIT
// A test is a function that calls check(). describe() says what the checks that follow are about;
// it is printed with a failure, and when a sanitizer or a fault ends the run.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <type_traits>
#include <vector>

#include "core/float16.h"
#include "cpu/kernels.h"

namespace fused_step::test {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline char description[512] = "";
inline int64_t failures = 0;  // of the running test

[[gnu::format(printf, 1, 2)]] inline void describe(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::vsnprintf(description, sizeof(description), format, args);
  va_end(args);
}

[[gnu::format(printf, 2, 3)]] inline void check(bool ok, const char* format, ...) {
  constexpr int64_t kShown = 5;
  if (ok || ++failures > kShown) return;
  std::printf("    %s: ", description);
  va_list args;
  va_start(args, format);
  std::vprintf(format, args);
  va_end(args);
  std::printf("\n");
}

template <typename T>
constexpr const char* type_name() {
  if (std::is_same_v<T, BFloat16>) return "bfloat16";
  if (std::is_same_v<T, Float16>) return "float16";
  return sizeof(T) == 4 ? "float" : "double";
}

// Calls body(level's name) with each instruction set that the processor has.
template <typename Body>
void for_each_isa(const Body& body) {
  const cpu::Isa before = cpu::isa_used();
  for (int k = 0; k < cpu::kIsaCount; ++k) {
    if (cpu::use_isa(static_cast<cpu::Isa>(k))) body(cpu::isa_name(static_cast<cpu::Isa>(k)));
  }
  cpu::use_isa(before);
}

}  // namespace fused_step::test

#define TEST(name)                                                \
  static void name();                                             \
  [[maybe_unused]] static const bool name##_is_registered =       \
      (fused_step::test::tests().push_back({#name, name}), true); \
  static void name()
