// SPDX-License-Identifier: MIT
// Numbers with a bound on the error that correct code in T may make, by the standard model of
// rounding: fl(a op b) = (a op b)(1 + d), |d| <= u. A fused multiply-add rounds less often and
// keeps the bound; so does any order of a sum's additions.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "check.h"
#include "core/params.h"

namespace fused_step::test {

// |computed - v| <= e. v is exact but for long double's own rounding, which u includes.
template <typename T>
struct Bounded {
  static constexpr long double kU =
      static_cast<long double>(std::numeric_limits<T>::epsilon()) / 2 +
      std::numeric_limits<long double>::epsilon();
  long double v = 0;
  long double e = 0;

  Bounded() = default;
  Bounded(long double value, long double error) : v(value), e(error) {}
  // A constant: exact if T holds it, else rounded twice, to double and to T.
  explicit Bounded(long double constant)
      : v(constant),
        e(static_cast<long double>(static_cast<T>(constant)) == constant
              ? 0
              : 2 * kU * std::fabs(constant)) {}

  Bounded rounded() const { return {v, e + kU * (std::fabs(v) + e)}; }
  friend Bounded operator+(const Bounded& a, const Bounded& b) {
    return Bounded(a.v + b.v, a.e + b.e).rounded();
  }
  friend Bounded operator-(const Bounded& a, const Bounded& b) { return a + (-b); }
  friend Bounded operator-(const Bounded& a) { return {-a.v, a.e}; }
  friend Bounded operator*(const Bounded& a, const Bounded& b) {
    return Bounded(a.v * b.v, std::fabs(a.v) * b.e + a.e * std::fabs(b.v) + a.e * b.e).rounded();
  }
};

// n terms in any order: each goes through at most n - 1 additions and one conversion to T, so the
// error is at most that of the terms and gamma_n * sum |terms|, gamma_n = n u / (1 - n u).
template <typename T>
class Sum {
 public:
  void add(const Bounded<T>& term) {
    v_ += term.v;
    e_ += term.e;
    magnitude_ += std::fabs(term.v) + term.e;
    ++n_;
  }
  Bounded<T> total() const { return total(n_); }
  // When a term goes through fewer roundings than there are terms.
  Bounded<T> total(int64_t roundings) const {
    const long double nu = static_cast<long double>(roundings) * Bounded<T>::kU;
    return {v_, e_ + nu / (1 - nu) * magnitude_};
  }

 private:
  long double v_ = 0, e_ = 0, magnitude_ = 0;
  int64_t n_ = 0;
};

// torch.optim.SGD's rule for one element, as its documentation has it. Number is long double or a
// Bounded. buf is read and written only with momentum.
template <typename Number>
void torch_sgd(Number& p, const Number& grad, Number& buf, const SgdOptions& o) {
  const auto constant = [](long double c) { return Number(c); };
  Number g = o.maximize ? -grad : grad;
  if (o.weight_decay != 0) g = g + constant(o.weight_decay) * p;
  if (o.momentum != 0) {
    if (o.first_step) {
      buf = g;
    } else {
      buf = constant(o.momentum) * buf + constant(1 - static_cast<long double>(o.dampening)) * g;
    }
    g = o.nesterov ? g + constant(o.momentum) * buf : buf;
  }
  p = p - constant(o.lr) * g;
}

// NaN where the reference has NaN, the same infinity, otherwise within the bound.
template <typename T>
void check_close(const char* what, int64_t k, long double got, const Bounded<T>& want) {
  const bool ok = std::isnan(want.v)   ? std::isnan(got)
                  : std::isinf(want.v) ? got == want.v
                                       : std::fabs(got - want.v) <= want.e;
  check(ok, "%s[%lld] is %.12Lg, want %.12Lg, off by %.3Lg, allowed %.3Lg", what,
        static_cast<long long>(k), got, want.v, std::fabs(got - want.v), want.e);
}

template <typename T, typename Got, typename Want>
void check_all_close(const char* what, const Got& got, const Want& want) {
  for (size_t k = 0; k < want.size(); ++k) {
    check_close<T>(what, static_cast<int64_t>(k),
                   static_cast<long double>(got[static_cast<int64_t>(k)]), want[k]);
  }
}

// Every set of SGD's options that takes another way through the code. lr is the caller's.
inline std::vector<SgdOptions> option_sets(double lr) {
  std::vector<SgdOptions> sets;
  for (const bool maximize : {false, true}) {
    for (const double decay : {0.0, 0.1}) {
      sets.push_back({lr, 0.0, 0.0, decay, false, maximize, false});
      for (const double dampening : {0.0, 0.3, 1.0}) {
        for (const bool nesterov : {false, true}) {
          for (const bool first_step : {true, false}) {
            sets.push_back({lr, 0.9, dampening, decay, nesterov, maximize, first_step});
          }
        }
      }
    }
  }
  return sets;
}

inline void append(char* to, size_t size, const SgdOptions& o) {
  std::snprintf(to, size, "lr %g mu %g damp %g wd %g%s%s%s", o.lr, o.momentum, o.dampening,
                o.weight_decay, o.nesterov ? " nesterov" : "", o.maximize ? " maximize" : "",
                o.first_step ? " first" : "");
}

}  // namespace fused_step::test
