// SPDX-License-Identifier: MIT
// The norm of a list's gradients.
#include <cmath>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "emulation/runtime.h"
#include "tensor_list.h"

using namespace fused_step;
using namespace fused_step::cuda;
using namespace fused_step::test;

namespace {

struct Found {
  double clip, norm;
};

// The launches of a norm, and their memory: NaN until it is written.
class Norm {
 public:
  Norm(int64_t partials, double max_norm, const float* grad_scale, double unscale, uint64_t seed)
      : partials_(partials, 0, seed),
        clip_(1, 0, seed + 1),
        norm_float_(1, 0, seed + 2),
        norm_double_(1, 0, seed + 3),
        max_norm_(max_norm),
        grad_scale_(grad_scale),
        unscale_(unscale) {}

  template <typename P>
  void launch(const SgdChunks& list, bool finishes) {
    check(launch_grad_norm<P>({list, partials_.data(), done_, finishes ? partials_.n() : 0,
                               finishes, &ticket_, unscale_, grad_scale_, max_norm_, clip_.data(),
                               norm_float_.data(), norm_double_.data()},
                              nullptr) == cudaSuccess,
          "refused");
    done_ += at_least(1, list.count);
    if (!finishes) check(clip_.untouched(), "written before the end");
  }
  Found found() const {
    check(done_ == partials_.n(), "launches");
    check(partials_.intact() && clip_.intact() && norm_float_.intact() && norm_double_.intact(),
          "wrote beside");
    check(ticket_ == 0, "the ticket was not given back");
    check(norm_float_[0] == static_cast<float>(norm_double_[0]) ||
              (std::isnan(norm_float_[0]) && std::isnan(norm_double_[0])),
          "float and double differ");
    return {clip_[0], norm_double_[0]};
  }

 private:
  Memory<double> partials_, clip_;
  Memory<float> norm_float_;
  Memory<double> norm_double_;
  unsigned ticket_ = 0;
  int64_t done_ = 0;
  double max_norm_;
  const float* grad_scale_;
  double unscale_;
};

template <typename P>
long double squares(const TensorList<P, P>& list) {
  long double sum = 0;
  for (const auto& t : list.tensors) {
    for (int64_t k = 0; k < t->grad.n(); ++k) sum += value(t->grad[k]) * value(t->grad[k]);
  }
  return sum;
}

void check_norm(const Found& found, long double sum, int64_t terms, double factor,
                double max_norm) {
  const long double norm = std::sqrt(sum) * factor;
  // Each term goes through its square, at most `terms` additions, the root and the factor.
  const long double bound = static_cast<long double>(terms + 4) * 0x1p-52L;
  check(std::fabs(found.norm - norm) <= norm * bound, "norm is %.17g, want %.17Lg", found.norm,
        norm);
  const long double clip = std::fmin(1.0L, max_norm / (norm + 1e-6L));
  check(std::fabs(found.clip - clip) <= clip * (bound + 0x1p-51L), "clip is %.17g, want %.17Lg",
        found.clip, clip);
}

template <typename P>
void test_norm(const std::vector<int64_t>& sizes, uint64_t seed) {
  const TensorList<P, P> list(sizes, seed);
  const float scale = 3.0f;
  const bool scaled = hash(seed, 50) % 2 == 0;
  const double unscale = hash(seed, 51) % 2 == 0 ? 1.0 : 0.3, max_norm = 0.5;
  const double factor = scaled ? static_cast<double>(1.0f / scale) : unscale;
  describe("norm <%s> of %lld chunks, factor %g, seed %llu", kName<P>,
           static_cast<long long>(list.pointers().count), factor,
           static_cast<unsigned long long>(seed));
  Norm norm(at_least(1, list.pointers().count), max_norm, scaled ? &scale : nullptr, unscale, seed);
  norm.launch<P>(list.pointers(), true);
  int64_t terms = 0;
  for (const auto& t : list.tensors) {
    terms += t->grad.n();
    check(t->grad.intact(), "wrote beside a gradient");
  }
  check_norm(norm.found(), squares(list), terms, factor, max_norm);
}

template <typename P>
void test_sizes(uint64_t seed) {
  for (const int64_t n : list_sizes<P>()) test_norm<P>({n}, ++seed);
  test_norm<P>(list_sizes<P>(), ++seed);
  // More partial sums than a block has threads.
  std::vector<int64_t> many(kListThreads + 3, 2);
  test_norm<P>(many, ++seed);
}

template <typename P>
void test_three_launches() {
  describe("a norm of three launches, the second of <%s>", kName<P>);
  const TensorList<float, float> first({5000, 3}, 1), last({1, 7}, 3);
  const TensorList<P, P> second({20000}, 2);
  const size_t partials = first.chunks.size() + second.chunks.size() + last.chunks.size();
  Norm norm(static_cast<int64_t>(partials), 0.25, nullptr, 1.0, 5);
  norm.launch<float>(first.pointers(), false);
  norm.launch<P>(second.pointers(), false);
  norm.launch<float>(last.pointers(), true);
  check_norm(norm.found(), squares(first) + squares(second) + squares(last), 25011, 1.0, 0.25);
}

}  // namespace

TEST(grad_norm_handles_every_size_and_alignment) { FOR_EACH_PARAM(test_sizes, 1000000); }

TEST(grad_norm_handles_no_tensor_at_all) { test_norm<float>({}, 1); }

TEST(grad_norm_is_over_all_launches) { FOR_EACH_PARAM(test_three_launches, ); }

TEST(grad_norm_does_not_overflow_and_keeps_nan) {
  for (const float special : {3e30f, HUGE_VALF, std::nanf("")}) {
    describe("norm with %g", static_cast<double>(special));
    const TensorList<float, float> list({40}, 6);
    list.tensors[0]->grad[7] = special;
    Norm norm(1, 0.5, nullptr, 1.0, 7);
    norm.launch<float>(list.pointers(), true);
    const Found found = norm.found();
    if (std::isnan(special)) {
      check(std::isnan(found.norm) && std::isnan(found.clip), "a NaN is lost");
    } else if (std::isinf(special)) {
      check(std::isinf(found.norm) && found.clip == 0.0, "infinity is lost");
    } else {
      check_norm(found, squares(list), 40, 1.0, 0.5);
    }
  }
}

TEST(grad_norm_gives_the_same_bits_in_any_order_of_blocks_and_at_any_address) {
  const std::string before = schedule_of_run;
  std::vector<double> first;
  for (const char* schedule : {"forward", "reverse", "random:1", "random:2"}) {
    for (const bool aligned : {false, true}) {
      emulation::use_schedule(schedule);
      describe("norm, %s, aligned %d", schedule, static_cast<int>(aligned));
      Memory<float> grad(5 * kListChunk<float> + 3, aligned ? 0 : 1, 0);
      grad.fill_random(12);
      for (int64_t k = 0; k < grad.n(); k += 7) grad[k] *= 1e4f;  // so that each sum is rounded
      const SgdTensor row{nullptr, grad.data(), nullptr, grad.n(), 0};
      std::vector<SgdChunk> chunks;
      for (int32_t c = 0; c < 6; ++c) chunks.push_back({0, c});
      Norm norm(6, 0.5, nullptr, 1.0, 7);
      norm.launch<float>({&row, chunks.data(), 6}, true);
      if (first.empty()) first = {norm.found().norm};
      check(norm.found().norm == first[0], "other bits");
    }
  }
  emulation::use_schedule(before.c_str());
}

TEST(races_grad_norm) { test_norm<float>({3 * kListChunk<float>, 5}, share.part); }

TEST(put_copies_any_number_of_bytes) {
  constexpr int64_t kDoubles = kVectorBytes / sizeof(double);
  for (const bool large : {false, true}) {
    emulation::large_arguments = large;
    const int64_t most = put_words(large ? kLargeArgumentBytes : kArgumentBytes) * kDoubles;
    const int64_t block = kPutThreads * kDoubles;
    for (const int64_t n : {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{3}, block, block + 1,
                            most - 1, most, most + 1, 3 * most + 1}) {
      describe("put of %lld doubles, at most %lld a launch", static_cast<long long>(n),
               static_cast<long long>(most));
      const int64_t padded = round_up(n, kDoubles);
      Memory<double> from(n, 0, 1), to(padded, 0, static_cast<uint64_t>(n));
      from.fill_random(2);
      check(launch_put(to.data(), from.data(), n * int64_t{sizeof(double)}, nullptr) == cudaSuccess,
            "refused");
      std::vector<double> expected = from.copy();
      expected.resize(static_cast<size_t>(padded), 0.0);
      check(to.equals(expected) && to.intact(), "not a copy");
    }
  }
}
