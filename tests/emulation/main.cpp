// SPDX-License-Identifier: MIT
// run [schedule] [part/of] [name]: the tests whose name contains `name`, under a schedule of
// runtime.h, with a share of the long sweeps.
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>

#include "emulation/runtime.h"
#include "problem.h"

using namespace fused_step::test;

namespace {

void print_description() {
  std::printf("    ended in %s\n", description);
  std::fflush(stdout);
}

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
  std::atexit(print_description);
  if (argc > 1) schedule_of_run = argv[1];
  emulation::use_schedule(schedule_of_run.c_str());
  if (argc > 2) {
    const std::string text = argv[2];
    const size_t slash = text.find('/');
    share = {std::stoull(text.substr(0, slash)), std::stoull(text.substr(slash + 1))};
  }
  const char* const name = argc > 3 ? argv[3] : "";
  int passed = 0, failed = 0;
  for (const Test& test : tests()) {
    if (std::strstr(test.name, name) == nullptr) continue;
    ++(passes(test) ? passed : failed);
  }
  describe("the end");
  std::printf("%s: %d passed, %d failed\n", schedule_of_run.c_str(), passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}
