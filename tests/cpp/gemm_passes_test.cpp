// SPDX-License-Identifier: MIT
// What the gemm plan does beside its GEMMs: residuals, and the update from a stored gradient.
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

template <typename T>
struct Residuals {
  Bounds<T> dy;     // [rows, O]
  Bounds<T> dbias;  // [O]
  Bounded<T> loss;
};

template <typename T>
Residuals<T> reference_residuals(const Buffer<T>& y, const Data<T>& data, const Buffer<T>* bias,
                                 double dy_scale, int64_t roundings) {
  const int64_t O = data.s.O;
  Residuals<T> want{Bounds<T>(static_cast<size_t>(data.s.rows * O)), {}, {}};
  Sum<T> loss;
  for (int64_t o = 0; o < O; ++o) {
    Sum<T> dbias;
    for (int64_t b = 0; b < data.s.rows; ++b) {
      Bounded<T> r{y[b * O + o], 0};
      if (bias != nullptr) r = r + Bounded<T>{(*bias)[o], 0};
      r = r - Bounded<T>{data.target[b * data.target_stride + o], 0};
      loss.add(r * r);
      const Bounded<T> dy = r * Bounded<T>(dy_scale);
      want.dy[static_cast<size_t>(b * O + o)] = dy;
      dbias.add(dy);
    }
    want.dbias.push_back(roundings == 0 ? dbias.total() : dbias.total(roundings));
  }
  want.loss = roundings == 0 ? loss.total() : loss.total(roundings);
  return want;
}

// The value `special` stands at y[special_at]; with `roundings` all of y is alike.
template <typename T>
void test_residuals(const Data<T>& data, int64_t special_at, T special, int64_t roundings = 0) {
  const Sizes& s = data.s;
  Buffer<T> start(s.rows * s.O, 0), bias(s.O, hash(s.seed, 80));
  start.fill_random(hash(s.seed, 81));
  bias.fill_random(hash(s.seed, 82));
  if (special_at >= 0) start[special_at] = special;
  if (roundings != 0) start.fill(T(0.7));
  const bool has_bias = hash(s.seed, 83) % 3 != 0;
  const double scale = s.rows == 0 ? std::numeric_limits<double>::infinity() : 2.0 / 3.0;
  const Residuals<T> want =
      reference_residuals(start, data, has_bias ? &bias : nullptr, scale, roundings);
  const std::vector<T> bias_before = bias.copy();
  for_each_isa([&](const char* isa) {
    describe("%s, %s, B %lld, O %lld, seed %llu", type_name<T>(), isa,
             static_cast<long long>(s.rows), static_cast<long long>(s.O),
             static_cast<unsigned long long>(s.seed));
    Buffer<T> y(s.rows * s.O, hash(s.seed, 84));
    Buffer<double> dbias(s.O, hash(s.seed, 85)), loss(1, hash(s.seed, 86));
    for (int64_t k = 0; k < y.n(); ++k) y[k] = start[k];
    poison_stack();
    kernels<T>().residual_chunk({y.data(), data.target.data(), data.target_stride,
                                 has_bias ? bias.data() : nullptr, s.rows, s.O, scale, dbias.data(),
                                 loss.data()});
    check_all_close<T>("dy", y, want.dy);
    check_all_close<T>("dbias", dbias, want.dbias);
    check_close<T>("loss", 0, loss[0], want.loss);
    check(y.intact() && dbias.intact() && loss.intact(), "wrote beside an output");
    check(bias.equals(bias_before), "b changed");
    data.check_unchanged();
  });
}

template <typename T>
void test_small_residuals() {
  uint64_t seed = 12000000;
  for (int64_t O = 0; O <= 4 * 16 + 1; ++O) {
    for (const int64_t rows : {0, 1, 2, 3, 5, 17, 63, 64, 65, 127, 128, 129}) {
      test_residuals<T>(Data<T>({rows, 0, O, ++seed}), -1, T(0));
    }
  }
  for (const int64_t O : {127, 129, 1000}) test_residuals<T>(Data<T>({9, 0, O, ++seed}), -1, T(0));
}

}  // namespace

TEST(residual_chunk_makes_dy_loss_and_dbias_float) { test_small_residuals<float>(); }
TEST(residual_chunk_makes_dy_loss_and_dbias_double) { test_small_residuals<double>(); }

TEST(residual_chunk_error_in_float_does_not_grow_with_rows) {
  // However the rows are blocked: at most 64 additions in float, the rest in double, of which 2^29
  // round as much as one in float.
  constexpr int64_t kRoundings = 64;
  for (const int64_t O : {1, 4, 9, 33}) {
    Data<float> data({100000, 0, O, 12});
    data.target.fill(0);
    data.remember();
    test_residuals<float>(data, -1, 0, kRoundings);
  }
}

namespace {

template <typename T>
void test_special_residuals() {
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  uint64_t seed = 13000000;
  for (const T special : {inf, -inf, nan}) {
    for (const int64_t O : {1, 3, 9}) {
      for (const int64_t rows : {1, 3, 65}) {
        for (int64_t k = 0; k < rows * O; ++k) {
          test_residuals<T>(Data<T>({rows, 0, O, ++seed}), k, special);
        }
      }
    }
  }
}

}  // namespace

TEST(residual_chunk_has_nan_and_inf_exactly_where_the_reference_has) {
  test_special_residuals<float>();
  test_special_residuals<double>();
}

namespace {

// `fill` puts values of the caller's choice into param, grad and buf, each of them n.
template <typename T, typename Fill>
void test_sgd(int64_t n, const SgdOptions& o, uint64_t seed, const Fill& fill) {
  const bool has_buf = o.momentum != 0;
  Buffer<T> start_p(n, 0), grad(n, hash(seed, 1)), start_buf(n, 0);
  fill(start_p, grad, start_buf);
  if (!has_buf || o.first_step) start_buf.fill_nan();
  const std::vector<T> grad_before = grad.copy();
  Bounds<T> want_p = exact(start_p), want_buf = exact(start_buf);
  for (size_t k = 0; k < want_p.size(); ++k) {
    const Bounded<T> g{static_cast<long double>(grad[static_cast<int64_t>(k)]), 0};
    torch_sgd(want_p[k], g, want_buf[k], o);
  }
  char text[160];
  append(text, sizeof(text), o);
  for_each_isa([&](const char* isa) {
    describe("%s, %s, n %lld, %s, seed %llu", type_name<T>(), isa, static_cast<long long>(n), text,
             static_cast<unsigned long long>(seed));
    Buffer<T> p(n, hash(seed, 2)), buf(n, hash(seed, 3));
    for (int64_t k = 0; k < n; ++k) {
      p[k] = start_p[k];
      buf[k] = start_buf[k];
    }
    kernels<T>().sgd({p.data(), grad.data(), has_buf ? buf.data() : nullptr, n, o});
    check_all_close<T>("p", p, want_p);
    if (has_buf) {
      check_all_close<T>("buf", buf, want_buf);
    } else {
      check(buf.equals(start_buf.copy()), "buf was written");
    }
    check(p.intact() && buf.intact() && grad.intact(), "wrote beside an array");
    check(grad.equals(grad_before), "grad changed");
  });
}

template <typename T>
void test_sgd_of_every_size() {
  uint64_t seed = 14000000;
  for (const SgdOptions& o : option_sets(0.1)) {
    for (int64_t n = 0; n <= kMaxSmall; ++n) {
      test_sgd<T>(n, o, ++seed, [&](auto& p, auto& grad, auto& buf) {
        p.fill_random(seed);
        grad.fill_random(seed + 1);
        buf.fill_random(seed + 2);
      });
    }
  }
}

template <typename T>
void test_sgd_of_special_values() {
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const T values[] = {T(0.5), inf, -inf, nan};
  for (const double lr : {0.1, 0.0}) {
    for (const SgdOptions& o : option_sets(lr)) {
      // All combinations, in vectors and, from 64 on, in a tail.
      test_sgd<T>(67, o, 5, [&](auto& p, auto& grad, auto& buf) {
        for (int64_t k = 0; k < 67; ++k) {
          p[k] = values[k % 4];
          grad[k] = values[k / 4 % 4];
          buf[k] = values[k / 16 % 4];
        }
      });
    }
  }
}

}  // namespace

TEST(sgd_pass_applies_torch_sgd_to_every_element) {
  test_sgd_of_every_size<float>();
  test_sgd_of_every_size<double>();
}

TEST(sgd_pass_has_torch_sgds_nan_and_inf) {
  test_sgd_of_special_values<float>();
  test_sgd_of_special_values<double>();
}
