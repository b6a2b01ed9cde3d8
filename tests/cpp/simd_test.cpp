// SPDX-License-Identifier: MIT
// Runs the tests of cpu/simd.h on every instruction set that the processor has.
#include "simd_test.h"

using namespace fused_step;
using namespace fused_step::test;

namespace fused_step::test {

#define DECLARE_CASES(isa)                        \
  namespace isa {                                 \
  extern const SimdCases kFloatCases;             \
  extern const SimdCases kDoubleCases;            \
  extern const SimdStorageCases kFloatStorage;    \
  extern const SimdStorageCases kDoubleStorage;   \
  extern const SimdStorageCases kBFloat16Storage; \
  extern const SimdStorageCases kFloat16Storage;  \
  extern const SimdWordCases kBFloat16Words;      \
  extern const SimdWordCases kFloat16Words;       \
  }
DECLARE_CASES(baseline)
#if defined(__x86_64__)
DECLARE_CASES(avx2)
DECLARE_CASES(avx512)
#endif

}  // namespace fused_step::test

namespace {

struct Level {
  cpu::Isa isa;
  const SimdCases* of_float;
  const SimdCases* of_double;
  const SimdStorageCases* storage[4];  // float, double, bfloat16, float16
  const SimdWordCases* words[2];       // bfloat16, float16
};

#define LEVEL(isa, id)                                                      \
  Level {                                                                   \
    id, &isa::kFloatCases, &isa::kDoubleCases,                              \
        {&isa::kFloatStorage, &isa::kDoubleStorage, &isa::kBFloat16Storage, \
         &isa::kFloat16Storage},                                            \
        {&isa::kBFloat16Words, &isa::kFloat16Words},                        \
  }

template <typename Body>
void for_each_level(const Body& body) {
  const Level levels[] = {
      LEVEL(baseline, cpu::Isa::kBaseline),
#if defined(__x86_64__)
      LEVEL(avx2, cpu::Isa::kAvx2),
      LEVEL(avx512, cpu::Isa::kAvx512),
#endif
  };
  for (const Level& level : levels) {
    if (cpu::isa_supported(level.isa)) body(level, cpu::isa_name(level.isa));
  }
}

void run_everywhere(void (*SimdCases::*test)()) {
  for_each_level([&](const Level& level, const char* isa) {
    describe("float, %s", isa);
    (level.of_float->*test)();
    describe("double, %s", isa);
    (level.of_double->*test)();
  });
}

void run_for_every_storage(void (*SimdStorageCases::*test)()) {
  constexpr const char* kNames[] = {"float", "double", "bfloat16", "float16"};
  for_each_level([&](const Level& level, const char* isa) {
    for (int k = 0; k < 4; ++k) {
      describe("%s, %s", kNames[k], isa);
      (level.storage[k]->*test)();
    }
  });
}

void run_for_every_word(void (*SimdWordCases::*test)()) {
  constexpr const char* kNames[] = {"bfloat16", "float16"};
  for_each_level([&](const Level& level, const char* isa) {
    for (int k = 0; k < 2; ++k) {
      describe("%s, %s", kNames[k], isa);
      (level.words[k]->*test)();
    }
  });
}

}  // namespace

TEST(simd_load_and_store_move_one_vector) {
  run_for_every_storage(&SimdStorageCases::load_and_store);
}
TEST(simd_load_first_reads_n_and_zeroes_the_rest) {
  run_for_every_storage(&SimdStorageCases::load_first);
}
TEST(simd_store_first_writes_n) { run_for_every_storage(&SimdStorageCases::store_first); }
TEST(simd_load_strided_reads_n_and_zeroes_the_rest) {
  run_for_every_storage(&SimdStorageCases::load_strided);
}
TEST(simd_load_widens_every_16_bit_value_as_core_does) {
  run_for_every_word(&SimdWordCases::widen);
}
TEST(simd_store_rounds_to_16_bit_as_core_does) { run_for_every_word(&SimdWordCases::narrow); }
TEST(simd_splat_fills_every_lane_with_the_same_bits) { run_everywhere(&SimdCases::splat); }
TEST(simd_keep_zeroes_the_lanes_beyond_n) { run_everywhere(&SimdCases::keep); }
TEST(simd_transpose_sum_gives_lane_k_the_sum_of_vector_k) {
  run_everywhere(&SimdCases::transpose_sum);
}
TEST(simd_lane_sum_adds_every_lane_once) { run_everywhere(&SimdCases::lane_sum); }
TEST(simd_add_widened_adds_each_lane_in_double) { run_everywhere(&SimdCases::add_widened); }
