// SPDX-License-Identifier: MIT
// The choices that follow from sizes alone.
#include "problem.h"

using namespace fused_step;
using namespace fused_step::cuda;
using namespace fused_step::test;

TEST(chunks_cover_every_row_once_and_keep_to_their_limits) {
  for (const int64_t O : {0, 1, 2, 4}) {
    for (const int64_t I : {0, 1, 10, 63, 64, 1024, 4096}) {
      for (int64_t B = 0; B < (int64_t{1} << 33); B = B * 2 + 1) {
        describe("B %lld I %lld O %lld", static_cast<long long>(B), static_cast<long long>(I),
                 static_cast<long long>(O));
        const Chunks c = one_pass_chunks({B, I, O});
        check(c.count >= 1 && c.count <= kMaxChunks, "%lld chunks",
              static_cast<long long>(c.count));
        check(c.count * c.rows >= B && (c.count - 1) * c.rows <= at_least(0, B - 1), "rows");
        check(c.groups >= 1 && c.groups <= kMaxGroups, "groups");
        check(c.groups * c.group >= c.count && (c.groups - 1) * c.group < c.count, "group");
        // One chunk has its sums however few its rows are. Otherwise 1/8 of a 16-bit x is the
        // limit, and of double x with double sums likewise.
        if (c.count == 1) continue;
        check(c.count * partial_bytes(I, O, 4) * 8 <= B * I * 2, "partial sums of float");
        check(c.count * partial_bytes(I, O, 8) * 8 <= B * I * 8, "partial sums of double");
      }
    }
  }
}

TEST(chunks_of_matrix_units_are_whole_steps_and_keep_to_their_limits) {
  for (const int64_t O : {3, 8, 9, 16, 32}) {
    const int tiles = mma_tiles(O);
    for (const bool with_dx : {false, true}) {
      const int columns = mma_warp_columns(tiles, with_dx);
      for (int64_t I = kMinMmaColumns; I <= mma_columns(O, with_dx); I += 8 + I / 64 * 8) {
        const int team = mma_team(I, columns);
        describe("I %lld O %lld", static_cast<long long>(I), static_cast<long long>(O));
        check(team <= kMmaWarps && team * columns >= I, "a team too small");
        // The smallest GPUs, an A100, an H200.
        check(mma_shared_bytes(tiles, columns, 1, team) + kStaticShared <= 99 * 1024,
              "no room for a stage");
        check(mma_stages(tiles, columns, team, 163 * 1024) >= 2, "one stage where two fit");
        check(mma_stages(tiles, columns, team, 227 * 1024) == 3, "fewer stages than fit");
      }
    }
    for (int64_t I = kMinMmaColumns; I <= mma_columns(O, false); I += 8 + I / 64 * 8) {
      for (int64_t B = 1; B < (int64_t{1} << 33); B = B * 2 + 1) {
        describe("B %lld I %lld O %lld", static_cast<long long>(B), static_cast<long long>(I),
                 static_cast<long long>(O));
        const Chunks c = mma_chunks({B, I, O});
        const int team = mma_team(I, mma_warp_columns(tiles, false));
        check(c.rows % (kMmaRows * (kMmaWarps / team)) == 0, "steps of a block");
        check(c.count >= 1 && c.count <= kMaxChunks && c.groups <= kMaxGroups, "count");
        check(c.count * c.rows >= B && (c.count - 1) * c.rows < B, "rows");
        if (c.count == 1) continue;
        check(c.count * partial_bytes(I, O, 4) * 8 <= B * I * 2, "partial sums");
      }
    }
  }
}

TEST(large_sums_of_chunks_have_a_launch_of_their_own) {
  describe("sums apart");
  const LinearShape one_output{1 << 20, 1024, 1}, eight{1 << 18, 4096, 8};
  check(!sums_apart(one_pass_chunks(one_output), partial_bytes(1024, 1, 4)), "4 KiB a chunk");
  check(sums_apart(mma_chunks(eight), partial_bytes(4096, 8, 4)), "128 KiB a chunk");
  check(!sums_apart(mma_chunks({16, 4096, 8}), partial_bytes(4096, 8, 4)), "one chunk");
}

TEST(residual_grid_covers_every_row_and_column) {
  for (const int64_t O : {0, 1, 9, 255, 256, 257, 1000, 100000}) {
    for (int64_t B = 0; B < (int64_t{1} << 33); B = B * 2 + 1) {
      describe("B %lld O %lld", static_cast<long long>(B), static_cast<long long>(O));
      const ResidualGrid g = residual_grid(B, O);
      check(g.columns >= 1 && g.columns <= kResidualThreads, "columns");
      check(g.tiles * g.columns >= O && (g.tiles - 1) * g.columns <= at_least(0, O - 1), "tiles");
      check(g.groups >= 1 && g.groups <= kMaxGroups && g.groups <= g.tiles, "groups");
      check(g.chunks * g.rows >= B && (g.chunks - 1) * g.rows <= at_least(0, B - 1), "rows");
      check(g.chunks <= kMaxResidualBlocks, "blocks");
      if (g.chunks > 1) check(g.chunks * (O + g.groups) * 8 * 8 <= B * O * 2, "partial sums");
    }
  }
}

TEST(plan_follows_the_sizes) {
  describe("plans");
  check(choose_plan({442, 10, 1}, 4, 4) == Plan::kTiny, "442 x 10");
  check(choose_plan({0, 10, 1}, 4, 4) == Plan::kTiny, "no rows");
  check(choose_plan({1 << 20, 1024, 1}, 4, 4) == Plan::kOnePass, "1M x 1024");
  check(choose_plan({1 << 20, 1024, 1}, 2, 2) == Plan::kOnePass, "1M x 1024, 16 bit");
  check(choose_plan({1 << 20, 1024, 4}, 4, 4) == Plan::kOnePass, "4 outputs");
  check(choose_plan({1 << 20, 1024, 5}, 4, 4) == Plan::kGemm, "5 outputs");
  check(choose_plan({1 << 20, 1024, 2}, 2, 2) == Plan::kOnePass, "2 outputs of 16 bit");
  check(choose_plan({1 << 20, 1024, 3}, 2, 2) == Plan::kOnePass, "3 outputs of 16 bit");
  check(choose_plan({1 << 20, 1024, 3}, 2, 4) == Plan::kGemm, "3 outputs of 16-bit x, W in float");
  check(choose_plan({262144, 4096, 8}, 2, 2) == Plan::kOnePass, "8 outputs of 16 bit");
  check(choose_plan({262144, 4096, 9}, 2, 2) == Plan::kGemm, "9 outputs, wide");
  check(choose_plan({1 << 20, 1024, 32}, 2, 2) == Plan::kOnePass, "32 outputs of 16 bit");
  check(choose_plan({1 << 20, 1001, 8}, 2, 2) == Plan::kGemm, "rows that begin anywhere");
  check(choose_plan({8192, 4096, 8}, 2, 2) == Plan::kGemm, "60 blocks with a megabyte each");
  check(choose_plan({4096, 256, 1}, 4, 4) == Plan::kOnePass, "4096 x 256");
  check(choose_plan({1024, 1024, 4}, 4, 4) == Plan::kGemm, "15 blocks with 273 KiB each");
  check(choose_plan({1 << 20, 100000, 1}, 4, 4) == Plan::kGemm, "wide");
  check(choose_plan({1, 100000, 100}, 4, 4) == Plan::kGemm, "wide, one row");
  // What a plan is chosen for, its launcher takes.
  for (const int64_t bytes : {2, 4, 8}) {
    for (int64_t O = 0; O <= 34; ++O) {
      for (int64_t I = 0; I <= 5000; I += I < 100 || I % 8 != 0 ? 1 : 8 + I / 56 * 8) {
        const int64_t accum = accum_bytes_of(bytes);
        for (const int64_t B : {0, 1, 100, 100000}) {
          const Plan plan = choose_plan({B, I, O}, bytes, bytes);
          if (plan == Plan::kTiny) check(fits_tiny(I, O, accum), "tiny");
          const bool by_mma = fits_mma(I, O, bytes, bytes);
          const bool fits = fits_one_pass(I, O, bytes, accum) || by_mma;
          if (plan == Plan::kOnePass) check(fits, "one-pass");
          for (const bool needs_dx : {false, true}) {
            const Plan of_gradients = choose_gradient_plan({B, I, O}, bytes, bytes, needs_dx);
            check(of_gradients != Plan::kTiny, "tiny makes no gradients");
            if (of_gradients == Plan::kOnePass) {
              check(fits && !(by_mma && needs_dx && I > mma_columns(O, true)),
                    "one-pass for gradients");
            }
          }
        }
      }
    }
  }
}
