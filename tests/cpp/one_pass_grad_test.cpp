// SPDX-License-Identifier: MIT
// One-pass for gradients without an update: dx beside the partial sums, sums without dW, and the
// sum of the partial dW.
#include <algorithm>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/policy.h"
#include "problem.h"

using namespace fused_step;
using namespace fused_step::cpu;
using namespace fused_step::test;

namespace {

constexpr double kScale = 2.0 / 3.0;
constexpr SgdOptions kNoOptions = {};

template <typename T>
OnePassChunk<T> chunk_of(const Data<T>& data, Layer<T>& layer, Partials<T>& partial, T* dx) {
  return {data.rows(),
          layer.weight.data(),
          layer.bias_or_null(),
          layer.s.I,
          layer.s.O,
          kScale,
          partial.get(),
          dx};
}

// dx[b, i] = sum_o dy[b, o] W[o, i].
template <typename T>
Bounds<T> reference_dx(const Data<T>& data, const Layer<T>& layer) {
  const int64_t I = data.s.I, O = data.s.O;
  Bounds<T> dx;
  for (int64_t b = 0; b < data.s.rows; ++b) {
    Bounds<T> dy;
    for (int64_t o = 0; o < O; ++o) {
      Sum<T> product;
      for (int64_t i = 0; i < I; ++i) {
        product.add(Bounded<T>{data.x[b * data.x_stride + i], 0} *
                    Bounded<T>{layer.weight[o * I + i], 0});
      }
      Bounded<T> r = product.total();
      if (layer.has_bias) r = r + Bounded<T>{layer.bias[o], 0};
      r = r - Bounded<T>{data.target[b * data.target_stride + o], 0};
      dy.push_back(r * Bounded<T>(kScale));
    }
    for (int64_t i = 0; i < I; ++i) {
      Sum<T> sum;
      for (int64_t o = 0; o < O; ++o) {
        sum.add(dy[static_cast<size_t>(o)] * Bounded<T>{layer.weight[o * I + i], 0});
      }
      dx.push_back(sum.total());
    }
  }
  return dx;
}

template <typename T>
void test_dx(const Sizes& s) {
  const Data<T> data(s);
  Layer<T> layer(s, kNoOptions, kNoOptions);
  const Bounds<T> want = reference_dx(data, layer);
  for_each_isa([&](const char* isa) {
    describe("%s, %s, B %lld, I %lld, O %lld, seed %llu", type_name<T>(), isa,
             static_cast<long long>(s.rows), static_cast<long long>(s.I),
             static_cast<long long>(s.O), static_cast<unsigned long long>(s.seed));
    const auto run = [](const OnePassChunk<T>& chunk) {
      poison_stack();
      kernels<T>().one_pass_chunk(chunk);
    };
    Partials<T> alone(s.O, s.I, s.seed), beside(s.O, s.I, s.seed), sums(s.O, s.I, s.seed);
    Buffer<T> dx(s.rows * s.I, hash(s.seed, 40)), only(s.rows * s.I, hash(s.seed, 41));
    run(chunk_of<T>(data, layer, alone, nullptr));
    run(chunk_of<T>(data, layer, beside, dx.data()));
    check_all_close<T>("dx", dx, want);
    check(dx.intact(), "wrote beside dx");
    check(beside.dweight.equals(alone.dweight.copy()), "dW is another one beside dx");

    OnePassChunk<T> without = chunk_of<T>(data, layer, sums, only.data());
    without.partial.dweight = nullptr;
    run(without);
    check(only.equals(dx.copy()), "dx is another one without dW");
    for (int64_t k = 0; k < sums.dweight.n(); ++k) {
      check(sums.dweight.is_guard(k), "wrote a dW that nobody asked for");
    }
    for (const Partials<T>* got : {&beside, &sums}) {
      check(got->dbias.equals(alone.dbias.copy()) && got->loss.equals(alone.loss.copy()),
            "loss or db depend on which gradients are made");
      got->check_intact();
    }
    data.check_unchanged();
    layer.check_intact();
  });
}

template <typename T>
void test_all_dx() {
  uint64_t seed = 3000000;
  for (const int64_t O : kOutputs) {
    for (int64_t I = 0; I <= kMaxSmall; ++I) {
      for (const int64_t rows : {0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33}) {
        test_dx<T>({rows, I, O, ++seed});
      }
    }
  }
  // Around tiles, and rows longer than a page.
  for (const int64_t I : {63, 64, 65, 129, 1025, 8193}) {
    const int64_t tile = tile_rows(I, sizeof(T));
    for (const int64_t rows : {tile - 1, tile, 2 * tile + 5}) {
      for (const int64_t O : {1, 5}) test_dx<T>({rows, I, O, ++seed});
    }
  }
}

}  // namespace

TEST(one_pass_chunk_gives_dx_of_every_small_size_float) { test_all_dx<float>(); }
TEST(one_pass_chunk_gives_dx_of_every_small_size_double) { test_all_dx<double>(); }

namespace {

template <typename T>
void test_sum(const Sizes& s, int64_t chunks) {
  const int64_t stride = partial_stride(s.I), chunk_stride = s.O * stride + 7;
  Buffer<T> partial(extent(chunks, s.O * stride, chunk_stride), hash(s.seed, 50));
  Bounds<T> want;
  for (int64_t k = 0; k < s.O * s.I; ++k) {
    Sum<T> sum;
    for (int64_t c = 0; c < chunks; ++c) {
      T& value = partial[c * chunk_stride + k / s.I * stride + k % s.I];
      value = random_value<T>(hash(s.seed, 51), c * s.O * s.I + k);
      sum.add({value, 0});
    }
    want.push_back(sum.total());
  }
  for_each_isa([&](const char* isa) {
    describe("%s, %s, I %lld, O %lld, %lld chunks", type_name<T>(), isa,
             static_cast<long long>(s.I), static_cast<long long>(s.O),
             static_cast<long long>(chunks));
    Buffer<T> whole(s.O * s.I, hash(s.seed, 52)), parts(s.O * s.I, hash(s.seed, 53));
    kernels<T>().one_pass_grad({partial.data(), chunks, chunk_stride, whole.data(), s.I}, 0, s.O, 0,
                               s.I);
    check_all_close<T>("dW", whole, want);
    for (int64_t o = 0; o < s.O; ++o) {
      for (int64_t i = 0; i < s.I; i += 16) {
        kernels<T>().one_pass_grad({partial.data(), chunks, chunk_stride, parts.data(), s.I}, o,
                                   o + 1, i, std::min<int64_t>(i + 16, s.I));
      }
    }
    check(parts.equals(whole.copy()), "another sum in parts");
    check(whole.intact() && parts.intact(), "wrote beside dW");
  });
}

template <typename T>
void test_sums() {
  uint64_t seed = 4000000;
  for (int64_t I = 0; I <= 4 * kMaxSmall; ++I) {
    for (const int64_t chunks : {1, 2, 64}) test_sum<T>({0, I, 1 + I % 3, ++seed}, chunks);
  }
}

}  // namespace

TEST(one_pass_grad_adds_chunks_of_every_small_size_float) { test_sums<float>(); }
TEST(one_pass_grad_adds_chunks_of_every_small_size_double) { test_sums<double>(); }
