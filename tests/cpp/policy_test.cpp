// SPDX-License-Identifier: MIT
// What cpu/policy.h promises, over a grid of sizes.
#include <vector>

#include "check.h"
#include "cpu/policy.h"

using namespace fused_step;
using namespace fused_step::cpu;
using namespace fused_step::test;

namespace {

// Around every power of two.
std::vector<int64_t> extents(int64_t max) {
  std::vector<int64_t> all = {0};
  for (int64_t power = 1; power <= max; power *= 2) {
    for (const int64_t n : {power - 1, power, power + 1, power + power / 2}) {
      if (n > all.back() && n <= max) all.push_back(n);
    }
  }
  return all;
}

std::vector<int64_t> inputs() {
  std::vector<int64_t> all;
  for (int64_t I = 0; I <= 66; ++I) all.push_back(I);
  for (const int64_t I : extents(int64_t{1} << 17)) {
    if (I > 66) all.push_back(I);
  }
  return all;
}

void describe_shape(const LinearShape& s) {
  describe("B %lld, I %lld, O %lld", static_cast<long long>(s.B), static_cast<long long>(s.I),
           static_cast<long long>(s.O));
}

template <typename Body>
void for_each_shape(const Body& body) {
  const std::vector<int64_t> rows = extents(int64_t{1} << 24);
  for (const int64_t I : inputs()) {
    for (int64_t O = 0; O <= kMaxOnePassOutputs + 1; ++O) {
      for (const int64_t B : rows) {
        describe_shape({B, I, O});
        body(LinearShape{B, I, O});
      }
    }
  }
}

}  // namespace

TEST(chunks_cover_all_rows_once_and_none_is_empty) {
  for_each_shape([](const LinearShape& s) {
    const int64_t wanted = one_pass_chunks(s);
    check(1 <= wanted && wanted <= kMaxChunks, "%lld chunks", static_cast<long long>(wanted));
    if (s.B == 0) return;
    const int64_t rows = rows_per_chunk(s.B, wanted), chunks = ceil_div(s.B, rows);
    check(chunks <= wanted, "%lld chunks where %lld were wanted", static_cast<long long>(chunks),
          static_cast<long long>(wanted));
    check((chunks - 1) * rows < s.B && s.B <= chunks * rows, "%lld chunks of %lld rows",
          static_cast<long long>(chunks), static_cast<long long>(rows));
    check(wanted == 1 ? rows == s.B : rows % 16 == 0, "%lld rows per chunk",
          static_cast<long long>(rows));
  });
}

TEST(chunks_do_not_decrease_with_rows) {
  for (const int64_t I : inputs()) {
    for (int64_t O = 0; O <= kMaxOnePassOutputs; ++O) {
      int64_t before = 0;
      for (const int64_t B : extents(int64_t{1} << 24)) {
        describe_shape({B, I, O});
        const int64_t chunks = one_pass_chunks({B, I, O});
        check(chunks >= before, "%lld chunks, %lld with fewer rows", static_cast<long long>(chunks),
              static_cast<long long>(before));
        before = chunks;
      }
    }
  }
}

TEST(partial_sums_are_at_most_an_eighth_of_x) {
  for_each_shape([](const LinearShape& s) {
    if (choose_plan(s, sizeof(float)) != Plan::kOnePass) return;
    const int64_t wanted = one_pass_chunks(s);
    if (wanted == 1) return;
    const int64_t chunks = ceil_div(s.B, rows_per_chunk(s.B, wanted));
    const int64_t partials = chunks * s.O * partial_stride(s.I), x = s.B * s.I;
    check(8 * partials <= x, "%lld chunks: partial dW has %lld elements, x %lld",
          static_cast<long long>(chunks), static_cast<long long>(partials),
          static_cast<long long>(x));
  });
}

TEST(partial_rows_hold_whole_vectors_of_any_width_from_any_column) {
  for (int64_t I = 0; I <= 8200; ++I) {
    describe("I %lld", static_cast<long long>(I));
    // The last column may begin a vector of 16.
    check(partial_stride(I) >= I + 15, "%lld", static_cast<long long>(partial_stride(I)));
    check(partial_stride(I) % 16 == 0, "%lld", static_cast<long long>(partial_stride(I)));
    const int64_t bytes = partial_stride(I) * static_cast<int64_t>(sizeof(float));
    check(I % 1024 != 0 || bytes % 4096 != 0, "rows of dW share their sets of L1");
  }
}

TEST(tiles_have_4_to_64_rows_and_fit_their_cache) {
  for (const int64_t size : {4, 8}) {
    for (const int64_t I : inputs()) {
      describe("I %lld of %lld bytes", static_cast<long long>(I), static_cast<long long>(size));
      const int64_t rows = tile_rows(I, size), bytes = rows * I * size;
      check(kMinTileRows <= rows && rows <= kMaxTileRows && rows % 4 == 0, "%lld rows",
            static_cast<long long>(rows));
      // More than 8 rows: within L1's half. 8: within L2's share.
      check(rows <= 8 || bytes <= kTileBytes, "%lld rows", static_cast<long long>(rows));
      check(rows == kMinTileRows || bytes <= kMaxTileBytes, "%lld rows",
            static_cast<long long>(rows));
      // No tile is smaller than it has to be.
      check(rows == kMaxTileRows || 2 * bytes + 8 * I * size > kTileBytes, "%lld rows",
            static_cast<long long>(rows));
      const bool one_pass = choose_plan({1, I, 1}, size) == Plan::kOnePass;
      check(!one_pass || bytes <= kMaxTileBytes, "a tile of %lld bytes",
            static_cast<long long>(bytes));
    }
  }
}

TEST(one_pass_is_chosen_only_within_its_limits) {
  for_each_shape([](const LinearShape& s) {
    const Plan plan = choose_plan(s, sizeof(float));
    check(plan == Plan::kOnePass || plan == Plan::kGemm, "no plan");
    check(s.O <= kMaxOnePassOutputs || plan == Plan::kGemm, "one-pass with too many outputs");
    const bool small = s.B * s.I * s.O <= kMaxSerialWork && s.O <= kMaxOnePassOutputs &&
                       kMinTileRows * s.I * 4 <= kMaxTileBytes;
    check(!small || plan == Plan::kOnePass, "gemm for %lld multiply-adds",
          static_cast<long long>(s.B * s.I * s.O));
  });
}

TEST(residual_chunks_cover_all_rows) {
  for (const int64_t O : extents(int64_t{1} << 12)) {
    for (const int64_t B : extents(int64_t{1} << 20)) {
      describe_shape({B, 0, O});
      const int64_t wanted = residual_chunks(B, O);
      check(1 <= wanted && wanted <= kMaxChunks, "%lld chunks", static_cast<long long>(wanted));
      if (B == 0) continue;
      const int64_t rows = rows_per_chunk(B, wanted), chunks = ceil_div(B, rows);
      check(1 <= chunks && chunks <= wanted && (chunks - 1) * rows < B, "%lld chunks of %lld rows",
            static_cast<long long>(chunks), static_cast<long long>(rows));
    }
  }
}

TEST(grad_panels_are_as_large_as_their_share_of_cache_allows) {
  for (const int64_t size : {4, 8}) {
    for (const int64_t threads : {1, 2, 16, 256}) {
      for (const int64_t I : inputs()) {
        describe("I %lld of %lld bytes, %lld threads", static_cast<long long>(I),
                 static_cast<long long>(size), static_cast<long long>(threads));
        const int64_t outputs = grad_panel_outputs(I, size, threads);
        const int64_t limit = threads * kGradPanelBytesPerThread;
        check(outputs >= 1 && (outputs == 1 || outputs * I * size <= limit), "%lld outputs",
              static_cast<long long>(outputs));
        check(I == 0 || (outputs + 1) * I * size > limit, "%lld outputs, one more would fit",
              static_cast<long long>(outputs));
      }
    }
  }
}
