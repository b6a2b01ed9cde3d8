// SPDX-License-Identifier: MIT
// Chunks on several threads, cut as the binding cuts them for at::parallel_for: what one thread
// writes no other one touches, and the bits are those of one thread.
#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <thread>
#include <tuple>
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

constexpr int64_t kThreads[] = {1, 2, 3, 7};

// body(begin, end, thread) over [0, n), in one contiguous part for each of at most `threads`
// threads.
template <typename Body>
void parallel_for(int64_t threads, int64_t n, const Body& body) {
  const int64_t part = ceil_div(std::max<int64_t>(n, 1), threads);
  std::vector<std::thread> running;
  for (int64_t t = 0; t < threads; ++t) {
    const int64_t begin = std::min(t * part, n), end = std::min(begin + part, n);
    if (begin < end) running.emplace_back([&body, begin, end, t] { body(begin, end, t); });
  }
  for (std::thread& thread : running) thread.join();
}

// The results of run(threads), a vector of numbers, are the same for all numbers of threads.
template <typename Run>
void check_same_on_all_threads(const char* what, const Sizes& s, const Run& run) {
  for_each_isa([&](const char* isa) {
    const auto alone = run(int64_t{1});
    for (const int64_t threads : kThreads) {
      describe("%s, %s, B %lld, I %lld, O %lld on %lld threads", what, isa,
               static_cast<long long>(s.rows), static_cast<long long>(s.I),
               static_cast<long long>(s.O), static_cast<long long>(threads));
      const auto got = run(threads);
      const bool same = got.size() == alone.size() &&
                        std::memcmp(got.data(), alone.data(), got.size() * sizeof(got[0])) == 0;
      check(same, "other bits than on one thread");
    }
  });
}

template <typename T>
std::vector<double> numbers(std::initializer_list<const Buffer<T>*> buffers) {
  std::vector<double> all;
  for (const Buffer<T>* b : buffers) {
    for (int64_t k = 0; k < b->n(); ++k) {
      if constexpr (kIs16Bit<T>) {
        all.push_back(widen((*b)[k]));
      } else {
        all.push_back((*b)[k]);
      }
    }
  }
  return all;
}

// Blocks of a weight, a few columns of a row each, as tasks.
template <typename Task>
void for_each_weight(int64_t threads, int64_t O, int64_t I, const Task& task) {
  constexpr int64_t kColumns = 32;
  const int64_t blocks = ceil_div(I, kColumns);
  parallel_for(threads, O * blocks, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = k % blocks * kColumns;
      task(k / blocks, i, std::min(i + kColumns, I));
    }
  });
}

constexpr SgdOptions kOptions = {.lr = 0.1, .momentum = 0.9, .weight_decay = 0.1};
constexpr int64_t kChunks = 8;

// A one-pass step: partial sums of chunks of rows, then the update of blocks of W.
template <typename T>
void test_one_pass(const Sizes& s) {
  const Data<T> data(s);
  check_same_on_all_threads("one-pass", s, [&](int64_t threads) {
    Layer<T> layer(s, kOptions, kOptions);
    Buffer<T> dx(s.rows * s.I, 0);
    const int64_t rows = rows_per_chunk(s.rows, kChunks), count = ceil_div(s.rows, rows);
    const int64_t chunk_stride = s.O * partial_stride(s.I), sums_stride = s.O + 1;
    Buffer<T> dweight(count * chunk_stride, 1);
    Buffer<double> sums(count * sums_stride, 1);
    parallel_for(threads, count, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t c = begin; c < end; ++c) {
        kernels<T>().one_pass_chunk(
            {data.rows(c * rows, std::min(rows, s.rows - c * rows)),
             layer.weight.data(),
             layer.bias_or_null(),
             s.I,
             s.O,
             1.0,
             {dweight.data() + c * chunk_stride, sums.data() + c * sums_stride,
              sums.data() + c * sums_stride + s.O},
             dx.data() + c * rows * s.I});
      }
    });
    Buffer<T> grad(s.O * s.I, 1);
    for_each_weight(threads, s.O, s.I, [&](int64_t o, int64_t i, int64_t i_end) {
      kernels<T>().one_pass_grad({dweight.data(), count, chunk_stride, grad.data(), s.I}, o, o + 1,
                                 i, i_end);
    });
    for_each_weight(threads, s.O, s.I, [&](int64_t o, int64_t i, int64_t i_end) {
      kernels<T>().one_pass_update({dweight.data(), count, chunk_stride, layer.params()}, o, o + 1,
                                   i, i_end);
    });
    update_bias<T>(sums.data(), count, sums_stride, layer.params());
    data.check_unchanged();
    layer.check_intact();
    check(dweight.intact() && sums.intact() && dx.intact() && grad.intact(), "wrote beside");
    return numbers<T>({&layer.weight, &layer.bias, &layer.weight_buf, &dx, &grad});
  });
}

template <typename T>
void test_one_pass_of_all_sizes() {
  uint64_t seed = 20000000;
  for (const auto& [rows, I, O] : {std::tuple<int64_t, int64_t, int64_t>{7, 1, 1},
                                   {129, 33, 1},
                                   {200, 70, 3},
                                   {131, 17, 32},
                                   {16 * kChunks, 64, 8}}) {
    test_one_pass<T>({rows, I, O, ++seed});
  }
}

}  // namespace

TEST(threads_of_one_pass_have_the_bits_of_one_thread_float) { test_one_pass_of_all_sizes<float>(); }
TEST(threads_of_one_pass_have_the_bits_of_one_thread_double) {
  test_one_pass_of_all_sizes<double>();
}

namespace {

// What the gemm plan does beside its GEMMs: residuals of chunks of rows, each in place, and the
// update of all elements in tasks of one size.
template <typename T>
void test_gemm_passes(const Sizes& s) {
  const Data<T> data(s);
  check_same_on_all_threads("the passes beside the GEMMs", s, [&](int64_t threads) {
    Layer<T> layer(s, kOptions, kOptions);
    Buffer<T> y(s.rows * s.O, 1);
    y.fill_random(hash(s.seed, 60));
    const int64_t rows = rows_per_chunk(s.rows, kChunks), count = ceil_div(s.rows, rows);
    const int64_t sums_stride = s.O + 1;
    Buffer<double> sums(count * sums_stride, 1);
    parallel_for(threads, count, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t row = c * rows;
        kernels<T>().residual_chunk(
            {y.data() + row * s.O, data.target.data() + row * data.target_stride,
             data.target_stride, layer.bias_or_null(), std::min(rows, s.rows - row), s.O, 1.0,
             sums.data() + c * sums_stride, sums.data() + c * sums_stride + s.O});
      }
    });
    Buffer<T> grad(s.O * s.I, 1);
    grad.fill_random(hash(s.seed, 61));
    constexpr int64_t kTask = 48;
    const int64_t n = s.O * s.I;
    parallel_for(threads, ceil_div(n, kTask), [&](int64_t first, int64_t last, int64_t) {
      const int64_t begin = first * kTask, end = std::min(last * kTask, n);
      kernels<T>().sgd({layer.weight.data() + begin, grad.data() + begin,
                        layer.weight_buf.data() + begin, end - begin, layer.weight_options});
    });
    update_bias<T>(sums.data(), count, sums_stride, layer.params());
    data.check_unchanged();
    layer.check_intact();
    check(y.intact() && sums.intact() && grad.intact(), "wrote beside");
    return numbers<T>({&layer.weight, &layer.bias, &layer.weight_buf, &y});
  });
}

}  // namespace

TEST(threads_of_the_passes_beside_gemm_have_the_bits_of_one_thread) {
  uint64_t seed = 21000000;
  for (const auto& [rows, I, O] :
       {std::tuple<int64_t, int64_t, int64_t>{5, 3, 7}, {129, 17, 33}, {200, 40, 70}}) {
    test_gemm_passes<float>({rows, I, O, ++seed});
    test_gemm_passes<double>({rows, I, O, seed});
  }
}

namespace {

// 16-bit data: W widened in parts, chunks that widen tiles into a panel of their thread's own, and
// the update of 16-bit W.
template <typename S>
void test_widened(const Sizes& s) {
  const Data<S> data(s);
  check_same_on_all_threads("16-bit one-pass", s, [&](int64_t threads) {
    Layer<S> layer(s, kOptions, kOptions);
    Buffer<float> weight(s.O * s.I, 1), bias(s.O, 1);
    const auto in_float = [&](const S* from, int64_t n, float* to) {
      parallel_for(threads, n, [&](int64_t begin, int64_t end, int64_t) {
        const int64_t count = end - begin;
        widening_kernels<S>().widen({from + begin, count, 1, count, to + begin});
      });
    };
    in_float(layer.weight.data(), s.O * s.I, weight.data());
    in_float(layer.bias.data(), s.O, bias.data());
    const int64_t rows = rows_per_chunk(s.rows, kChunks), count = ceil_div(s.rows, rows);
    const int64_t chunk_stride = s.O * partial_stride(s.I), sums_stride = s.O + 1;
    const int64_t panel = widened_panel(s.I, s.O);
    Buffer<float> dweight(count * chunk_stride, 1), panels(panel * threads, 0);
    Buffer<double> sums(count * sums_stride, 1);
    Buffer<Unscaled<S>> dx(s.rows * s.I, 1);
    parallel_for(threads, count, [&](int64_t begin, int64_t end, int64_t thread) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t row = c * rows;
        WidenedChunk<S> chunk{};
        chunk.x = data.x.data() + row * data.x_stride;
        chunk.x_stride = data.x_stride;
        chunk.target = data.target.data() + row * data.target_stride;
        chunk.target_stride = data.target_stride;
        chunk.dx = dx.data() + row * s.I;
        chunk.panel = panels.data() + panel * thread;
        chunk.chunk.batch.rows = std::min(rows, s.rows - row);
        chunk.chunk.weight = weight.data();
        chunk.chunk.bias = bias.data();
        chunk.chunk.I = s.I;
        chunk.chunk.O = s.O;
        chunk.chunk.dy_scale = 1.0;
        chunk.chunk.partial = {dweight.data() + c * chunk_stride, sums.data() + c * sums_stride,
                               sums.data() + c * sums_stride + s.O};
        widening_kernels<S>().one_pass_chunk(chunk);
      }
    });
    for_each_weight(threads, s.O, s.I, [&](int64_t o, int64_t i, int64_t i_end) {
      widening_kernels<S>().one_pass_update({dweight.data(), count, chunk_stride, layer.params()},
                                            o, o + 1, i, i_end);
    });
    update_bias<S>(sums.data(), count, sums_stride, layer.params());
    data.check_unchanged();
    layer.check_intact();
    check(dweight.intact() && sums.intact() && dx.intact() && panels.intact(), "wrote beside");
    std::vector<double> all = numbers<S>({&layer.weight, &layer.bias, &layer.weight_buf});
    const std::vector<double> of_dx = numbers<Unscaled<S>>({&dx});
    all.insert(all.end(), of_dx.begin(), of_dx.end());
    return all;
  });
}

}  // namespace

TEST(threads_of_16_bit_one_pass_have_the_bits_of_one_thread) {
  uint64_t seed = 22000000;
  for (const auto& [rows, I, O] : {std::tuple<int64_t, int64_t, int64_t>{7, 1, 1},
                                   {129, 33, 1},
                                   {200, 70, 3},
                                   {131, 17, 32}}) {
    test_widened<BFloat16>({rows, I, O, ++seed});
    test_widened<Float16>({rows, I, O, seed});
  }
}

namespace {

struct Tensors {
  std::vector<int64_t> sizes;
  std::vector<std::unique_ptr<Buffer<float>>> param, grad, buf;

  explicit Tensors(const std::vector<int64_t>& sizes) : sizes(sizes) {
    for (size_t k = 0; k < sizes.size(); ++k) {
      for (auto* list : {&param, &grad, &buf}) {
        list->push_back(std::make_unique<Buffer<float>>(sizes[k], hash(k, list == &grad)));
        list->back()->fill_random(hash(k, 70 + static_cast<uint64_t>(list == &grad)));
      }
    }
  }
};

}  // namespace

TEST(threads_of_the_optimizer_share_one_range_of_all_tensors) {
  const std::vector<int64_t> sizes = {1, 1000, 0, 37, 16, 513, 2};
  int64_t total = 0;
  for (const int64_t n : sizes) total += n;
  const SgdRule rule{kOptions, /*unscale=*/0.5, /*clip=*/0.25, GradAfter::kZero};
  check_same_on_all_threads("sgd", {0, 0, 0, 0}, [&](int64_t threads) {
    Tensors t(sizes);
    parallel_for(threads, total, [&](int64_t begin, int64_t end, int64_t) {
      int64_t first = 0;
      for (size_t k = 0; k < sizes.size(); first += sizes[k++]) {
        const int64_t from = std::max(begin, first), to = std::min(end, first + sizes[k]);
        if (from >= to) continue;
        const int64_t at = from - first;
        sgd_kernels().update[static_cast<int>(SgdStorage::kFloat)](
            {t.param[k]->data() + at, t.grad[k]->data() + at, t.buf[k]->data() + at, to - from,
             false},
            rule);
      }
    });
    std::vector<double> all;
    for (size_t k = 0; k < sizes.size(); ++k) {
      check(t.param[k]->intact() && t.grad[k]->intact() && t.buf[k]->intact(), "wrote beside");
      const std::vector<double> one =
          numbers<float>({t.param[k].get(), t.grad[k].get(), t.buf[k].get()});
      all.insert(all.end(), one.begin(), one.end());
    }
    return all;
  });
}

TEST(threads_of_a_norm_have_the_bits_of_one_thread) {
  constexpr int64_t n = 5000, kTask = 300;
  Buffer<float> grad(n, 0);
  grad.fill_random(7);
  check_same_on_all_threads("the norm", {0, 0, 0, 0}, [&](int64_t threads) {
    std::vector<double> sums(static_cast<size_t>(ceil_div(n, kTask)));
    const auto count = static_cast<int64_t>(sums.size());
    parallel_for(threads, count, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t c = begin; c < end; ++c) {
        sums[static_cast<size_t>(c)] =
            sgd_kernels().sum_squares[static_cast<int>(SgdStorage::kFloat)](
                grad.data() + c * kTask, std::min(kTask, n - c * kTask));
      }
    });
    return sums;
  });
}

// Two runs of whole steps, each with parameters and a workspace of its own: nothing is shared but
// the tables of loops.
TEST(serial_steps_of_two_threads_do_not_disturb_each_other) {
  const Sizes s{37, 13, 2, 23000000};
  const Data<float> data(s);
  struct Trained {
    Layer<float> layer;
    Partials<float> partial;
    Buffer<float> losses;
    explicit Trained(const Sizes& s)
        : layer(s, kOptions, kOptions), partial(s.O, s.I, 1), losses(40, 1) {}
  };
  const auto train = [&](Trained& t) {
    run_serial_steps<float>({data.rows(), 5, 0, t.losses.n(), Reduction::kMean, t.layer.params(),
                             t.partial.get(), t.losses.data()});
  };
  for_each_isa([&](const char* isa) {
    describe("serial steps, %s", isa);
    Trained alone(s), first(s), second(s);
    train(alone);
    parallel_for(2, 2,
                 [&](int64_t begin, int64_t, int64_t) { train(begin == 0 ? first : second); });
    for (const Trained* t : {&first, &second}) {
      check(t->layer.weight.equals(alone.layer.weight.copy()) &&
                t->layer.bias.equals(alone.layer.bias.copy()) &&
                t->losses.equals(alone.losses.copy()),
            "other bits beside another thread");
      t->layer.check_intact();
      t->partial.check_intact();
    }
  });
  data.check_unchanged();
}
