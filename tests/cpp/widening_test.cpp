// SPDX-License-Identifier: MIT
// The loops over 16-bit tensors give, bit by bit, what the loops for float give on widened copies,
// rounded once. What those give is held to the reference by their own tests.
#include <algorithm>
#include <vector>

#include "bounded.h"
#include "check.h"
#include "cpu/bias.h"
#include "cpu/kernels.h"
#include "cpu/policy.h"
#include "problem.h"

using namespace fused_step;
using namespace fused_step::cpu;
using namespace fused_step::test;

namespace {

constexpr double kScale = 2.0 / 3.0;
constexpr SgdOptions kNoOptions = {};

template <typename S>
std::vector<float> widened(const S* from, int64_t rows, int64_t columns, int64_t stride) {
  std::vector<float> to;
  to.reserve(static_cast<size_t>(rows * columns));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < columns; ++k) to.push_back(widen(from[r * stride + k]));
  }
  return to;
}

template <typename S>
std::vector<float> widened(const Buffer<S>& from) {
  return widened(from.data(), 1, from.n(), 0);
}

template <typename S>
std::vector<S> rounded(const std::vector<float>& from) {
  std::vector<S> to;
  to.reserve(from.size());
  for (const float value : from) to.push_back(narrow<S>(value));
  return to;
}

template <typename T>
void check_same(const char* what, const Buffer<T>& got, const std::vector<T>& want) {
  check(got.equals(want), "%s differs from the loops for float", what);
  check(got.intact(), "wrote beside %s", what);
}

struct Wanted {
  bool float_target, dweight, dx;
};

template <typename S>
void test_chunk(const Sizes& s, const Wanted& wanted) {
  for_each_isa([&](const char* isa) {
    describe("%s, %s, rows %lld, I %lld, O %lld, seed %llu%s%s%s", type_name<S>(), isa,
             static_cast<long long>(s.rows), static_cast<long long>(s.I),
             static_cast<long long>(s.O), static_cast<unsigned long long>(s.seed),
             wanted.float_target ? ", float target" : "", wanted.dweight ? "" : ", no dW",
             wanted.dx ? ", dx" : "");
    const Data<S> data(s);
    Layer<S> layer(s, kNoOptions, kNoOptions);
    const std::vector<float> x = widened(data.x.data(), s.rows, s.I, data.x_stride);
    const std::vector<float> target = widened(data.target.data(), s.rows, s.O, data.target_stride);
    const std::vector<float> weight = widened(layer.weight), bias = widened(layer.bias);

    OnePassChunk<float> chunk{{x.data(), target.data(), s.I, s.O, s.rows},
                              weight.data(),
                              layer.has_bias ? bias.data() : nullptr,
                              s.I,
                              s.O,
                              kScale,
                              {}};
    Partials<float> want(s.O, s.I, s.seed + 1), got(s.O, s.I, s.seed);
    std::vector<float> want_dx(static_cast<size_t>(s.rows * s.I));
    chunk.partial = want.get();
    if (!wanted.dweight) chunk.partial.dweight = nullptr;
    chunk.dx = wanted.dx ? want_dx.data() : nullptr;
    kernels<float>().one_pass_chunk(chunk);

    Buffer<Unscaled<S>> dx(s.rows * s.I, s.seed);
    Buffer<float> panel(widened_panel(s.I, s.O), s.seed + 2);
    chunk.batch.x = nullptr;
    if (!wanted.float_target) chunk.batch.target = nullptr;
    chunk.partial = got.get();
    if (!wanted.dweight) chunk.partial.dweight = nullptr;
    chunk.dx = nullptr;
    poison_stack();
    widening_kernels<S>().one_pass_chunk(
        {data.x.data(), data.x_stride, wanted.float_target ? nullptr : data.target.data(),
         data.target_stride, wanted.dx ? dx.data() : nullptr, panel.data(), chunk});

    check(got.loss.equals(want.loss.copy()), "another loss");
    check(got.dbias.equals(want.dbias.copy()), "another dbias");
    check(got.dweight.equals(want.dweight.copy()), "another dW");
    got.check_intact();
    if (wanted.dx) check_same("dx", dx, rounded<Unscaled<S>>(want_dx));
    check(panel.intact(), "wrote beside the panel");
    data.check_unchanged();
    layer.check_intact();
  });
}

template <typename Body>
void for_both_types(const Body& body) {
  body(BFloat16{});
  body(Float16{});
}

}  // namespace

TEST(widened_chunk_is_the_float_chunk_of_every_small_size) {
  for_both_types([](auto type) {
    using S = decltype(type);
    uint64_t seed = 0;
    for (int64_t I = 0; I <= kMaxSmall; ++I) {
      for (const int64_t O : kOutputs) {
        for (const int64_t rows : {0, 1, 2, 5, 17}) {
          ++seed;
          test_chunk<S>({rows, I, O, seed},
                        {hash(seed, 1) % 2 == 0, hash(seed, 2) % 4 != 0, hash(seed, 3) % 2 == 0});
        }
      }
    }
  });
}

TEST(widened_chunk_is_the_float_chunk_around_tiles) {
  for_both_types([](auto type) {
    using S = decltype(type);
    uint64_t seed = 0;
    for (const int64_t I : {1, 63, 64, 65, 255, 256, 512, 513, 1025, 4097}) {
      const int64_t tile = tile_rows(I, sizeof(float));
      for (const int64_t rows : {tile - 1, tile, tile + 1, 2 * tile, 3 * tile + 5}) {
        for (const int64_t O : {1, 5, 32}) {
          if (rows * I * O > 300000) continue;
          ++seed;
          test_chunk<S>({rows, I, O, seed}, {seed % 2 == 0, seed % 5 != 0, seed % 3 == 0});
        }
      }
    }
  });
}

TEST(residual_chunk_of_16_bit_targets_is_that_of_float_ones) {
  for_both_types([](auto type) {
    using S = decltype(type);
    for (int64_t O = 0; O <= kMaxSmall; ++O) {
      for (const int64_t rows : {0, 1, 3, 4, 9}) {
        const Sizes s{rows, 3, O, static_cast<uint64_t>(100 * O + rows)};
        for_each_isa([&](const char* isa) {
          describe("%s, %s, rows %lld, O %lld", type_name<S>(), isa, static_cast<long long>(rows),
                   static_cast<long long>(O));
          const Data<S> data(s);
          const std::vector<float> target =
              widened(data.target.data(), rows, O, data.target_stride);
          Buffer<float> y(rows * O, s.seed), bias(O, s.seed + 1);
          y.fill_random(s.seed);
          bias.fill_random(s.seed + 1);
          std::vector<float> want = y.copy();
          Partials<float> got_sums(O, 0, s.seed), want_sums(O, 0, s.seed + 1);
          kernels<float>().residual_chunk({want.data(), target.data(), O, bias.data(), rows, O,
                                           kScale, want_sums.dbias.data(), want_sums.loss.data()});
          widening_kernels<S>().residual_chunk({y.data(), data.target.data(), data.target_stride,
                                                bias.data(), rows, O, kScale, got_sums.dbias.data(),
                                                got_sums.loss.data()});
          check_same("dL/dy", y, want);
          check(got_sums.loss.equals(want_sums.loss.copy()), "another loss");
          check(got_sums.dbias.equals(want_sums.dbias.copy()), "another dbias");
          got_sums.check_intact();
          data.check_unchanged();
        });
      }
    }
  });
}

namespace {

// The layer after `update` of it as it is stored, and after `update` of a widened copy.
template <typename S, typename OfStored, typename OfFloat>
void check_updates(const Sizes& s, const SgdOptions& options, const OfStored& update_stored,
                   const OfFloat& update_float) {
  Layer<S> layer(s, options, options);
  std::vector<float> weight = widened(layer.weight), bias = widened(layer.bias);
  std::vector<float> weight_buf = widened(layer.weight_buf), bias_buf = widened(layer.bias_buf);
  const LinearParams<float> wide{weight.data(),
                                 layer.has_bias ? bias.data() : nullptr,
                                 options.momentum != 0 ? weight_buf.data() : nullptr,
                                 options.momentum != 0 ? bias_buf.data() : nullptr,
                                 options,
                                 options,
                                 s.I,
                                 s.O};
  update_float(wide);
  update_stored(layer.params());
  check_same("W", layer.weight, rounded<S>(weight));
  check_same("bias", layer.bias, rounded<S>(bias));
  // Without momentum, and of a missing bias, they are the NaN they were made of.
  if (options.momentum == 0) return;
  check_same("the buffer of W", layer.weight_buf, rounded<S>(weight_buf));
  if (layer.has_bias) check_same("the buffer of the bias", layer.bias_buf, rounded<S>(bias_buf));
}

}  // namespace

TEST(updates_of_16_bit_parameters_are_those_of_float_rounded_once) {
  for_both_types([](auto type) {
    using S = decltype(type);
    uint64_t seed = 0;
    for (const SgdOptions& options : option_sets(0.1)) {
      for (const int64_t I : {1, 7, 8, 17, 33, 64, 67}) {
        const Sizes s{1, I, 3, ++seed};
        constexpr int64_t kChunks = 3;
        const int64_t stride = s.O * partial_stride(I);
        std::vector<float> grad, partial;
        std::vector<double> dbias;
        dbias.reserve(static_cast<size_t>(kChunks * s.O));
        for (int64_t k = 0; k < s.O * I; ++k) grad.push_back(random_value<float>(seed, k));
        for (int64_t k = 0; k < kChunks * stride; ++k) {
          partial.push_back(random_value<float>(seed + 1, k));
        }
        for (int64_t k = 0; k < kChunks * s.O; ++k) {
          dbias.push_back(random_value<double>(seed + 2, k));
        }
        for_each_isa([&](const char* isa) {
          char text[160];
          append(text, sizeof(text), options);
          describe("%s, %s, I %lld, %s", type_name<S>(), isa, static_cast<long long>(I), text);
          check_updates<S>(
              s, options,
              [&](const LinearParams<S>& p) {
                widening_kernels<S>().sgd({p.weight, grad.data(), p.weight_buf, s.O * I, options});
                update_bias<S>(dbias.data(), kChunks, s.O, p);
              },
              [&](const LinearParams<float>& p) {
                kernels<float>().sgd({p.weight, grad.data(), p.weight_buf, s.O * I, options});
                update_bias<float>(dbias.data(), kChunks, s.O, p);
              });
          check_updates<S>(
              s, options,
              [&](const LinearParams<S>& p) {
                widening_kernels<S>().one_pass_update({partial.data(), kChunks, stride, p}, 0, s.O,
                                                      0, I);
                update_bias<S>(dbias.data(), kChunks, s.O, p);
              },
              [&](const LinearParams<float>& p) {
                kernels<float>().one_pass_update({partial.data(), kChunks, stride, p}, 0, s.O, 0,
                                                 I);
                update_bias<float>(dbias.data(), kChunks, s.O, p);
              });
        });
      }
    }
  });
}

TEST(widen_and_narrow_take_rows_of_any_length_and_nothing_beside_them) {
  for_both_types([](auto type) {
    using S = decltype(type);
    for (int64_t columns = 0; columns <= kMaxSmall; ++columns) {
      const Sizes s{3, columns, 1, static_cast<uint64_t>(columns)};
      for_each_isa([&](const char* isa) {
        describe("%s, %s, %lld columns", type_name<S>(), isa, static_cast<long long>(columns));
        const Data<S> data(s);
        Buffer<float> wide(s.rows * columns, s.seed);
        widening_kernels<S>().widen({data.x.data(), data.x_stride, s.rows, columns, wide.data()});
        check_same("the widened rows", wide,
                   widened(data.x.data(), s.rows, columns, data.x_stride));
        Buffer<S> back(s.rows * columns, s.seed + 1);
        wide.fill_random(s.seed);
        widening_kernels<S>().narrow(wide.data(), back.data(), back.n());
        check_same("the rounded rows", back, rounded<S>(wide.copy()));
        data.check_unchanged();
      });
    }
  });
}
