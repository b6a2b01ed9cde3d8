// SPDX-License-Identifier: MIT
// One-pass on the units that multiply matrices: a whole step, and loss with gradients.
#include <vector>

#include "emulation/runtime.h"
#include "one_pass_run.h"
#include "problem.h"

using namespace fused_step;
using namespace fused_step::cuda;
using namespace fused_step::test;

namespace {

// dy is carried in two numbers of X: 16 bits or more. As an error of its factor.
constexpr long double kSplitError = 0x1p-16L;

// Each GPU has room for another number of stages.
constexpr int64_t kSharedOfGpus[] = {emulation::kLeastShared, 163 * 1024, 227 * 1024};

// On one of them.
template <typename X>
struct Run : StepRun<X, X> {
  Run(const Sizes& s, const SgdOptions& of_weight, const SgdOptions& of_bias)
      : StepRun<X, X>(s, of_weight, of_bias) {
    emulation::most_shared = kSharedOfGpus[hash(s.seed, 42) % 3];
  }
  ~Run() { emulation::most_shared = emulation::kLeastShared; }
};

template <typename X>
void test_step_on(const Data<X, X>& data, Run<X>& run, Reduction reduction) {
  ReferenceLayer<X> want(run.layer);
  const Bound<X> loss = want.step(data, 0, data.B, reduction, kSplitError);
  check(run.step(data, reduction) == cudaSuccess, "refused");
  check_layer(run.layer, want);
  check_values("loss", run.loss, {loss});
  data.check_unchanged();
  run.scratch.check_after();
}

template <typename X>
void test_step(const Sizes& s, const SgdOptions& of_weight, const SgdOptions& of_bias) {
  describe_case<X, X>("mma step", s);
  const Data<X, X> data(s);
  Run<X> run(s, of_weight, of_bias);
  test_step_on(data, run, pick_reduction(s.seed));
}

template <typename X>
void test_grad(const Sizes& s) {
  describe_case<X, X>("mma grad", s);
  const Data<X, X> data(s);
  Run<X> run(s, {}, {});
  const Layer<X>& layer = run.layer;
  const std::vector<X> weight = layer.weight.copy(), bias = layer.bias.copy();
  const Reduction reduction = pick_reduction(s.seed);
  const bool has_factor = hash(s.seed, 59) % 2 == 0 && s.B > 0;
  const long double dy_scale = has_factor ? 2 * loss_scale(reduction, s.B, s.O) : 1.0L;
  Bound<X> split(dy_scale);
  split.e += dy_scale * kSplitError;
  const Gradients<X> want =
      reference_gradients(data, 0, s.B, exact(layer.weight),
                          layer.has_bias ? exact(layer.bias) : std::vector<Bound<X>>(), split);
  const bool needs_dx = s.I <= mma_columns(s.O, true) && hash(s.seed, 50) % 4 != 0;
  const bool needs_sums = hash(s.seed, 51) % 4 != 0;
  Memory<X> dx(s.B * s.I, hash(s.seed, 52) % 4 == 0 ? 1 : 0, hash(s.seed, 53));
  Memory<float> dweight(s.O * s.I, hash(s.seed, 54) % 2 == 0, hash(s.seed, 55));
  Memory<float> dbias(s.O, 0, hash(s.seed, 56));
  OnePassGrad<X, X> args{data.rows(),
                         {s.B, s.I, s.O},
                         reduction,
                         static_cast<double>(dy_scale),
                         layer.weight.data(),
                         layer.has_bias ? layer.bias.data() : nullptr,
                         run.loss.data(),
                         needs_dx ? dx.data() : nullptr,
                         needs_sums ? dweight.data() : nullptr,
                         needs_sums ? dbias.data() : nullptr,
                         run.scratch.get()};
  check(launch_one_pass_grad(args, nullptr) == cudaSuccess, "refused");
  check_values("loss", run.loss,
               {(want.loss * Bound<X>(loss_scale(reduction, s.B, s.O))).rounded()});
  if (needs_sums) {
    check_values("dweight", dweight, want.dweight);
    check_values("dbias", dbias, want.dbias);
  } else {
    check(dweight.untouched() && dbias.untouched(), "wrote sums that nobody asked for");
  }
  if (needs_dx) {
    check_dx<X, X>(dx, s, want, exact(layer.weight), split);
    check(dx.intact(), "wrote beside dx");
  } else {
    check(dx.untouched(), "wrote a dx that nobody asked for");
  }
  check(layer.weight.equals(weight) && layer.bias.equals(bias), "W or b changed");
  data.check_unchanged();
  run.scratch.check_after();
}

template <typename X>
void test_either(const Sizes& s) {
  if (!fits_mma(s.I, s.O, 2, 2) || !takes(s.seed)) return;
  if (hash(s.seed, 60) % 2 == 0) {
    test_step<X>(s, pick_options(hash(s.seed, 61)), pick_options(hash(s.seed, 62)));
  } else {
    test_grad<X>(s);
  }
}

template <typename X>
void test_outputs(uint64_t seed) {
  for (int64_t O = 3; O <= kMaxMmaOutputs; ++O) {
    for (const int64_t I : {64, 72, 168}) {
      for (const int64_t B : {0, 1, 2, 7, 8, 9, 17, 65}) test_either<X>({B, I, O, ++seed});
    }
  }
}

// One warp, several, all of them; spans, groups of spans and warps that are not full.
template <typename X>
void test_widths(uint64_t seed) {
  for (const int64_t O : {5, 8, 11, 16, 27, 32}) {
    for (const int64_t power : {64, 128, 256, 512, 1024, 2048, 4096}) {
      for (const int64_t I : {power - 8, power, power + 8, power + 104}) {
        for (const int64_t B : {3, 20}) test_either<X>({B, I, O, ++seed});
      }
    }
  }
}

// Around one, two and more chunks, and around the steps of a block.
template <typename X>
void test_chunks(uint64_t seed) {
  for (const int64_t O : {3, 8, 12, 20}) {
    for (const int64_t I : {64, 264, 640}) {
      const int teams = kMmaWarps / mma_team(I, mma_warp_columns(mma_tiles(O), false));
      const int64_t rows = round_up(min_chunk_rows(I, O), kMmaRows * teams);
      for (const int64_t chunks : {1, 2, 3, 7}) {
        for (const int64_t B : {chunks * rows - 1, chunks * rows, chunks * rows + 1}) {
          if (B * I * O <= 1000 * 1000) test_either<X>({B, I, O, ++seed});
        }
      }
    }
  }
}

}  // namespace

TEST(mma_handles_every_number_of_outputs) { FOR_EACH_MMA(test_outputs, 6000000); }
TEST(mma_handles_widths_around_warps_and_teams) { FOR_EACH_MMA(test_widths, 6100000); }
TEST(mma_adds_any_number_of_chunks) { FOR_EACH_MMA(test_chunks, 6200000); }

namespace {

template <typename X>
void test_options(uint64_t seed) {
  for (const SgdOptions& options : option_sets(0.1)) {
    ++seed;
    if (takes(seed)) test_step<X>({70, 72, 5, seed}, options, pick_options(hash(seed)));
  }
}

}  // namespace

TEST(mma_step_takes_every_set_of_options) { FOR_EACH_MMA(test_options, 6300000); }

namespace {

// Several chunks, in any order of blocks and on GPUs with room for one, two and three stages.
template <typename X>
void test_same_bits(const Sizes& s) {
  const Data<X, X> data(s);
  FirstBits<X> first;
  for (const char* schedule : {"forward", "reverse", "random:1", "random:2"}) {
    for (const int64_t shared : kSharedOfGpus) {
      emulation::use_schedule(schedule);
      describe_case<X, X>(schedule, s);
      Run<X> run(s, pick_options(s.seed), pick_options(s.seed + 1));
      emulation::most_shared = shared;
      run.scratch.gives_tickets = shared != kSharedOfGpus[1];
      check(run.step(data, Reduction::kMean) == cudaSuccess, "refused");
      first.check_same(run, "other bits in another order of blocks, or with other stages");
    }
  }
}

template <typename X>
void test_all_same_bits() {
  test_same_bits<X>({300, 64, 4, 1});
  test_same_bits<X>({100, 1096, 3, 2});
  test_same_bits<X>({50, 264, 17, 3});
}

}  // namespace

TEST(mma_gives_the_same_bits_in_any_order_and_with_any_stages) {
  const std::string before = schedule_of_run;
  FOR_EACH_MMA(test_all_same_bits, );
  emulation::use_schedule(before.c_str());
}

namespace {

// One NaN or infinity somewhere: NaN and infinities exactly where the reference has them.
template <typename X>
void test_special(int64_t B, int64_t I, int64_t O, uint64_t seed) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const float special : {inf, -inf, std::numeric_limits<float>::quiet_NaN()}) {
    for (int64_t place = 0; place < B * I + B * O + O * I; place += 1 + place % 13) {
      if (!takes(++seed)) continue;
      const Sizes s{B, I, O, seed};
      Data<X, X> data(s);
      Run<X> run(s, {.lr = 0.1}, {.lr = 0.1});
      int64_t k = place;
      if (k < B * I) {
        data.x[k / I * data.x_stride + k % I] = narrow<X>(special);
      } else if ((k -= B * I) < B * O) {
        data.target[k / O * data.target_stride + k % O] = narrow<X>(special);
      } else {
        run.layer.weight[k - B * O] = narrow<X>(special);
      }
      describe_case<X, X>("special value", s);
      data.x_before = data.x.copy();
      data.target_before = data.target.copy();
      test_step_on(data, run, Reduction::kMean);
    }
  }
}

}  // namespace

TEST(mma_has_nan_and_inf_exactly_where_the_reference_has) {
  FOR_EACH_MMA(test_special, 5, 64, 3, 6400000);
  FOR_EACH_MMA(test_special, 3, 136, 18, 6500000);
}

namespace {

// A residual of twice the largest number: both are in X, their difference is not.
template <typename X>
void test_largest() {
  const float largest = kIsFloat16<X> ? 65504.0f : 0x1.fep126f, scale = kIsFloat16<X> ? 2.0f : 1.0f;
  const Sizes s{1, 64, 3, 1};
  describe_case<X, X>("largest", s);
  std::vector<X> x(64, X{}), target(3, narrow<X>(-largest)), weight(3 * 64, X{}),
      bias(3, narrow<X>(largest));
  x[5] = narrow<X>(1.0f);
  std::vector<float> dweight(3 * 64), dbias(3);
  std::vector<X> loss(1);
  ScratchMemory scratch(one_pass_workspace<X, X>({s.B, s.I, s.O}), 0);
  check(launch_one_pass_grad<X, X>({{x.data(), target.data(), 64, 3},
                                    {s.B, s.I, s.O},
                                    Reduction::kSum,
                                    static_cast<double>(scale),
                                    weight.data(),
                                    bias.data(),
                                    loss.data(),
                                    nullptr,
                                    dweight.data(),
                                    dbias.data(),
                                    scratch.get()},
                                   nullptr) == cudaSuccess,
        "refused");
  for (int64_t o = 0; o < 3; ++o) {
    check_close<float>(
        "dweight", o, static_cast<long double>(dweight[static_cast<size_t>(o * 64 + 5)]),
        {static_cast<long double>(scale) * 2 * static_cast<long double>(largest), 0});
  }
}

}  // namespace

TEST(mma_carries_a_residual_beyond_the_largest_number) { FOR_EACH_MMA(test_largest, ); }

TEST(mma_refuses_what_it_has_no_kernel_for) {
  describe("mma limits");
  BFloat16 dx[1];
  OnePassGrad<BFloat16, BFloat16> with_dx{};
  with_dx.shape = {1, 2056, 3};
  with_dx.dx = dx;
  check(launch_one_pass_grad(with_dx, nullptr) == cudaErrorInvalidValue, "took dx of a wide row");
  OnePassStep<BFloat16, BFloat16> s{};
  for (const LinearShape& shape :
       {LinearShape{1, 4104, 3}, {1, 68, 3}, {1, 56, 3}, {1, 64, 33}, {1, 2056, 9}}) {
    s.shape = shape;
    check(launch_one_pass_step(s, nullptr) == cudaErrorInvalidValue, "took a shape");
  }
}

// Few and small, for ThreadSanitizer: a warp for each row, two, and all of them.
TEST(races_mma) {
  test_step<BFloat16>({200, 64, 3, 4}, {.lr = 0.1, .momentum = 0.9}, {.lr = 0.1});
  test_step<BFloat16>({130, 520, 4, 5}, {.lr = 0.1}, {.lr = 0.1});
  test_step<BFloat16>({20, 4096, 3, 5}, {.lr = 0.1}, {.lr = 0.1});
  test_grad<BFloat16>({30, 264, 17, 7});
}
