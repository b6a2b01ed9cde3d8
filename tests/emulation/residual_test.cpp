// SPDX-License-Identifier: MIT
// The residual pass of the gemm plan.
#include <string>
#include <vector>

#include "emulation/runtime.h"
#include "problem.h"

using namespace fused_step;
using namespace fused_step::cuda;
using namespace fused_step::test;

namespace {

template <typename X, typename P>
void test_residual(int64_t B, int64_t O, uint64_t seed) {
  if (!takes(seed)) return;
  using A = Accum<P>;
  describe_case<X, P>("residual", {B, 0, O, seed});
  const Reduction reduction = pick_reduction(seed);
  const int64_t stride = hash(seed, 80) % 3 == 0 ? O + 3 : O;
  Memory<X> y(B * O, static_cast<int64_t>(hash(seed, 81) % 2), hash(seed, 82));
  Memory<P> target(extent(B, O, stride), 0, hash(seed, 83)), bias(O, 1, hash(seed, 84));
  Memory<P> loss(1, 0, hash(seed, 85));
  Memory<A> dbias(O, 0, hash(seed, 86));
  ScratchMemory scratch(residual_workspace<X, P>(B, O), hash(seed, 87));
  y.fill_random(hash(seed, 88));
  bias.fill_random(hash(seed, 89));
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t o = 0; o < O; ++o) {
      target[b * stride + o] = narrow<P>(random_value<A>(hash(seed, 90), b * O + o));
    }
  }
  const bool has_bias = hash(seed, 91) % 4 != 0, needs_dbias = hash(seed, 92) % 4 != 0;
  const double dbias_scale = hash(seed, 93) % 2 == 0 ? 1.0 : 0.3;
  const std::vector<P> target_before = target.copy();

  // Of the sums each term goes through one rounding to the accumulator's type at the end: until
  // then they are double.
  std::vector<Bound<P>> want_dbias;
  std::vector<Bound<P>> r(static_cast<size_t>(B * O));
  Bound<P> sum{0, 0};
  for (int64_t o = 0; o < O; ++o) {
    Bound<P> column{0, 0};
    for (int64_t b = 0; b < B; ++b) {
      Bound<P> one{value(y[b * O + o]), 0};
      if (has_bias) one = one + Bound<P>{value(bias[o]), 0};
      one = one - Bound<P>{value(target[b * stride + o]), 0};
      r[static_cast<size_t>(b * O + o)] = one;
      const Bound<P> square = one * one;
      column = {column.v + one.v, column.e + one.e};
      sum = {sum.v + square.v, sum.e + square.e};
    }
    column.e += 0x1p-52L * static_cast<long double>(B) * (std::fabs(column.v) + column.e + 1);
    const long double factor = dbias_scale;
    want_dbias.push_back(Bound<P>{column.v * factor, column.e * factor}.rounded());
  }
  sum.e += 0x1p-52L * static_cast<long double>(B * O + 1) * (sum.v + sum.e);
  check(launch_residual<X, P>(
            {y.data(), target.data(), stride, B, O, reduction, has_bias ? bias.data() : nullptr,
             loss.data(), needs_dbias ? dbias.data() : nullptr, dbias_scale, scratch.get()},
            nullptr) == cudaSuccess,
        "refused");
  for (int64_t k = 0; k < B * O; ++k) {
    const Bound<P>& want = r[static_cast<size_t>(k)];
    check_close<A>("r", k, value(y[k]),
                   {want.v, want.e + Rounding<X>::kRelative * (std::fabs(want.v) + want.e) +
                                Rounding<X>::kAbsolute});
  }
  check(y.intact(), "wrote beside r");
  check_values("loss", loss, {(sum * Bound<P>(loss_scale(reduction, B, O))).rounded()});
  if (needs_dbias) {
    check_values("dbias", dbias, want_dbias);
  } else {
    check(dbias.untouched(), "wrote a dbias that nobody asked for");
  }
  check(target.equals(target_before) && target.intact() && bias.intact(), "target changed");
  scratch.check_after();
}

template <typename X, typename P>
void test_sizes(uint64_t seed) {
  for (int64_t O = 0; O <= 40; ++O) {
    for (const int64_t B : {0, 1, 2, 3, 70}) test_residual<X, P>(B, O, ++seed);
  }
  // A thread keeps its column up to 256 of them, then there are tiles.
  for (const int64_t O : {127, 128, 129, 255, 256, 257, 300, 511, 512, 513, 1025}) {
    for (const int64_t B : {1, 2, 7, 130}) test_residual<X, P>(B, O, ++seed);
  }
  // Chunks: from 16384 elements and 128 rows on.
  for (const int64_t rows : {2, 3, 9}) {
    for (const int64_t O : {10, 64, 100}) {
      const int64_t B = rows * at_least(kMinResidualRows, ceil_div(kMinResidualElements, O));
      for (const int64_t more : {-1, 0, 1}) test_residual<X, P>(B + more, O, ++seed);
    }
  }
}

}  // namespace

TEST(residual_handles_every_number_of_outputs_and_rows) { FOR_EACH_PAIR(test_sizes, 1000000); }

TEST(residual_handles_more_tiles_of_columns_than_groups) {
  test_residual<float, float>(2, kMaxGroups * kResidualThreads + 300, share.part);
  test_residual<float, float>(1, 3 * kMaxGroups * kResidualThreads, share.part);
}

TEST(residual_gives_the_same_bits_in_any_order_of_blocks) {
  const std::string before = schedule_of_run;
  const int64_t B = 700, O = 300;
  std::vector<float> first_dbias, first_loss;
  for (const char* schedule : {"forward", "reverse", "random:1", "random:2"}) {
    emulation::use_schedule(schedule);
    describe("residual, %s", schedule);
    Memory<float> y(B * O, 0, 0), target(B * O, 0, 0), loss(1, 0, 0), dbias(O, 0, 0);
    ScratchMemory scratch(residual_workspace<float, float>(B, O), 0);
    y.fill_random(1);
    target.fill_random(2);
    launch_residual<float, float>({y.data(), target.data(), O, B, O, Reduction::kMean, nullptr,
                                   loss.data(), dbias.data(), 1.0, scratch.get()},
                                  nullptr);
    if (first_loss.empty()) {
      first_dbias = dbias.copy();
      first_loss = loss.copy();
    }
    check(loss.equals(first_loss) && dbias.equals(first_dbias), "other bits");
  }
  emulation::use_schedule(before.c_str());
}

TEST(races_residual) { test_residual<float, float>(500, 64, share.part); }
