// SPDX-License-Identifier: MIT
// A linear layer with data, in guarded memory, and the reference for whole steps of it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bounded.h"
#include "buffer.h"
#include "core/params.h"
#include "cpu/kernels.h"
#include "cpu/policy.h"

namespace fused_step::test {

// Sizes of W's rows: every one up to twice the widest vector, and one more.
constexpr int64_t kMaxSmall = 2 * 16 + 1;
// Around the blocks of 2, 4 and 8 outputs, and around 16 and 32.
constexpr int64_t kOutputs[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32};

struct Sizes {
  int64_t rows, I, O;
  uint64_t seed;  // layout, strides, places and values follow from it
};

// Distance of rows in memory: adjacent, apart, all the same row, or overlapping.
inline int64_t row_stride(int64_t columns, uint64_t seed) {
  switch (seed % 8) {
    case 0:
      return columns + 1;
    case 1:
      return columns + 5;
    case 2:
      return 0;
    case 3:
      return std::min<int64_t>(columns, 1);
    default:
      return columns;
  }
}

inline int64_t extent(int64_t rows, int64_t columns, int64_t stride) {
  return rows == 0 || columns == 0 ? 0 : (rows - 1) * stride + columns;
}

// x and target: what lies between the rows is NaN.
template <typename T>
struct Data {
  Sizes s;
  int64_t x_stride, target_stride;
  Buffer<T> x, target;
  std::vector<T> x_before, target_before;

  explicit Data(const Sizes& sizes)
      : s(sizes),
        x_stride(row_stride(s.I, hash(s.seed, 1))),
        target_stride(row_stride(s.O, hash(s.seed, 2))),
        x(extent(s.rows, s.I, x_stride), hash(s.seed, 3)),
        target(extent(s.rows, s.O, target_stride), hash(s.seed, 4)) {
    // Now and then every row is the same: rounding then goes one way.
    const bool constant = hash(s.seed, 5) % 8 == 0;
    for (int64_t b = 0; b < s.rows; ++b) {
      for (int64_t i = 0; i < s.I; ++i) {
        x[b * x_stride + i] = random_value<T>(hash(s.seed, 6), constant ? i : b * s.I + i);
      }
      for (int64_t o = 0; o < s.O; ++o) {
        target[b * target_stride + o] =
            random_value<T>(hash(s.seed, 7), constant ? o : b * s.O + o);
      }
    }
    remember();
  }

  cpu::Rows<T> rows(int64_t first, int64_t count) const {
    return {x.data() + first * x_stride, target.data() + first * target_stride, x_stride,
            target_stride, count};
  }
  cpu::Rows<T> rows() const { return rows(0, s.rows); }

  void remember() {
    x_before = x.copy();
    target_before = target.copy();
  }
  void check_unchanged() const {
    check(x.equals(x_before) && target.equals(target_before), "x or target changed");
    check(x.intact() && target.intact(), "wrote beside x or target");
  }
};

// What training changes. Buffers hold NaN where they must not be read.
template <typename T>
struct Layer {
  Sizes s;
  bool has_bias;
  SgdOptions weight_options, bias_options;
  Buffer<T> weight, bias, weight_buf, bias_buf;

  Layer(const Sizes& sizes, const SgdOptions& of_weight, const SgdOptions& of_bias)
      : s(sizes),
        has_bias(hash(s.seed, 10) % 4 != 0),
        weight_options(of_weight),
        bias_options(of_bias),
        weight(s.O * s.I, hash(s.seed, 11)),
        bias(s.O, hash(s.seed, 12)),
        weight_buf(s.O * s.I, hash(s.seed, 13)),
        bias_buf(s.O, hash(s.seed, 14)) {
    weight.fill_random(hash(s.seed, 15));
    bias.fill_random(hash(s.seed, 16));
    if (!of_weight.first_step && of_weight.momentum != 0) weight_buf.fill_random(hash(s.seed, 17));
    if (!of_bias.first_step && of_bias.momentum != 0) bias_buf.fill_random(hash(s.seed, 18));
  }

  T* bias_or_null() { return has_bias ? bias.data() : nullptr; }
  cpu::LinearParams<T> params() {
    return {weight.data(),
            bias_or_null(),
            weight_options.momentum != 0 ? weight_buf.data() : nullptr,
            has_bias && bias_options.momentum != 0 ? bias_buf.data() : nullptr,
            weight_options,
            bias_options,
            s.I,
            s.O};
  }
  void check_intact() const {
    check(weight.intact() && bias.intact() && weight_buf.intact() && bias_buf.intact(),
          "wrote beside the parameters");
  }
};

// Partial sums of `chunks` chunks, each in memory of its own, all of it NaN.
template <typename T>
struct Partials {
  Buffer<T> dweight;
  Buffer<double> dbias, loss;

  Partials(int64_t O, int64_t I, uint64_t seed)
      : dweight(O * cpu::partial_stride(I), hash(seed, 20)),
        dbias(O, hash(seed, 21)),
        loss(1, hash(seed, 22)) {}
  cpu::PartialSums<T> get() { return {dweight.data(), dbias.data(), loss.data()}; }
  void check_intact() const {
    check(dweight.intact() && dbias.intact() && loss.intact(), "wrote beside the partial sums");
  }
};

template <typename T>
using Bounds = std::vector<Bounded<T>>;

template <typename T>
struct ReferenceSums {
  Bounds<T> dweight;  // [O, I]
  Bounds<T> dbias;    // [O]
  Bounded<T> loss;    // sum of r^2
};

// How many roundings a term of a sum over rows goes through, at most; 0: as many as there are rows.
struct Depth {
  int64_t of_dweight = 0;
  int64_t of_loss_and_bias = 0;
};

// y = x W^T + b, r = y - t, dy = dy_scale * r, dW = dy^T x, db = sum dy, loss = sum r^2.
template <typename T>
ReferenceSums<T> reference_sums(const cpu::Rows<T>& data, int64_t I, int64_t O,
                                const Bounds<T>& weight, const Bounds<T>& bias,  // empty: none
                                const Bounded<T>& dy_scale, const Depth& depth = {}) {
  ReferenceSums<T> sums{
      Bounds<T>(static_cast<size_t>(O * I)), Bounds<T>(static_cast<size_t>(O)), {}};
  Bounds<T> dy(static_cast<size_t>(data.rows));
  const auto total = [](const Sum<T>& sum, int64_t roundings) {
    return roundings == 0 ? sum.total() : sum.total(roundings);
  };
  Sum<T> loss;
  for (int64_t o = 0; o < O; ++o) {
    const Bounded<T>* const w = weight.data() + o * I;
    Sum<T> dbias;
    for (int64_t b = 0; b < data.rows; ++b) {
      const T* const x = data.x + b * data.x_stride;
      Sum<T> product;
      for (int64_t i = 0; i < I; ++i) product.add(Bounded<T>{x[i], 0} * w[i]);
      Bounded<T> r = product.total();
      if (!bias.empty()) r = r + bias[static_cast<size_t>(o)];
      r = r - Bounded<T>{data.target[b * data.target_stride + o], 0};
      loss.add(r * r);
      dbias.add(dy[static_cast<size_t>(b)] = r * dy_scale);
    }
    sums.dbias[static_cast<size_t>(o)] = total(dbias, depth.of_loss_and_bias);
    for (int64_t i = 0; i < I; ++i) {
      Sum<T> dweight;
      for (int64_t b = 0; b < data.rows; ++b) {
        dweight.add(dy[static_cast<size_t>(b)] * Bounded<T>{data.x[b * data.x_stride + i], 0});
      }
      sums.dweight[static_cast<size_t>(o * I + i)] = total(dweight, depth.of_dweight);
    }
  }
  sums.loss = total(loss, depth.of_loss_and_bias);
  return sums;
}

template <typename T>
Bounds<T> exact(const Buffer<T>& from) {
  Bounds<T> to;
  for (int64_t k = 0; k < from.n(); ++k) to.push_back({from[k], 0});
  return to;
}

inline long double loss_scale(Reduction reduction, int64_t rows, int64_t O) {
  return reduction == Reduction::kMean ? 1 / static_cast<long double>(rows * O) : 1.0L;
}

// The plain loop: gradients, then the optimizer.
template <typename T>
struct ReferenceLayer {
  int64_t I, O;
  Bounds<T> weight, bias, weight_buf, bias_buf;
  SgdOptions weight_options, bias_options;

  explicit ReferenceLayer(const Layer<T>& layer)
      : I(layer.s.I),
        O(layer.s.O),
        weight(exact(layer.weight)),
        bias(layer.has_bias ? exact(layer.bias) : Bounds<T>()),
        weight_buf(exact(layer.weight_buf)),
        bias_buf(exact(layer.bias_buf)),
        weight_options(layer.weight_options),
        bias_options(layer.bias_options) {}

  Bounded<T> step(const cpu::Rows<T>& batch, Reduction reduction) {
    const long double scale = loss_scale(reduction, batch.rows, O);
    const ReferenceSums<T> sums =
        reference_sums<T>(batch, I, O, weight, bias, Bounded<T>(2 * scale));
    apply(sums);
    return (sums.loss * Bounded<T>(scale)).rounded();
  }

  void apply(const ReferenceSums<T>& sums) {
    for (size_t k = 0; k < weight.size(); ++k) {
      torch_sgd(weight[k], sums.dweight[k], weight_buf[k], weight_options);
    }
    for (size_t k = 0; k < bias.size(); ++k) {
      torch_sgd(bias[k], sums.dbias[k].rounded(), bias_buf[k], bias_options);
    }
    weight_options.first_step = bias_options.first_step = false;
  }
};

// Parameters and buffers against the reference, and that what must stay stayed.
template <typename T>
void check_layer(const Layer<T>& got, const ReferenceLayer<T>& want, bool stepped = true) {
  check_all_close<T>("weight", got.weight, want.weight);
  check_all_close<T>("bias", got.bias, want.bias);
  if (got.weight_options.momentum != 0 && stepped) {
    check_all_close<T>("weight_buf", got.weight_buf, want.weight_buf);
  }
  if (got.has_bias && got.bias_options.momentum != 0 && stepped) {
    check_all_close<T>("bias_buf", got.bias_buf, want.bias_buf);
  }
  got.check_intact();
}

// A bound that would let an unchanged weight pass proves nothing.
template <typename T>
void check_bound_sees_a_change(const std::vector<T>& before, const Bounds<T>& after) {
  long double change = 0, bound = 0;
  for (size_t k = 0; k < after.size(); ++k) {
    change = std::max(change, std::fabs(after[k].v - static_cast<long double>(before[k])));
    bound = std::max(bound, after[k].e);
  }
  check(after.empty() || bound <= change / 4, "the test is too weak: %.3Lg for a change of %.3Lg",
        bound, change);
}

inline SgdOptions pick_options(uint64_t seed, double lr) {
  static const std::vector<SgdOptions> sets = option_sets(1.0);
  SgdOptions o = sets[seed % sets.size()];
  o.lr = lr;
  return o;
}

}  // namespace fused_step::test
