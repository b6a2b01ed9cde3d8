// SPDX-License-Identifier: MIT
// A linear layer with data in guarded memory, and the reference for whole steps of it: long double,
// each number with a bound on the error that correct code in the accumulator's type may make.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "bounded.h"
#include "check.h"
#include "core/float16.h"
#include "cuda/launch.h"
#include "cuda/pairs.h"
#include "cuda/policy.h"
#include "memory.h"

namespace fused_step::test {

template <typename T>
constexpr const char* kName = "?";
template <>
inline constexpr const char* kName<float> = "float";
template <>
inline constexpr const char* kName<double> = "double";
template <>
inline constexpr const char* kName<BFloat16> = "bfloat16";
template <>
inline constexpr const char* kName<Float16> = "float16";

// Half a unit in the last place relative to the value, and of the smallest values.
template <typename T>
struct Rounding {
  static constexpr long double kRelative = 0, kAbsolute = 0;  // none beyond the accumulator's
};
template <>
struct Rounding<BFloat16> {
  static constexpr long double kRelative = 0x1p-8L, kAbsolute = 0x1p-134L;
};
template <>
struct Rounding<Float16> {
  static constexpr long double kRelative = 0x1p-11L, kAbsolute = 0x1p-25L;
};

template <typename T>
using Bound = Bounded<Accum<T>>;

// A value rounded once more, as it is stored; from 65520 on binary16 has infinity only.
template <typename T>
Bound<T> stored(const Bound<T>& b) {
  if constexpr (std::is_same_v<T, Float16>) {
    if (std::fabs(b.v) - b.e >= 65520) return {std::copysign(HUGE_VALL, b.v), 0};
  }
  return {b.v, b.e + Rounding<T>::kRelative * (std::fabs(b.v) + b.e) + Rounding<T>::kAbsolute};
}

template <typename T>
long double value(T stored) {
  return static_cast<long double>(widen(stored));
}

template <typename T>
std::vector<Bound<T>> exact(const Memory<T>& from) {
  std::vector<Bound<T>> to;
  for (int64_t k = 0; k < from.n(); ++k) to.push_back({value(from[k]), 0});
  return to;
}

template <typename T>
void check_values(const char* what, const Memory<T>& got, const std::vector<Bound<T>>& want) {
  for (size_t k = 0; k < want.size(); ++k) {
    const Bound<T> bound = stored<T>(want[k]);
    check_close<Accum<T>>(what, static_cast<int64_t>(k), value(got[static_cast<int64_t>(k)]),
                          bound);
  }
  check(got.intact(), "wrote beside %s", what);
}

struct Sizes {
  int64_t B, I, O;
  uint64_t seed;  // alignment, strides, options and values follow from it
};

inline int64_t extent(int64_t rows, int64_t columns, int64_t stride) {
  return rows == 0 || columns == 0 ? 0 : (rows - 1) * stride + columns;
}

// How x lies: rows adjacent and aligned as allocated; aligned with a gap; an element off; odd gap;
// every row the same.
template <typename X>
int64_t pick_stride(int64_t I, uint64_t seed) {
  constexpr int64_t kVector = 16 / static_cast<int64_t>(sizeof(X));
  switch (seed % 6) {
    case 0:
      return (I + kVector - 1) / kVector * kVector + kVector;
    case 1:
      return I + 1;
    case 2:
      return 0;
    default:
      return I;
  }
}

inline SgdOptions pick_options(uint64_t seed) {
  static const std::vector<SgdOptions> sets = option_sets(0.1);
  return sets[seed % sets.size()];
}

// With x and target; what lies between rows is NaN.
template <typename X, typename P>
struct Data {
  int64_t B, I, O, x_stride, target_stride;
  Memory<X> x;
  Memory<P> target;
  std::vector<X> x_before;
  std::vector<P> target_before;

  explicit Data(const Sizes& s)
      : B(s.B),
        I(s.I),
        O(s.O),
        x_stride(pick_stride<X>(I, hash(s.seed, 1))),
        target_stride(hash(s.seed, 2) % 4 == 0 ? O + 1 : O),
        x(extent(B, I, x_stride), hash(s.seed, 3) % 4 == 0 ? 1 : 0, hash(s.seed, 4)),
        target(extent(B, O, target_stride), static_cast<int64_t>(hash(s.seed, 5) % 2),
               hash(s.seed, 6)) {
    // Now and then every row is the same: rounding then goes one way.
    const bool constant = hash(s.seed, 7) % 8 == 0;
    for (int64_t b = 0; b < B; ++b) {
      const int64_t row = constant ? 0 : b;
      for (int64_t i = 0; i < I; ++i) {
        x[b * x_stride + i] = narrow<X>(random_value<Accum<X>>(hash(s.seed, 8), row * I + i));
      }
      for (int64_t o = 0; o < O; ++o) {
        target[b * target_stride + o] =
            narrow<P>(random_value<Accum<P>>(hash(s.seed, 9), row * O + o));
      }
    }
    x_before = x.copy();
    target_before = target.copy();
  }

  cuda::Rows<X, P> rows() const { return {x.data(), target.data(), x_stride, target_stride}; }
  void check_unchanged() const {
    check(x.equals(x_before) && target.equals(target_before), "x or target changed");
    check(x.intact() && target.intact(), "wrote beside x or target");
  }
};

// What training changes. Buffers stay NaN where they must not be read.
template <typename P>
struct Layer {
  int64_t I, O;
  bool has_bias;
  SgdOptions weight_options, bias_options;
  Memory<P> weight, bias, weight_buf, bias_buf;
  std::vector<float> device_lr;  // empty: options.lr

  Layer(const Sizes& s, const SgdOptions& of_weight, const SgdOptions& of_bias)
      : I(s.I),
        O(s.O),
        has_bias(hash(s.seed, 10) % 4 != 0),
        weight_options(of_weight),
        bias_options(of_bias),
        weight(O * I, offset(s, 11), hash(s.seed, 12)),
        bias(O, offset(s, 13), hash(s.seed, 14)),
        weight_buf(O * I, offset(s, 15), hash(s.seed, 16)),
        bias_buf(O, offset(s, 17), hash(s.seed, 18)) {
    weight.fill_random(hash(s.seed, 19));
    bias.fill_random(hash(s.seed, 20));
    if (!of_weight.first_step && of_weight.momentum != 0) weight_buf.fill_random(hash(s.seed, 21));
    if (has_bias && !of_bias.first_step && of_bias.momentum != 0) {
      bias_buf.fill_random(hash(s.seed, 22));
    }
    if (hash(s.seed, 23) % 4 == 0) device_lr = {0.0625f};
  }

  const float* lr() const { return device_lr.empty() ? nullptr : device_lr.data(); }
  cuda::Param<P> weight_param() {
    return {weight.data(), weight_options.momentum != 0 ? weight_buf.data() : nullptr,
            weight_options, lr()};
  }
  cuda::Param<P> bias_param() {
    if (!has_bias) return {};
    return {bias.data(), bias_options.momentum != 0 ? bias_buf.data() : nullptr, bias_options,
            lr()};
  }

 private:
  static int64_t offset(const Sizes& s, uint64_t what) {
    return static_cast<int64_t>(hash(s.seed, what) % 2);
  }
};

template <typename P>
struct Gradients {
  std::vector<Bound<P>> dweight, dbias;
  Bound<P> loss;  // sum of r^2
  std::vector<Bound<P>> residual;
};

inline long double loss_scale(Reduction reduction, int64_t B, int64_t O) {
  return reduction == Reduction::kMean ? 1 / static_cast<long double>(B * O) : 1.0L;
}

// y = x W^T + b, r = y - t, dy = scale * r, dW = dy^T x, db = sum dy, loss = sum r^2 over rows
// [first, first + count).
template <typename X, typename P>
Gradients<P> reference_gradients(const Data<X, P>& d, int64_t first, int64_t count,
                                 const std::vector<Bound<P>>& weight,
                                 const std::vector<Bound<P>>& bias,  // empty: none
                                 const Bound<P>& scale) {
  using A = Accum<P>;
  Gradients<P> g;
  g.dweight.resize(static_cast<size_t>(d.O * d.I));
  Sum<A> loss;
  std::vector<Bound<P>> dy(static_cast<size_t>(count));
  g.residual.resize(static_cast<size_t>(count * d.O));
  for (int64_t o = 0; o < d.O; ++o) {
    Sum<A> dbias;
    for (int64_t b = 0; b < count; ++b) {
      Sum<A> product;
      for (int64_t i = 0; i < d.I; ++i) {
        product.add(Bound<P>{value(d.x[(first + b) * d.x_stride + i]), 0} *
                    weight[static_cast<size_t>(o * d.I + i)]);
      }
      Bound<P> r = product.total();
      if (!bias.empty()) r = r + bias[static_cast<size_t>(o)];
      r = r - Bound<P>{value(d.target[(first + b) * d.target_stride + o]), 0};
      g.residual[static_cast<size_t>(b * d.O + o)] = r;
      loss.add(r * r);
      dbias.add(dy[static_cast<size_t>(b)] = r * scale);
    }
    g.dbias.push_back(dbias.total().rounded());
    for (int64_t i = 0; i < d.I; ++i) {
      Sum<A> sum;
      for (int64_t b = 0; b < count; ++b) {
        sum.add(dy[static_cast<size_t>(b)] * Bound<P>{value(d.x[(first + b) * d.x_stride + i]), 0});
      }
      g.dweight[static_cast<size_t>(o * d.I + i)] = sum.total().rounded();
    }
  }
  g.loss = loss.total();
  return g;
}

// The plain loop. Parameters and buffers are rounded as they are stored, with each step.
template <typename P>
struct ReferenceLayer {
  std::vector<Bound<P>> weight, bias, weight_buf, bias_buf;
  SgdOptions weight_options, bias_options;

  explicit ReferenceLayer(const Layer<P>& layer)
      : weight(exact(layer.weight)),
        bias(layer.has_bias ? exact(layer.bias) : std::vector<Bound<P>>()),
        weight_buf(exact(layer.weight_buf)),
        bias_buf(exact(layer.bias_buf)),
        weight_options(layer.weight_options),
        bias_options(layer.bias_options) {
    if (layer.lr() != nullptr)
      weight_options.lr = bias_options.lr = static_cast<double>(*layer.lr());
  }

  // `dy_error`: relative, of a kernel that rounds dy on its way.
  template <typename X>
  Bound<P> step(const Data<X, P>& data, int64_t first, int64_t count, Reduction reduction,
                long double dy_error = 0) {
    const long double scale = loss_scale(reduction, count, data.O);
    Bound<P> dy_scale(2 * scale);
    dy_scale.e += 2 * scale * dy_error;
    const Gradients<P> g = reference_gradients(data, first, count, weight, bias, dy_scale);
    apply(weight, weight_buf, weight_options, g.dweight);
    apply(bias, bias_buf, bias_options, g.dbias);
    return (g.loss * Bound<P>(scale)).rounded();
  }

  static void apply(std::vector<Bound<P>>& param, std::vector<Bound<P>>& buf, SgdOptions& options,
                    const std::vector<Bound<P>>& grad) {
    for (size_t k = 0; k < param.size(); ++k) {
      torch_sgd(param[k], grad[k], buf[k], options);
      param[k] = stored<P>(param[k]);
      if (options.momentum != 0) buf[k] = stored<P>(buf[k]);
    }
    options.first_step = false;
  }
};

// Parameters and buffers against the reference, and that what must stay stayed.
template <typename P>
void check_layer(const Layer<P>& got, const ReferenceLayer<P>& want) {
  check_values("weight", got.weight, want.weight);
  if (got.has_bias) check_values("bias", got.bias, want.bias);
  if (got.weight_options.momentum != 0) {
    check_values("weight_buf", got.weight_buf, want.weight_buf);
  } else {
    check(got.weight_buf.untouched(), "a buffer without momentum changed");
  }
  if (got.has_bias && got.bias_options.momentum != 0) {
    check_values("bias_buf", got.bias_buf, want.bias_buf);
  } else {
    check(got.bias_buf.untouched(), "a buffer that nobody has changed");
  }
}

// Scratch memory: NaN, and tickets that must come back zero.
struct ScratchMemory {
  Memory<unsigned char> workspace;
  std::vector<unsigned> tickets;
  bool gives_tickets = true;

  ScratchMemory(int64_t bytes, uint64_t seed)
      : workspace(bytes, 0, seed), tickets(static_cast<size_t>(cuda::kTickets), 0u) {}
  cuda::Scratch get() { return {workspace.data(), gives_tickets ? tickets.data() : nullptr}; }
  void check_after() const {
    check(workspace.intact(), "wrote beside the workspace");
    for (const unsigned ticket : tickets) check(ticket == 0, "a ticket was not given back");
  }
};

template <typename X, typename P>
void describe_case(const char* what, const Sizes& s) {
  describe("%s <%s, %s> B %lld, I %lld, O %lld, seed %llu", what, kName<X>, kName<P>,
           static_cast<long long>(s.B), static_cast<long long>(s.I), static_cast<long long>(s.O),
           static_cast<unsigned long long>(s.seed));
}

inline Reduction pick_reduction(uint64_t seed) {
  return hash(seed, 30) % 2 == 0 ? Reduction::kMean : Reduction::kSum;
}

// Of a sweep that would take too long under every schedule and sanitizer, each run takes its share:
// sizes number k with k % of == part. Together the runs of `make emulate` take all.
struct Share {
  uint64_t part = 0, of = 1;
};
inline Share share;
inline std::string schedule_of_run = "forward";
inline bool takes(uint64_t k) { return hash(k, 31) % share.of == share.part; }

}  // namespace fused_step::test

// f<X, P>(arguments) for every pair that the kernels are built for.
#define FOR_EACH_PAIR(f, ...)                                                                \
  do {                                                                                       \
    const auto for_pair = [&](auto x, auto p) { f<decltype(x), decltype(p)>(__VA_ARGS__); }; \
    FUSED_STEP_FOR_EACH_PAIR(CALL_FOR_PAIR)                                                  \
  } while (false)
#define CALL_FOR_PAIR(X, P) for_pair(X{}, P{});
// Likewise for every type of parameters.
#define FOR_EACH_PARAM(f, ...)                                           \
  do {                                                                   \
    const auto for_param = [&](auto p) { f<decltype(p)>(__VA_ARGS__); }; \
    FUSED_STEP_FOR_EACH_PARAM(CALL_FOR_PARAM)                            \
  } while (false)
#define CALL_FOR_PARAM(P) for_param(P{});
// f<X>(arguments) for every type that the matrix units multiply.
#define FOR_EACH_MMA(f, ...)                                            \
  do {                                                                  \
    const auto for_type = [&](auto x) { f<decltype(x)>(__VA_ARGS__); }; \
    FUSED_STEP_FOR_EACH_MMA(CALL_FOR_MMA)                               \
  } while (false)
#define CALL_FOR_MMA(X) for_type(X{});
