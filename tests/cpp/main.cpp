// SPDX-License-Identifier: MIT
// Runs the tests whose name contains the first argument, or all.
#include <chrono>
#include <csignal>
#include <cstring>
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#endif

#include "check.h"

using namespace fused_step;
using namespace fused_step::test;

namespace {

void print_description() {
  std::printf("    ended in %s\n", description);
  std::fflush(stdout);
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
void print_description_at_the_end() { __sanitizer_set_death_callback(print_description); }
#else
void on_fault(int signal) {
  print_description();
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}
void print_description_at_the_end() {
  for (const int signal : {SIGSEGV, SIGBUS, SIGILL, SIGABRT}) std::signal(signal, on_fault);
}
#endif

void print_levels() {
  for (int k = 0; k < cpu::kIsaCount; ++k) {
    const cpu::Isa isa = static_cast<cpu::Isa>(k);
    const bool runs = cpu::isa_supported(isa);
    std::printf("%s: %s\n", cpu::isa_name(isa), runs ? "run" : "NOT RUN, the processor lacks it");
  }
}

// Whether all of the test's checks held.
bool passes(const Test& test) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  failures = 0;
  describe("%s", test.name);
  test.run();
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  std::printf("%-6s %s (%.1f s", failures > 0 ? "FAILED" : "ok", test.name, seconds);
  if (failures > 0) std::printf(", %lld checks failed", static_cast<long long>(failures));
  std::printf(")\n");
  std::fflush(stdout);
  return failures == 0;
}

}  // namespace

int main(int argc, char** argv) {
  print_description_at_the_end();
  print_levels();
  int passed = 0, failed = 0;
  for (const Test& test : tests()) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
    ++(passes(test) ? passed : failed);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}
