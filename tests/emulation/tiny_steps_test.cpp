// SPDX-License-Identifier: MIT
// Whole steps by one block, many in a launch.
#include <vector>

#include "problem.h"

using namespace fused_step;
using namespace fused_step::cuda;
using namespace fused_step::test;

namespace {

template <typename X, typename P>
void launch(const Data<X, P>& data, Layer<P>& layer, int64_t batch_size, int64_t first_step,
            int64_t steps, Reduction reduction, P* losses) {
  check(launch_tiny_steps<X, P>({data.rows(), data.B, batch_size, first_step, steps, data.I, data.O,
                                 reduction, layer.weight_param(), layer.bias_param(), losses},
                                nullptr) == cudaSuccess,
        "refused");
  if (steps > 0) layer.weight_options.first_step = layer.bias_options.first_step = false;
}

// `s.B` rows in batches: the last one is short, then it starts again.
template <typename X, typename P>
void test_steps(const Sizes& s, int64_t batch_size, int64_t first_step, int64_t steps,
                const SgdOptions& of_weight, const SgdOptions& of_bias) {
  if (!fits_tiny(s.I, s.O, sizeof(Accum<P>)) || !takes(s.seed)) return;
  describe_case<X, P>("tiny", s);
  const Data<X, P> data(s);
  const Reduction reduction = pick_reduction(s.seed);
  Layer<P> layer(s, of_weight, of_bias);
  ReferenceLayer<P> want(layer);
  Memory<P> losses(steps, 0, hash(s.seed, 70));
  const int64_t per_epoch = batch_size == 0 ? 1 : at_least(1, ceil_div(s.B, batch_size));
  std::vector<Bound<P>> want_losses;
  for (int64_t k = first_step; k < first_step + steps; ++k) {
    const int64_t first = k % per_epoch * batch_size;
    want_losses.push_back(want.step(data, first, at_most(batch_size, s.B - first), reduction));
  }
  launch(data, layer, batch_size, first_step, steps, reduction, losses.data());
  check_layer(layer, want);
  check_values("loss", losses, want_losses);
  data.check_unchanged();
}

template <typename X, typename P>
void test_small(uint64_t seed) {
  for (int64_t O = 0; O <= kMaxTinyOutputs; ++O) {
    for (int64_t I = 0; I <= 9; ++I) {
      for (const int64_t B : {1, 2, 3, 31, 33}) {
        ++seed;
        test_steps<X, P>({B, I, O, seed}, at_least(1, B - static_cast<int64_t>(hash(seed) % 3)),
                         static_cast<int64_t>(hash(seed, 1) % 3), 1 + seed % 2,
                         pick_options(hash(seed, 2)), pick_options(hash(seed, 3)));
      }
    }
  }
}

template <typename X, typename P>
void test_widths(uint64_t seed) {
  for (const int64_t O : {1, 2, 8}) {
    for (const int64_t power : {16, 32, 64, 128, 256, 512, 1024}) {
      for (const int64_t I : {power - 1, power, power + 1}) {
        for (const int64_t B : {1, 5, 40}) {
          ++seed;
          test_steps<X, P>({B, I, O, seed}, B, 0, 1, pick_options(hash(seed, 2)),
                           pick_options(hash(seed, 3)));
        }
      }
    }
  }
}

template <typename X, typename P>
void test_options(uint64_t seed) {
  for (const SgdOptions& options : option_sets(0.02)) {
    ++seed;
    test_steps<X, P>({7, 3, 2, seed}, 3, 2, 4, options, pick_options(hash(seed)));
    test_steps<X, P>({5, 5, 1, seed + 5000}, 5, 0, 3, pick_options(hash(seed)), options);
  }
}

// One launch of five steps is a launch of two and one of three, bit for bit.
template <typename X, typename P>
void test_resumed() {
  const Sizes s{11, 6, 1, 42};
  describe_case<X, P>("tiny in two launches", s);
  const Data<X, P> data(s);
  const SgdOptions options = {.lr = 0.05, .momentum = 0.9, .nesterov = true, .first_step = true};
  Layer<P> once(s, options, options), twice(s, options, options);
  Memory<P> losses(5, 0, 0), in_parts(5, 0, 0);
  launch(data, once, 4, 1, 5, Reduction::kMean, losses.data());
  launch(data, twice, 4, 1, 2, Reduction::kMean, in_parts.data());
  launch(data, twice, 4, 3, 3, Reduction::kMean, in_parts.data() + 2);
  check(twice.weight.equals(once.weight.copy()) && twice.bias.equals(once.bias.copy()) &&
            twice.weight_buf.equals(once.weight_buf.copy()) && in_parts.equals(losses.copy()),
        "other bits in two launches");
}

// No step leaves everything as it was; an empty batch is a step with a loss of NaN.
template <typename X, typename P>
void test_nothing() {
  const Sizes s{3, 4, 1, 43};
  describe_case<X, P>("no step", s);
  const Data<X, P> data(s);
  Layer<P> layer(s, {.lr = 0.1}, {.lr = 0.1});
  const std::vector<P> weight = layer.weight.copy(), bias = layer.bias.copy();
  launch<X, P>(data, layer, 3, 0, 0, Reduction::kMean, nullptr);
  check(layer.weight.equals(weight) && layer.bias.equals(bias), "no step changed W or b");
  for (const uint64_t seed : {1, 2, 3, 4}) {
    const SgdOptions decays = {.lr = 0.1, .momentum = 0.5, .weight_decay = 0.1};
    test_steps<X, P>({0, 4, 2, seed}, 0, 0, 2, decays, decays);
  }
}

}  // namespace

TEST(tiny_handles_every_small_size_and_short_last_batches) { FOR_EACH_PAIR(test_small, 1000000); }
TEST(tiny_handles_widths_around_teams) { FOR_EACH_PAIR(test_widths, 2000000); }
TEST(tiny_takes_every_set_of_options_over_several_steps) { FOR_EACH_PAIR(test_options, 3000000); }
TEST(tiny_gives_the_same_bits_in_one_launch_and_in_two) { FOR_EACH_PAIR(test_resumed, ); }
TEST(tiny_takes_no_step_and_empty_batches) { FOR_EACH_PAIR(test_nothing, ); }

TEST(tiny_refuses_what_it_has_no_kernel_for) {
  describe("tiny limits");
  TinySteps<float, float> s{};
  s.O = 1;
  s.I = tiny_columns(1, 4) + 1;
  check(launch_tiny_steps(s, nullptr) == cudaErrorInvalidValue, "took too wide a row");
  s.O = kMaxTinyOutputs + 1;
  s.I = 1;
  check(launch_tiny_steps(s, nullptr) == cudaErrorInvalidValue, "took too many outputs");
}

TEST(races_tiny) {
  const SgdOptions options = {.lr = 0.05, .momentum = 0.9};
  test_steps<float, float>({40, 70, 1, 1}, 30, 0, 3, options, options);
  test_steps<float, float>({40, 5, 3, 2}, 30, 0, 3, options, options);
}
