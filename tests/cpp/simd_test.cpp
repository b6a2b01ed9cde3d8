// SPDX-License-Identifier: MIT
// Runs the tests of cpu/simd.h on every instruction set that the processor has.
#include "simd_test.h"

using namespace fused_step;
using namespace fused_step::test;

namespace fused_step::test {

#define DECLARE_CASES(isa)             \
  namespace isa {                      \
  extern const SimdCases kFloatCases;  \
  extern const SimdCases kDoubleCases; \
  }
DECLARE_CASES(baseline)
#if defined(__x86_64__)
DECLARE_CASES(avx2)
DECLARE_CASES(avx512)
#endif

}  // namespace fused_step::test

namespace {

void run_everywhere(void (*SimdCases::*test)()) {
  struct Level {
    cpu::Isa isa;
    const SimdCases* of_float;
    const SimdCases* of_double;
  };
  const Level levels[] = {
      {cpu::Isa::kBaseline, &baseline::kFloatCases, &baseline::kDoubleCases},
#if defined(__x86_64__)
      {cpu::Isa::kAvx2, &avx2::kFloatCases, &avx2::kDoubleCases},
      {cpu::Isa::kAvx512, &avx512::kFloatCases, &avx512::kDoubleCases},
#endif
  };
  for (const Level& level : levels) {
    if (!cpu::isa_supported(level.isa)) continue;
    describe("float, %s", cpu::isa_name(level.isa));
    (level.of_float->*test)();
    describe("double, %s", cpu::isa_name(level.isa));
    (level.of_double->*test)();
  }
}

}  // namespace

TEST(simd_load_and_store_move_one_vector) { run_everywhere(&SimdCases::load_and_store); }
TEST(simd_splat_fills_every_lane_with_the_same_bits) { run_everywhere(&SimdCases::splat); }
TEST(simd_keep_zeroes_the_lanes_beyond_n) { run_everywhere(&SimdCases::keep); }
TEST(simd_load_first_reads_n_and_zeroes_the_rest) { run_everywhere(&SimdCases::load_first); }
TEST(simd_store_first_writes_n) { run_everywhere(&SimdCases::store_first); }
TEST(simd_load_strided_reads_n_and_zeroes_the_rest) { run_everywhere(&SimdCases::load_strided); }
TEST(simd_transpose_sum_gives_lane_k_the_sum_of_vector_k) {
  run_everywhere(&SimdCases::transpose_sum);
}
TEST(simd_lane_sum_adds_every_lane_once) { run_everywhere(&SimdCases::lane_sum); }
TEST(simd_add_widened_adds_each_lane_in_double) { run_everywhere(&SimdCases::add_widened); }
