// SPDX-License-Identifier: MIT
// Which instruction set's table is in use.
#include <cstdlib>
#include <cstring>

#include "check.h"
#include "cpu/kernels.h"

using namespace fused_step;
using namespace fused_step::cpu;
using namespace fused_step::test;

TEST(the_level_in_use_is_the_named_or_the_widest_and_changes_only_to_a_supported_one) {
  const Isa start = isa_used();
  check(isa_supported(start), "%s is in use and not supported", isa_name(start));
  check(isa_supported(Isa::kBaseline), "the baseline is not supported");
  const char* name = std::getenv("FUSED_STEP_ISA");
  for (int k = 0; k < kIsaCount; ++k) {
    const Isa isa = static_cast<Isa>(k);
    describe("%s", isa_name(isa));
    check(name != nullptr || !isa_supported(isa) || isa <= start, "%s is in use instead",
          isa_name(start));
    const Isa before = isa_used();
    check(use_isa(isa) == isa_supported(isa), "use_isa does not say what is supported");
    check(isa_used() == (isa_supported(isa) ? isa : before), "%s is in use", isa_name(isa_used()));
  }
  check(std::strcmp(isa_name(Isa::kBaseline), "baseline") == 0 &&
            std::strcmp(isa_name(Isa::kAvx2), "avx2") == 0 &&
            std::strcmp(isa_name(Isa::kAvx512), "avx512") == 0,
        "names");
  use_isa(start);
}

TEST(every_level_has_a_table_of_its_own) {
  const Kernels<float>* last_float = nullptr;
  const Kernels<double>* last_double = nullptr;
  for_each_isa([&](const char* isa) {
    describe("%s", isa);
    check(&kernels<float>() != last_float && &kernels<double>() != last_double, "shared table");
    last_float = &kernels<float>();
    last_double = &kernels<double>();
  });
}
