// SPDX-License-Identifier: MIT
// One-pass on the GPU's sources: a whole step, and loss with gradients.
#include <vector>

#include "emulation/runtime.h"
#include "one_pass_run.h"
#include "problem.h"

using namespace fused_step;
using namespace fused_step::cuda;
using namespace fused_step::test;

namespace {

template <typename X, typename P>
void test_step(const Sizes& s, const SgdOptions& of_weight, const SgdOptions& of_bias) {
  describe_case<X, P>("step", s);
  const Data<X, P> data(s);
  const Reduction reduction = pick_reduction(s.seed);
  StepRun<X, P> run(s, of_weight, of_bias);
  ReferenceLayer<P> want(run.layer);
  const Bound<P> loss = want.step(data, 0, s.B, reduction);
  check(run.step(data, reduction) == cudaSuccess, "refused");
  check_layer(run.layer, want);
  check_values("loss", run.loss, {loss});
  data.check_unchanged();
  run.scratch.check_after();
}

template <typename X, typename P>
void test_grad(const Sizes& s) {
  describe_case<X, P>("grad", s);
  using A = Accum<P>;
  const Data<X, P> data(s);
  const Layer<P> layer(s, {}, {});
  const std::vector<P> weight = layer.weight.copy(), bias = layer.bias.copy();
  const Reduction reduction = pick_reduction(s.seed);
  const std::vector<Bound<P>> w = exact(layer.weight);
  const bool has_factor = hash(s.seed, 59) % 2 == 0 && s.B * s.O > 0;
  const double dy_scale =
      has_factor ? static_cast<double>(2 * loss_scale(reduction, s.B, s.O)) : 1.0;
  const Gradients<P> want = reference_gradients(
      data, 0, s.B, w, layer.has_bias ? exact(layer.bias) : std::vector<Bound<P>>(),
      Bound<P>(static_cast<long double>(dy_scale)));
  const bool needs_dx = hash(s.seed, 50) % 4 != 0, needs_sums = hash(s.seed, 51) % 4 != 0;
  Memory<X> dx(s.B * s.I, hash(s.seed, 52) % 4 == 0 ? 1 : 0, hash(s.seed, 53));
  Memory<A> dweight(s.O * s.I, hash(s.seed, 54) % 2 == 0, hash(s.seed, 55));
  Memory<A> dbias(s.O, 0, hash(s.seed, 56));
  Memory<P> loss(1, 0, hash(s.seed, 57));
  OnePassScratch scratch = OnePassScratch::of<X, P>(s);
  const cudaError_t error =
      launch_one_pass_grad<X, P>({data.rows(),
                                  {s.B, s.I, s.O},
                                  reduction,
                                  dy_scale,
                                  layer.weight.data(),
                                  layer.has_bias ? layer.bias.data() : nullptr,
                                  loss.data(),
                                  needs_dx ? dx.data() : nullptr,
                                  needs_sums ? dweight.data() : nullptr,
                                  needs_sums ? dbias.data() : nullptr,
                                  scratch.get()},
                                 nullptr);
  check(error == cudaSuccess, "refused");
  check_values("loss", loss, {(want.loss * Bound<P>(loss_scale(reduction, s.B, s.O))).rounded()});
  if (needs_sums) {
    check_values("dweight", dweight, want.dweight);
    check_values("dbias", dbias, want.dbias);
  } else {
    check(dweight.untouched() && dbias.untouched(), "wrote sums that nobody asked for");
  }
  if (needs_dx) {
    check_dx<X, P>(dx, s, want, w, Bound<P>(static_cast<long double>(dy_scale)));
    check(dx.intact(), "wrote beside dx");
  } else {
    check(dx.untouched(), "wrote a dx that nobody asked for");
  }
  check(layer.weight.equals(weight) && layer.bias.equals(bias), "W or b changed");
  data.check_unchanged();
  scratch.check_after();
}

template <typename X, typename P>
void test_both(const Sizes& s) {
  if (!fits_one_pass(s.I, s.O, sizeof(X), sizeof(Accum<P>)) || !takes(s.seed)) return;
  if (hash(s.seed, 60) % 2 == 0) {
    test_step<X, P>(s, pick_options(hash(s.seed, 61)), pick_options(hash(s.seed, 62)));
  } else {
    test_grad<X, P>(s);
  }
}

template <typename X, typename P>
void test_small(uint64_t seed) {
  constexpr int64_t kMax = 2 * 16 / static_cast<int64_t>(sizeof(X)) + 1;
  for (int64_t O = 0; O <= kMaxOnePassOutputs; ++O) {
    for (int64_t I = 0; I <= kMax; ++I) {
      for (const int64_t B : {0, 1, 2, 3, 4, 5, 31, 33}) test_both<X, P>({B, I, O, ++seed});
    }
  }
}

// One team, several teams, the whole warp; where one kernel takes over from the other.
template <typename X, typename P>
void test_widths(uint64_t seed) {
  for (const int64_t O : {1, 2, 3, 4}) {
    for (const int64_t power : {32, 64, 128, 256, 512, 1024, 2048, 4096}) {
      for (const int64_t I : {power - 1, power, power + 1, power + 8}) {
        for (const int64_t B : {1, 3, 9}) test_both<X, P>({B, I, O, ++seed});
      }
    }
  }
}

// Around one, two and more chunks, and around groups of them.
template <typename X, typename P>
void test_chunks(uint64_t seed) {
  for (const int64_t O : {1, 2, 4}) {
    for (const int64_t I : {3, 8, 100, 1024, 2048}) {
      const int64_t rows = at_least(ceil_div(kMinChunkElements, I), min_chunk_rows(I, O));
      for (const int64_t chunks : {1, 2, 3, 5, 17}) {
        for (const int64_t B : {chunks * rows - 1, chunks * rows, chunks * rows + 1}) {
          if (B * I * O <= 200 * 1000) test_both<X, P>({B, I, O, ++seed});
        }
      }
    }
  }
}

}  // namespace

TEST(one_pass_handles_every_small_size) { FOR_EACH_PAIR(test_small, 1000000); }
TEST(one_pass_handles_widths_around_teams_and_blocks) { FOR_EACH_PAIR(test_widths, 2000000); }
TEST(one_pass_adds_any_number_of_chunks) { FOR_EACH_PAIR(test_chunks, 3000000); }

namespace {

template <typename X, typename P>
void test_options(uint64_t seed) {
  for (const SgdOptions& options : option_sets(0.1)) {
    ++seed;
    if (!takes(seed)) continue;
    test_step<X, P>({70, 5, 2, seed}, options, pick_options(hash(seed)));
    test_step<X, P>({3, 64, 1, seed + 5000}, pick_options(hash(seed)), options);
  }
}

}  // namespace

TEST(one_pass_step_takes_every_set_of_options) { FOR_EACH_PAIR(test_options, 4000000); }

namespace {

// Three chunks and more: the last block adds what others wrote.
template <typename X, typename P>
void test_schedules(const Sizes& s) {
  const Data<X, P> data(s);
  FirstBits<P> first;
  for (const char* schedule : {"forward", "reverse", "random:1", "random:2"}) {
    for (const bool apart : {false, true}) {
      emulation::use_schedule(schedule);
      describe_case<X, P>(schedule, s);
      StepRun<X, P> run(s, pick_options(s.seed), pick_options(s.seed + 1));
      run.scratch.gives_tickets = !apart;
      check(run.step(data, Reduction::kMean) == cudaSuccess, "refused");
      first.check_same(run, "other bits in another order of blocks, or in a launch more");
    }
  }
}

template <typename X, typename P>
void test_all_schedules() {
  test_schedules<X, P>({700, 64, 1, 1});
  test_schedules<X, P>({300, 100, one_pass_outputs(sizeof(X)), 2});
  test_schedules<X, P>({100, 2048, 1, 3});
}

}  // namespace

TEST(one_pass_gives_the_same_bits_in_any_order_of_blocks_and_in_one_launch_or_two) {
  const std::string before = schedule_of_run;
  FOR_EACH_PAIR(test_all_schedules, );
  emulation::use_schedule(before.c_str());
}

namespace {

// Every row is the same, so that rounding errors add up: those of loss and bias must not grow with
// the rows, those of dW only with the rows that one thread adds.
template <typename X, typename P>
void test_many_rows() {
  const Sizes s{60000, 4, 1, 77};
  describe_case<X, P>("many rows", s);
  using A = Accum<P>;
  std::vector<X> x(static_cast<size_t>(s.B * s.I), narrow<X>(Accum<X>(0.7)));
  std::vector<P> target(static_cast<size_t>(s.B), narrow<P>(A(0.3)));
  Memory<P> weight(4, 0, 0), loss(1, 0, 0);
  for (int64_t i = 0; i < 4; ++i) weight[i] = narrow<P>(A(0.1));
  Memory<A> dweight(4, 0, 0), dbias(1, 0, 0);
  ScratchMemory scratch(one_pass_workspace<X, P>({s.B, s.I, s.O}), 0);
  check(launch_one_pass_grad<X, P>({{x.data(), target.data(), 4, 1},
                                    {s.B, s.I, s.O},
                                    Reduction::kSum,
                                    1.0,
                                    weight.data(),
                                    nullptr,
                                    loss.data(),
                                    nullptr,
                                    dweight.data(),
                                    dbias.data(),
                                    scratch.get()},
                                   nullptr) == cudaSuccess,
        "refused");
  const Bound<P> xb{value(x[0]), 0};
  const Bound<P> r =
      xb * Bound<P>{value(weight[0]), 0} * Bound<P>(4.0L) - Bound<P>{value(target[0]), 0};
  const Chunks chunks = one_pass_chunks({s.B, s.I, s.O});
  // 32 lanes with a row each, and 4 warps, share a chunk; then come lanes, warps and chunks.
  const int64_t additions = chunks.rows / 128 + 5 + 4 + chunks.group + chunks.groups + 8;
  const auto total = [&](const Bound<P>& term, int64_t roundings) {
    const long double n = static_cast<long double>(s.B);
    return Bound<P>{
        term.v * n,
        (term.e + static_cast<long double>(roundings) * Bound<P>::kU * std::fabs(term.v)) * n};
  };
  check_values("dweight", dweight,
               {total(r * xb, additions), total(r * xb, additions), total(r * xb, additions),
                total(r * xb, additions)});
  check_values("dbias", dbias, {total(r, 16)});
  check_values("loss", loss, {total(r * r, 16)});
}

}  // namespace

TEST(one_pass_error_of_loss_and_bias_does_not_grow_with_the_rows) {
  if (share.of < 100) FOR_EACH_PAIR(test_many_rows, );
}

namespace {

// One NaN or infinity somewhere: NaN and infinities exactly where the reference has them.
template <typename X, typename P>
void test_special(int64_t B, int64_t I, int64_t O, uint64_t seed) {
  const long double inf = std::numeric_limits<long double>::infinity();
  for (const long double special : {inf, -inf, std::numeric_limits<long double>::quiet_NaN()}) {
    for (int64_t place = 0; place < B * I + B * O + O * I; ++place) {
      if (!takes(++seed)) continue;
      const Sizes s{B, I, O, seed};
      Data<X, P> data(s);
      StepRun<X, P> run(s, {.lr = 0.1}, {.lr = 0.1});
      int64_t k = place;
      if (k < B * I) {
        data.x[k / I * data.x_stride + k % I] = narrow<X>(static_cast<Accum<X>>(special));
      } else if ((k -= B * I) < B * O) {
        data.target[k / O * data.target_stride + k % O] = narrow<P>(static_cast<Accum<P>>(special));
      } else {
        run.layer.weight[k - B * O] = narrow<P>(static_cast<Accum<P>>(special));
      }
      describe_case<X, P>("special value", s);
      ReferenceLayer<P> want(run.layer);
      const Bound<P> loss = want.step(data, 0, B, Reduction::kMean);
      check(run.step(data, Reduction::kMean) == cudaSuccess, "refused");
      check_layer(run.layer, want);
      check_values("loss", run.loss, {loss});
    }
  }
}

}  // namespace

TEST(one_pass_has_nan_and_inf_exactly_where_the_reference_has) {
  FOR_EACH_PAIR(test_special, 5, 3, 2, 5000000);
  FOR_EACH_PAIR(test_special, 3, 9, 1, 5100000);
}

TEST(one_pass_refuses_what_it_has_no_kernel_for) {
  describe("one-pass limits");
  OnePassStep<float, float> s{};
  s.shape = {1, 1, kMaxOnePassOutputs + 1};
  check(launch_one_pass_step(s, nullptr) == cudaErrorInvalidValue, "took too many outputs");
  s.shape = {1, wide_columns(1, 4) + 1, 1};
  check(launch_one_pass_step(s, nullptr) == cudaErrorInvalidValue, "took too wide a row");
}

// Few and small, for ThreadSanitizer: three blocks with each mechanism. Seeds 4 and 5 take vectors,
// 7 and 9 do not; 9 adds the blocks' sums in a launch of its own.
TEST(races_one_pass) {
  test_step<float, float>({400, 64, 1, 4}, {.lr = 0.1, .momentum = 0.9}, {.lr = 0.1});
  test_step<float, float>({400, 64, 1, 5}, {.lr = 0.1}, {.lr = 0.1});
  // The second finds what the first, a block of more warps, has left in shared memory.
  test_step<float, float>({40, 4096, 1, 5}, {.lr = 0.1}, {.lr = 0.1});
  test_step<float, float>({100, 2048, 1, 5}, {.lr = 0.1}, {.lr = 0.1});
  test_grad<float, float>({400, 65, 1, 7});
  test_grad<float, float>({100, 1100, 1, 9});
}
