// SPDX-License-Identifier: MIT
// One-pass: the partial sums of a chunk, and the update from them.
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "check.h"
#include "cpu/bias.h"
#include "cpu/kernels.h"
#include "cpu/policy.h"
#include "problem.h"

using namespace fused_step;
using namespace fused_step::cpu;
using namespace fused_step::test;

namespace {

template <typename T>
OnePassChunk<T> chunk_of(const Rows<T>& rows, Layer<T>& layer, double dy_scale,
                         Partials<T>& partial) {
  return {rows,     layer.weight.data(), layer.bias_or_null(), layer.s.I, layer.s.O,
          dy_scale, partial.get()};
}

template <typename T>
void run_chunk(const OnePassChunk<T>& chunk) {
  poison_stack();
  kernels<T>().one_pass_chunk(chunk);
}

template <typename T>
void check_sums(Partials<T>& got, const ReferenceSums<T>& want, int64_t I, int64_t O) {
  for (int64_t o = 0; o < O; ++o) {
    for (int64_t i = 0; i < I; ++i) {
      check_close<T>("dweight", o * I + i, got.dweight[o * partial_stride(I) + i],
                     want.dweight[static_cast<size_t>(o * I + i)]);
    }
    check_close<T>("dbias", o, got.dbias[o], want.dbias[static_cast<size_t>(o)]);
  }
  check_close<T>("loss", 0, got.loss[0], want.loss);
  got.check_intact();
}

void describe_case(const char* type, const char* isa, const Sizes& s) {
  describe("%s, %s, B %lld, I %lld, O %lld, seed %llu", type, isa, static_cast<long long>(s.rows),
           static_cast<long long>(s.I), static_cast<long long>(s.O),
           static_cast<unsigned long long>(s.seed));
}

constexpr SgdOptions kNoOptions = {};

template <typename T>
void test_chunk(const Sizes& s) {
  Data<T> data(s);
  Layer<T> layer(s, kNoOptions, kNoOptions);
  const double dy_scale = s.rows == 0 ? std::numeric_limits<double>::infinity() : 2.0 / 3.0;
  const ReferenceSums<T> want =
      reference_sums<T>(data.rows(), s.I, s.O, exact(layer.weight),
                        layer.has_bias ? exact(layer.bias) : Bounds<T>(), Bounded<T>(dy_scale));
  const std::vector<T> weight = layer.weight.copy(), bias = layer.bias.copy();
  for_each_isa([&](const char* isa) {
    describe_case(type_name<T>(), isa, s);
    Partials<T> partial(s.O, s.I, s.seed);
    run_chunk(chunk_of(data.rows(), layer, dy_scale, partial));
    check_sums(partial, want, s.I, s.O);
    data.check_unchanged();
    check(layer.weight.equals(weight) && layer.bias.equals(bias), "W or b changed");
    layer.check_intact();
  });
}

template <typename T>
void test_small_chunks() {
  uint64_t seed = 0;
  for (const int64_t O : kOutputs) {
    for (int64_t I = 0; I <= kMaxSmall; ++I) {
      for (int64_t rows = 0; rows <= kMaxSmall; ++rows) test_chunk<T>({rows, I, O, ++seed});
    }
  }
  // Rows of up to four vectors, and one more element.
  for (int64_t I = kMaxSmall + 1; I <= 4 * 16 + 1; ++I) {
    for (int64_t rows = 0; rows <= 9; ++rows) test_chunk<T>({rows, I, 1, ++seed});
  }
  for (int64_t rows = 0; rows <= 3; ++rows) test_chunk<T>({rows, 3, 0, ++seed});
}

}  // namespace

TEST(one_pass_chunk_sums_rows_of_every_small_size_float) { test_small_chunks<float>(); }
TEST(one_pass_chunk_sums_rows_of_every_small_size_double) { test_small_chunks<double>(); }

namespace {

// One and two tiles, a row more and less; I where the number of rows in a tile changes, for both
// types, and long rows: 4 KiB, more than a page and odd, tiles of 8 rows and of the minimum. From
// kPrefetchMinBytes on the next tile is prefetched.
template <typename T>
void test_tiles() {
  uint64_t seed = 1000000;
  for (const int64_t I :
       {1,   7,   31,  32,  33,  42,  43,  63,  64,   65,   73,   85,   86,   127,  128, 129,
        170, 171, 255, 256, 257, 341, 512, 513, 1024, 1025, 4095, 4096, 4097, 8192, 8193}) {
    const int64_t tile = tile_rows(I, sizeof(T));
    const int64_t prefetched = ceil_div(kPrefetchMinBytes, I * static_cast<int64_t>(sizeof(T)));
    for (const int64_t rows : {tile - 1, tile, tile + 1, 2 * tile - 1, 2 * tile, 2 * tile + 1,
                               3 * tile + 5, prefetched - 1, prefetched + 3}) {
      for (const int64_t O : {1, 2, 5, 32}) {
        if (rows * I * O > (O == 1 ? 300000 : 150000)) continue;
        test_chunk<T>({rows, I, O, ++seed});
      }
    }
  }
}

}  // namespace

TEST(one_pass_chunk_sums_rows_around_tiles_and_prefetches_float) { test_tiles<float>(); }
TEST(one_pass_chunk_sums_rows_around_tiles_and_prefetches_double) { test_tiles<double>(); }

namespace {

// All rows are alike, so that rounding errors add up. Tiles bound the error: dW goes through a
// tile's rows and then through the tiles; loss and bias through a tile and then through additions
// in double, of which 2^29 round as much as one in float.
template <typename T>
void test_error_of_many_rows(int64_t O) {
  const int64_t rows = 200000, I = 3, tile = tile_rows(I, sizeof(T));
  const int64_t tiles = ceil_div(rows, tile);
  std::vector<T> x(static_cast<size_t>(rows * I), T(0.7)), target(static_cast<size_t>(rows * O));
  const Rows<T> data{x.data(), target.data(), I, O, rows};
  const Sizes s{rows, I, O, 0};
  Layer<T> layer(s, kNoOptions, kNoOptions);
  layer.has_bias = false;
  const ReferenceSums<T> want =
      reference_sums<T>(data, I, O, exact(layer.weight), {}, Bounded<T>(0.5L),
                        {tile + tiles, sizeof(T) == 4 ? tile + 2 : tile + tiles});
  for_each_isa([&](const char* isa) {
    describe_case(type_name<T>(), isa, s);
    Partials<T> partial(O, I, 0);
    run_chunk(chunk_of(data, layer, 0.5, partial));
    check_sums(partial, want, I, O);
  });
}

}  // namespace

TEST(one_pass_chunk_error_grows_with_the_tile_and_not_with_the_rows) {
  for (const int64_t O : {1, 9}) {
    test_error_of_many_rows<float>(O);
    test_error_of_many_rows<double>(O);
  }
}

namespace {

// One NaN or infinity somewhere: NaN and infinities exactly where the reference has them.
template <typename T>
void test_special_values(int64_t rows, int64_t I, int64_t O) {
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  uint64_t seed = 2000000;
  const int64_t target = rows * I, weight = target + rows * O, bias = weight + O * I;
  for (const T special : {inf, -inf, nan}) {
    for (int64_t place = 0; place < bias + O; ++place) {
      const Sizes s{rows, I, O, ++seed};
      Data<T> data(s);
      Layer<T> layer(s, kNoOptions, kNoOptions);
      layer.has_bias = true;
      if (place < target) {
        data.x[place / I * data.x_stride + place % I] = special;
      } else if (place < weight) {
        const int64_t k = place - target;
        data.target[k / O * data.target_stride + k % O] = special;
      } else if (place < bias) {
        layer.weight[place - weight] = special;
      } else {
        layer.bias[place - bias] = special;
      }
      data.remember();
      const ReferenceSums<T> want = reference_sums<T>(data.rows(), I, O, exact(layer.weight),
                                                      exact(layer.bias), Bounded<T>(0.5L));
      for_each_isa([&](const char* isa) {
        describe("%s, %s, B %lld, I %lld, O %lld, %g at %lld", type_name<T>(), isa,
                 static_cast<long long>(rows), static_cast<long long>(I), static_cast<long long>(O),
                 static_cast<double>(special), static_cast<long long>(place));
        Partials<T> partial(O, I, s.seed);
        run_chunk(chunk_of(data.rows(), layer, 0.5, partial));
        check_sums(partial, want, I, O);
      });
    }
  }
}

}  // namespace

TEST(one_pass_chunk_has_nan_and_inf_exactly_where_the_reference_has) {
  for (const int64_t O : {1, 3}) {
    for (const int64_t I : {1, 3, 5, 9, 17, 33, 50}) {
      for (const int64_t rows : {1, 3, 9}) {
        test_special_values<float>(rows, I, O);
        test_special_values<double>(rows, I, O);
      }
    }
  }
}

namespace {

template <typename T>
void test_update(const Sizes& s, int64_t chunks, const SgdOptions& options) {
  const int64_t stride = partial_stride(s.I), chunk_stride = s.O * stride + 7;
  // Of the padding only what the kernel above writes could be read: it stays NaN.
  Buffer<T> partial(extent(chunks, s.O * stride, chunk_stride), hash(s.seed, 30));
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t k = 0; k < s.O * s.I; ++k) {
      partial[c * chunk_stride + k / s.I * stride + k % s.I] =
          random_value<T>(hash(s.seed, 31), c * s.O * s.I + k);
    }
  }
  const std::vector<T> partial_before = partial.copy();
  Layer<T> start(s, options, kNoOptions);
  ReferenceLayer<T> want(start);
  Bounds<T> grads;
  for (int64_t k = 0; k < s.O * s.I; ++k) {
    Sum<T> grad;
    for (int64_t c = 0; c < chunks; ++c) {
      grad.add({partial[c * chunk_stride + k / s.I * stride + k % s.I], 0});
    }
    grads.push_back(grad.total());
    const size_t at = static_cast<size_t>(k);
    torch_sgd(want.weight[at], grads[at], want.weight_buf[at], options);
  }
  char text[160];
  append(text, sizeof(text), options);
  for_each_isa([&](const char* isa) {
    describe("%s, %s, I %lld, O %lld, %lld chunks, %s", type_name<T>(), isa,
             static_cast<long long>(s.I), static_cast<long long>(s.O),
             static_cast<long long>(chunks), text);
    const auto update = [&](Layer<T>& layer, int64_t o_begin, int64_t o_end, int64_t i_begin,
                            int64_t i_end) {
      kernels<T>().one_pass_update({partial.data(), chunks, chunk_stride, layer.params()}, o_begin,
                                   o_end, i_begin, i_end);
    };
    Layer<T> whole(s, options, kNoOptions);
    update(whole, 0, s.O, 0, s.I);
    check_layer(whole, want);
    check(partial.equals(partial_before) && partial.intact(), "partial sums changed");
    if (options.momentum == 0) {
      check(whole.weight_buf.equals(start.weight_buf.copy()), "a buffer without momentum changed");
    }
    // Split at a vector's boundary as threads split it, and a part alone.
    const int64_t middle = s.I / 2 / 16 * 16;
    Layer<T> split(s, options, kNoOptions);
    for (int64_t o = s.O; o-- > 0;) {
      update(split, o, o + 1, middle, s.I);
      update(split, o, o + 1, 0, middle);
    }
    check_layer(split, want);
    Layer<T> nothing(s, options, kNoOptions);
    update(nothing, 0, s.O, middle, middle);
    update(nothing, 0, 0, 0, s.I);
    check(nothing.weight.equals(start.weight.copy()), "an empty range was updated");
  });
}

}  // namespace

TEST(one_pass_update_adds_the_chunks_in_order_and_applies_sgd) {
  uint64_t seed = 3000000;
  const std::vector<SgdOptions> sets = option_sets(0.1);
  for (const int64_t O : {1, 2, 3}) {
    for (int64_t I = 0; I <= 8 * 16 + 1; ++I) {
      for (const int64_t chunks : {1, 2, 5}) {
        // The sets in turn; for some sizes all of them.
        const bool all = O == 2 && chunks == 2 && (I % 19 == 0 || I == 1 || I == 65);
        for (size_t k = 0; k < (all ? sets.size() : 1); ++k) {
          ++seed;
          const SgdOptions& options = sets[all ? k : seed % sets.size()];
          test_update<float>({1, I, O, seed}, chunks, options);
          test_update<double>({1, I, O, seed}, chunks, options);
        }
      }
    }
  }
}

namespace {

template <typename T>
void test_update_of_any_columns() {
  const SgdOptions options = {.lr = 0.1, .momentum = 0.9};
  for (const int64_t I : {1, 5, 16, 33, 70}) {
    const Sizes s{1, I, 2, 77};
    Buffer<T> partial(s.O * partial_stride(I), 0);
    partial.fill_random(1);
    for_each_isa([&](const char* isa) {
      Layer<T> start(s, options, kNoOptions);
      const auto update = [&](Layer<T>& layer, int64_t i_begin, int64_t i_end) {
        kernels<T>().one_pass_update({partial.data(), 1, 0, layer.params()}, 0, s.O, i_begin,
                                     i_end);
      };
      for (int64_t begin = 0; begin <= I; ++begin) {
        // A vector's first_lanes shifts by its length: at most 31 columns are left over.
        for (int64_t end = std::max(begin, I - 15); end <= I; ++end) {
          describe("%s, %s, I %lld, columns %lld to %lld", type_name<T>(), isa,
                   static_cast<long long>(I), static_cast<long long>(begin),
                   static_cast<long long>(end));
          Layer<T> layer(s, options, kNoOptions);
          update(layer, begin, end);
          for (int64_t k = 0; k < s.O * I; ++k) {
            const bool inside = begin <= k % I && k % I < end;
            check((layer.weight[k] != start.weight[k]) == inside,
                  inside ? "column %lld was not updated" : "column %lld was updated",
                  static_cast<long long>(k % I));
          }
        }
      }
    });
  }
}

}  // namespace

TEST(one_pass_update_changes_the_columns_asked_for_and_no_others) {
  test_update_of_any_columns<float>();
  test_update_of_any_columns<double>();
}

namespace {

// What the order of a sum over chunks can change is bounded as the sum itself; the order in which
// the chunks are computed changes nothing.
template <typename T>
void test_chunked_step(const Sizes& s, int64_t chunks) {
  const int64_t rows = rows_per_chunk(s.rows, chunks), count = ceil_div(s.rows, rows);
  const int64_t chunk_stride = s.O * partial_stride(s.I), sums_stride = s.O + 1;
  const SgdOptions of_weight = pick_options(s.seed, 0.1), of_bias = pick_options(s.seed + 5, 0.1);
  Data<T> data(s);
  const double scale = static_cast<double>(loss_scale(Reduction::kMean, s.rows, s.O));
  Layer<T> start(s, of_weight, of_bias);
  ReferenceLayer<T> want(start);
  const Bounded<T> want_loss = want.step(data.rows(), Reduction::kMean);
  for_each_isa([&](const char* isa) {
    std::vector<T> first_weight, first_bias;
    double first_loss = 0;
    for (int order = 0; order < 3; ++order) {
      describe("%s, %s, B %lld, I %lld, O %lld in %lld chunks, order %d", type_name<T>(), isa,
               static_cast<long long>(s.rows), static_cast<long long>(s.I),
               static_cast<long long>(s.O), static_cast<long long>(count), order);
      Layer<T> layer(s, of_weight, of_bias);
      Buffer<T> dweight(count * chunk_stride, hash(s.seed, 40 + static_cast<uint64_t>(order)));
      Buffer<double> sums(count * sums_stride, hash(s.seed, 50 + static_cast<uint64_t>(order)));
      for (int64_t k = 0; k < count; ++k) {
        const int64_t odd_first = 2 * k + 1 < count ? 2 * k + 1 : 2 * (k - count / 2);
        const int64_t c = order == 0 ? k : order == 1 ? count - 1 - k : odd_first;
        run_chunk<T>({data.rows(c * rows, std::min(rows, s.rows - c * rows)),
                      layer.weight.data(),
                      layer.bias_or_null(),
                      s.I,
                      s.O,
                      2 * scale,
                      {dweight.data() + c * chunk_stride, sums.data() + c * sums_stride,
                       sums.data() + c * sums_stride + s.O}});
      }
      kernels<T>().one_pass_update({dweight.data(), count, chunk_stride, layer.params()}, 0, s.O, 0,
                                   s.I);
      update_bias<T>(sums.data(), count, sums_stride, layer.params());
      double loss = 0;
      for (int64_t c = 0; c < count; ++c) loss += sums[c * sums_stride + s.O];
      check(dweight.intact() && sums.intact(), "wrote beside the partial sums");
      check_layer(layer, want);
      check_close<T>("loss", 0, loss * scale, want_loss);
      if (order == 0) {
        check_bound_sees_a_change(start.weight.copy(), want.weight);
        first_weight = layer.weight.copy();
        first_bias = layer.bias.copy();
        first_loss = loss;
      } else {
        check(layer.weight.equals(first_weight) && layer.bias.equals(first_bias) &&
                  loss == first_loss,
              "the bits depend on the order in which chunks are computed");
      }
    }
  });
}

}  // namespace

TEST(chunks_add_up_to_the_whole_batch_with_the_same_bits_in_any_order) {
  uint64_t seed = 4000000;
  for (const auto& [I, O] : {std::pair<int64_t, int64_t>{1, 1},
                             {13, 1},
                             {64, 1},
                             {100, 1},
                             {7, 3},
                             {33, 5},
                             {64, 8},
                             {17, 32}}) {
    for (const int64_t chunks : {1, 2, 3, 8}) {
      for (const int64_t rows : {16 * chunks, 16 * chunks + 1, 100 * chunks - 3}) {
        test_chunked_step<float>({rows, I, O, ++seed}, chunks);
        test_chunked_step<double>({rows, I, O, ++seed}, chunks);
      }
    }
  }
}

TEST(update_bias_sums_the_chunks_and_leaves_out_a_missing_bias) {
  uint64_t seed = 5000000;
  for (const SgdOptions& options : option_sets(0.1)) {
    char text[160];
    append(text, sizeof(text), options);
    for (int64_t O = 0; O <= 9; ++O) {
      for (const int64_t chunks : {0, 1, 2, 5}) {
        const Sizes s{1, 0, O, ++seed};
        describe("O %lld, %lld chunks, %s", static_cast<long long>(O),
                 static_cast<long long>(chunks), text);
        Buffer<double> dbias(extent(chunks, O, O + 3), seed);
        for (int64_t k = 0; k < chunks * O; ++k) {
          dbias[k / O * (O + 3) + k % O] = random_value<double>(seed, k);
        }
        Layer<float> layer(s, kNoOptions, options), start(s, kNoOptions, options);
        ReferenceLayer<float> want(layer);
        ReferenceSums<float> sums{{}, Bounds<float>(static_cast<size_t>(O)), {}};
        for (int64_t o = 0; o < O; ++o) {
          Sum<float> sum;
          for (int64_t c = 0; c < chunks; ++c) {
            sum.add({static_cast<long double>(dbias[c * (O + 3) + o]), 0});
          }
          sums.dbias[static_cast<size_t>(o)] = sum.total(1);  // in double, rounded once
        }
        want.apply(sums);
        update_bias<float>(dbias.data(), chunks, O + 3, layer.params());
        check_layer(layer, want);
        const bool unused = options.momentum == 0 || !layer.has_bias;
        check(!unused || layer.bias_buf.equals(start.bias_buf.copy()), "an unused buffer changed");
        check(layer.has_bias || layer.bias.equals(start.bias.copy()), "no bias, but it changed");
      }
    }
  }
}
