// SPDX-License-Identifier: MIT
// Many steps in one call: with the weight in registers (one output, at most two vectors of inputs)
// and in memory.
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "problem.h"

using namespace fused_step;
using namespace fused_step::cpu;
using namespace fused_step::test;

namespace {

struct Steps {
  int64_t batch_size, first_row, steps;
  Reduction reduction;
};

void describe_case(const char* type, const char* isa, const Sizes& s, const Steps& k,
                   const SgdOptions& o) {
  char options[160];
  append(options, sizeof(options), o);
  describe("%s, %s, %lld rows from %lld by %lld, I %lld, O %lld, %lld steps, %s, %s, seed %llu",
           type, isa, static_cast<long long>(s.rows), static_cast<long long>(k.first_row),
           static_cast<long long>(k.batch_size), static_cast<long long>(s.I),
           static_cast<long long>(s.O), static_cast<long long>(k.steps),
           k.reduction == Reduction::kMean ? "mean" : "sum", options,
           static_cast<unsigned long long>(s.seed));
}

template <typename T>
void run_steps(const Data<T>& data, Layer<T>& layer, const Steps& k, Partials<T>& workspace,
               T* losses) {
  poison_stack();
  run_serial_steps<T>({data.rows(), k.batch_size, k.first_row, k.steps, k.reduction, layer.params(),
                       workspace.get(), losses});
}

// All steps together change a fraction of the weight, so that errors do not grow from step to step:
// for mean, dL/dW is about r * x per input.
double small_lr(const Sizes& s, const Steps& k) {
  const double terms = k.reduction == Reduction::kMean
                           ? 1.0
                           : static_cast<double>(std::max<int64_t>(1, k.batch_size * s.O));
  return 1.0 / (static_cast<double>(std::max<int64_t>(5, k.steps) * (1 + s.I)) * terms);
}

template <typename T>
void check_steps(const Data<T>& data, const Steps& k, const SgdOptions& of_weight,
                 const SgdOptions& of_bias, const Layer<T>& start, bool finite) {
  const Sizes& s = data.s;
  ReferenceLayer<T> want(start);
  Bounds<T> want_losses;
  int64_t row = k.first_row;
  for (int64_t step = 0; step < k.steps; ++step) {
    const int64_t rows = std::min(k.batch_size, s.rows - row);
    want_losses.push_back(want.step(data.rows(row, rows), k.reduction));
    row = row + rows >= s.rows ? 0 : row + rows;
  }
  const auto fresh = [&](Layer<T>& layer) {
    layer.has_bias = start.has_bias;
    for (int64_t j = 0; j < start.weight.n(); ++j) layer.weight[j] = start.weight[j];
  };
  for_each_isa([&](const char* isa) {
    describe_case(type_name<T>(), isa, s, k, of_weight);
    Layer<T> layer(s, of_weight, of_bias);
    fresh(layer);
    Partials<T> workspace(s.O, s.I, s.seed);
    Buffer<T> losses(k.steps, hash(s.seed, 60));
    run_steps(data, layer, k, workspace, losses.data());
    check_all_close<T>("loss", losses, want_losses);
    check(losses.intact(), "wrote beside the losses");
    check_layer(layer, want, k.steps > 0);
    workspace.check_intact();
    data.check_unchanged();
    if (of_weight.momentum == 0) {
      check(layer.weight_buf.equals(start.weight_buf.copy()), "a buffer without momentum changed");
    }
    if (of_bias.momentum == 0 || !start.has_bias) {
      check(layer.bias_buf.equals(start.bias_buf.copy()), "a buffer without momentum changed");
    }
    check(start.has_bias || layer.bias.equals(start.bias.copy()), "no bias, but it changed");
    if (finite && k.steps > 0 && s.rows > 0) {
      check_bound_sees_a_change(start.weight.copy(), want.weight);
    }

    // One call for each step has the same bits.
    Layer<T> one_by_one(s, of_weight, of_bias);
    fresh(one_by_one);
    Buffer<T> single_losses(k.steps, hash(s.seed, 61));
    int64_t at = k.first_row;
    for (int64_t step = 0; step < k.steps; ++step) {
      Partials<T> other(s.O, s.I, s.seed + 1);
      run_steps(data, one_by_one, {k.batch_size, at, 1, k.reduction}, other,
                single_losses.data() + step);
      one_by_one.weight_options.first_step = one_by_one.bias_options.first_step = false;
      at += std::min(k.batch_size, s.rows - at);
      if (at >= s.rows) at = 0;
    }
    check(one_by_one.weight.equals(layer.weight.copy()) &&
              one_by_one.bias.equals(layer.bias.copy()) &&
              one_by_one.weight_buf.equals(layer.weight_buf.copy()) &&
              one_by_one.bias_buf.equals(layer.bias_buf.copy()) &&
              single_losses.equals(losses.copy()),
          "steps in one call differ from steps one by one");
  });
}

template <typename T>
void test_steps(const Sizes& s, const Steps& k) {
  const double lr = small_lr(s, k);
  // Weight and bias have options of their own, first steps too.
  const SgdOptions of_weight = pick_options(hash(s.seed, 70), lr);
  const SgdOptions of_bias = pick_options(hash(s.seed, 71), lr);
  Data<T> data(s);
  Layer<T> start(s, of_weight, of_bias);
  check_steps<T>(data, k, of_weight, of_bias, start, true);
}

Reduction reduction_of(uint64_t seed) { return seed % 3 == 0 ? Reduction::kSum : Reduction::kMean; }

// Batches of every size up to twice the widest vector and one more, the last one short, from a row
// that is not the first, around the data more than twice.
template <typename T>
void test_small_steps(int64_t O, int64_t batch_step) {
  uint64_t seed = 6000000 + static_cast<uint64_t>(O) * 100000;
  for (int64_t I = 0; I <= kMaxSmall; ++I) {
    for (int64_t batch = 1; batch <= kMaxSmall; batch += batch_step) {
      ++seed;
      const int64_t left = static_cast<int64_t>(hash(seed) % static_cast<uint64_t>(batch));
      const int64_t rows = batch + left;  // one batch, then what is left
      const bool late = hash(seed, 1) % 2 == 0 && left > 0;
      test_steps<T>({rows, I, O, seed},
                    {batch, late ? batch : 0, batch > 17 ? 3 : 5, reduction_of(seed)});
    }
  }
}

}  // namespace

TEST(serial_steps_of_one_output_follow_the_plain_loop_float) { test_small_steps<float>(1, 1); }
TEST(serial_steps_of_one_output_follow_the_plain_loop_double) { test_small_steps<double>(1, 1); }
TEST(serial_steps_of_more_outputs_follow_the_plain_loop) {
  for (const int64_t O : {2, 3, 4, 5, 9, 16, 32}) {
    test_small_steps<float>(O, O < 6 ? 5 : 11);
    test_small_steps<double>(O, O < 6 ? 5 : 11);
  }
}

TEST(serial_steps_cycle_over_the_rows_for_many_steps) {
  uint64_t seed = 7000000;
  for (const int64_t O : {1, 3}) {
    for (const int64_t I : {1, 2, 4, 5, 8, 9, 13, 16, 17, 40}) {
      // Even and uneven batches, from the middle of a batch, one batch larger than the data.
      for (const Steps& k : {Steps{4, 0, 40, Reduction::kMean},
                             {7, 3, 40, Reduction::kMean},
                             {1, 11, 40, Reduction::kSum},
                             {12, 0, 20, Reduction::kMean},
                             {20, 5, 20, Reduction::kMean}}) {
        test_steps<float>({12, I, O, ++seed}, k);
        test_steps<double>({12, I, O, ++seed}, k);
      }
    }
  }
}

TEST(serial_steps_sum_batches_of_several_tiles) {
  uint64_t seed = 8000000;
  for (const int64_t I : {2, 8, 16, 33, 100, 1030}) {
    for (const int64_t batch : {63, 64, 65, 130}) {
      for (const int64_t O : {1, 5}) {
        if (batch * I * O > 150000) continue;
        test_steps<float>({batch + 9, I, O, ++seed}, {batch, 0, 3, Reduction::kMean});
        test_steps<double>({batch + 9, I, O, ++seed}, {batch, 0, 3, Reduction::kMean});
      }
    }
  }
}

TEST(serial_steps_of_no_rows_decay_only_and_their_mean_loss_is_nan) {
  uint64_t seed = 9000000;
  for (const int64_t O : {1, 3}) {
    for (const int64_t I : {0, 1, 5, 16, 17, 40}) {
      for (const Reduction reduction : {Reduction::kMean, Reduction::kSum}) {
        for (int k = 0; k < 8; ++k) {
          test_steps<float>({0, I, O, ++seed}, {0, 0, 3, reduction});
          test_steps<double>({0, I, O, ++seed}, {0, 0, 3, reduction});
        }
      }
    }
  }
}

namespace {

template <typename T>
void test_no_steps(int64_t I, int64_t O) {
  uint64_t seed = 10000000;
  for (const SgdOptions& options : option_sets(0.1)) {
    const Sizes s{4, I, O, ++seed};
    const Data<T> data(s);
    const Steps k{2, 0, 0, Reduction::kMean};
    for_each_isa([&](const char* isa) {
      describe_case(type_name<T>(), isa, s, k, options);
      Layer<T> layer(s, options, options), start(s, options, options);
      Partials<T> workspace(O, I, seed);
      run_steps<T>(data, layer, k, workspace, nullptr);
      check(layer.weight.equals(start.weight.copy()) && layer.bias.equals(start.bias.copy()),
            "the parameters changed");
      check(layer.weight_buf.equals(start.weight_buf.copy()) &&
                layer.bias_buf.equals(start.bias_buf.copy()),
            "the momentum changed");
    });
  }
}

}  // namespace

TEST(no_serial_steps_change_nothing) {
  for (const int64_t I : {1, 3, 16, 40}) {
    for (const int64_t O : {1, 2}) {
      test_no_steps<float>(I, O);
      test_no_steps<double>(I, O);
    }
  }
}

namespace {

// NaN or an infinity in one place: one step, then more, by which it has spread as it should.
template <typename T>
void test_special_values(int64_t I, int64_t O, int64_t batch, int64_t steps) {
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  uint64_t seed = 11000000;
  for (const T special : {inf, -inf, nan}) {
    const int64_t rows = batch + 1;
    for (int64_t place = 0; place < rows * I + rows * O + O * I; ++place) {
      const Sizes s{rows, I, O, ++seed};
      const Steps k{batch, 0, steps, Reduction::kMean};
      const SgdOptions options = pick_options(seed, 0.01);
      Data<T> data(s);
      Layer<T> start(s, options, options);
      if (place < rows * I) {
        data.x[place / I * data.x_stride + place % I] = special;
      } else if (place < rows * (I + O)) {
        const int64_t at = place - rows * I;
        data.target[at / O * data.target_stride + at % O] = special;
      } else {
        start.weight[place - rows * (I + O)] = special;
      }
      data.remember();
      check_steps<T>(data, k, options, options, start, false);
    }
  }
}

void test_special_values_of_every_size(int64_t steps) {
  for (const int64_t I : {1, 3, 5, 9}) {
    for (const int64_t batch : {1, 3, 9}) {
      test_special_values<float>(I, 1, batch, steps);
      test_special_values<double>(I, 1, batch, steps);
    }
  }
  for (const auto& [I, O, batch] : {std::array<int64_t, 3>{3, 2, 3}, {17, 1, 5}}) {
    test_special_values<float>(I, O, batch, steps);
    test_special_values<double>(I, O, batch, steps);
  }
}

}  // namespace

TEST(one_serial_step_has_nan_and_inf_exactly_where_the_plain_loop_has) {
  test_special_values_of_every_size(1);
}

TEST(many_serial_steps_have_nan_and_inf_exactly_where_the_plain_loop_has) {
  test_special_values_of_every_size(3);
}
