// SPDX-License-Identifier: MIT
// The formulas of core/, one element at a time.
#include <cmath>
#include <limits>
#include <type_traits>

#include "bounded.h"
#include "buffer.h"
#include "check.h"
#include "core/mse_math.h"
#include "core/sgd_math.h"

using namespace fused_step;
using namespace fused_step::test;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

template <typename T>
bool same_bits(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

template <typename Body>
void for_float_and_double(const Body& body) {
  body(float{});
  body(double{});
}

// Steps with one set of options; the first with first_step as given.
template <typename T>
void check_sgd_steps(SgdOptions o, T p, T buf, const T* grads, int steps) {
  char options[160];
  append(options, sizeof(options), o);
  Bounded<T> want_p{p, 0}, want_buf{buf, 0};
  const T untouched = buf;
  for (int step = 0; step < steps; ++step) {
    describe("%s, %s, step %d", type_name<T>(), options, step);
    p = sgd_update(p, grads[step], buf, sgd_coefficients<T>(o));
    torch_sgd(want_p, Bounded<T>{grads[step], 0}, want_buf, o);
    check_close("p", 0, p, want_p);
    if (o.momentum != 0) {
      check_close("buf", 0, buf, want_buf);
    } else {
      check(same_bits(buf, untouched), "buf was written without momentum");
    }
    o.first_step = false;
  }
}

}  // namespace

TEST(sgd_update_is_torch_sgd_for_every_option_set) {
  for_float_and_double([](auto type) {
    using T = decltype(type);
    constexpr int kSteps = 5;
    for (const double lr : {0.1, 0.0, -0.1}) {
      uint64_t seed = 1;
      for (const SgdOptions& o : option_sets(lr)) {
        T grads[kSteps];
        for (int k = 0; k < kSteps; ++k) grads[k] = random_value<T>(++seed, k);
        // A buffer that must not be read holds NaN.
        const bool reads_buf = o.momentum != 0 && !o.first_step;
        const T buf = reads_buf ? random_value<T>(seed, 100) : std::numeric_limits<T>::quiet_NaN();
        check_sgd_steps<T>(o, random_value<T>(seed, 101), buf, grads, kSteps);
      }
    }
  });
}

TEST(sgd_update_has_torch_sgds_nan_and_inf) {
  for_float_and_double([](auto type) {
    using T = decltype(type);
    const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
    for (const double lr : {0.1, 0.0}) {
      for (const SgdOptions& o : option_sets(lr)) {
        for (const T p : {T(0.5), inf, -inf, nan}) {
          for (const T grad : {T(0.25), inf, -inf, nan}) {
            for (const T buf : {T(0.75), inf, -inf, nan}) check_sgd_steps<T>(o, p, buf, &grad, 1);
          }
        }
      }
    }
  });
}

TEST(mse_scale_is_one_over_the_number_of_outputs_or_one) {
  for (const int64_t B : {1, 3, 64, 1000003}) {
    for (const int64_t O : {1, 7, 32}) {
      describe("B %lld, O %lld", static_cast<long long>(B), static_cast<long long>(O));
      const double mean = mse_loss_scale(Reduction::kMean, B, O);
      check_close("mean", 0, mean, Bounded<double>(1.0L / static_cast<long double>(B * O)));
      check(mse_dy_scale(Reduction::kMean, B, O) == 2 * mean, "dy scale of mean is not twice it");
      check(mse_loss_scale(Reduction::kSum, B, O) == 1.0, "sum is scaled");
      check(mse_dy_scale(Reduction::kSum, B, O) == 2.0, "dy scale of sum is not 2");
    }
  }
  // A batch whose size fits no 32-bit integer.
  const int64_t B = int64_t{1} << 40;
  check(mse_loss_scale(Reduction::kMean, B, 4) == std::ldexp(1.0, -42), "B * O was narrowed");
}

TEST(sgd_unscale_of_a_float_has_the_bits_that_the_quotient_in_double_is_rounded_to) {
  describe("unscale");
  for (int64_t k = 0; k < 100000; ++k) {
    const int exponent = static_cast<int>(hash(7, static_cast<uint64_t>(k)) % 276) - 149;
    const float scale = std::ldexp(random_value<float>(6, k), exponent);
    check(sgd_unscale(scale) == sgd_unscale(static_cast<double>(scale)), "of %a",
          static_cast<double>(scale));
  }
}

TEST(sgd_clip_leaves_small_norms_alone_and_keeps_nan) {
  describe("clip");
  check(sgd_clip(2.0, 1.0) == 1.0, "a norm below the limit");
  check(sgd_clip(0.0, 0.0) == 0.0, "a limit of 0");
  check(sgd_clip(1.0, 4.0) == 1.0 / (4.0 + 1e-6), "a norm above the limit");
  check(sgd_clip(1.0, kInf) == 0.0, "an infinite norm");
  check(std::isnan(sgd_clip(1.0, std::numeric_limits<double>::quiet_NaN())), "NaN");
}

TEST(mse_of_an_empty_batch_is_nan_for_mean_and_zero_for_sum) {
  for (const auto& [B, O] : {std::pair<int64_t, int64_t>{0, 3}, {3, 0}, {0, 0}}) {
    describe("B %lld, O %lld", static_cast<long long>(B), static_cast<long long>(O));
    check(mse_loss_scale(Reduction::kMean, B, O) == kInf, "the scale is not infinite");
    check(std::isnan(0.0 * mse_loss_scale(Reduction::kMean, B, O)), "the mean loss is not NaN");
    check(0.0 * mse_loss_scale(Reduction::kSum, B, O) == 0.0, "the loss' sum is not 0");
  }
}

TEST(mse_formulas_are_residual_square_and_scaled_residual) {
  for_float_and_double([](auto type) {
    using T = decltype(type);
    for (int k = 0; k < 100; ++k) {
      describe("%s, %d", type_name<T>(), k);
      const T product = random_value<T>(1, k), bias = random_value<T>(2, k);
      const T target = random_value<T>(3, k), scale = random_value<T>(4, k);
      const T r = mse_residual(product, bias, target);
      const Bounded<T> exact_r =
          Bounded<T>{product, 0} + Bounded<T>{bias, 0} - Bounded<T>{target, 0};
      check_close("residual", k, r, exact_r);
      check_close("term", k, mse_term(r), Bounded<T>{r, 0} * Bounded<T>{r, 0});
      check_close("dy", k, mse_dy(r, scale), Bounded<T>{r, 0} * Bounded<T>{scale, 0});
    }
  });
}
