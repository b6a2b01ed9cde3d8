// SPDX-License-Identifier: MIT
// The update of a parameter from a finished gradient.
#include <vector>

#include "problem.h"

using namespace fused_step;
using namespace fused_step::cuda;
using namespace fused_step::test;

namespace {

template <typename P>
void test_update(int64_t n, const SgdOptions& options, uint64_t seed) {
  using A = Accum<P>;
  const Sizes s{1, n, 1, seed};
  describe_case<P, P>("update", s);
  Layer<P> layer(s, options, {});
  layer.has_bias = false;
  ReferenceLayer<P> want(layer);
  Memory<A> grad(n, static_cast<int64_t>(hash(seed, 100) % 2), hash(seed, 101));
  grad.fill_random(hash(seed, 102));
  const std::vector<A> before = grad.copy();
  const double scale = hash(seed, 103) % 2 == 0 ? 1.0 : 0.3;
  std::vector<Bound<P>> scaled;
  for (int64_t k = 0; k < n; ++k) {
    scaled.push_back(Bound<P>{value(grad[k]), 0} * Bound<P>(static_cast<long double>(scale)));
  }
  ReferenceLayer<P>::apply(want.weight, want.weight_buf, want.weight_options, scaled);
  check(launch_sgd_update<P>({layer.weight_param(), grad.data(), scale, n}, nullptr) == cudaSuccess,
        "refused");
  check_values("weight", layer.weight, want.weight);
  if (options.momentum != 0) {
    check_values("buf", layer.weight_buf, want.weight_buf);
  } else {
    check(layer.weight_buf.untouched(), "a buffer without momentum changed");
  }
  check(grad.equals(before) && grad.intact(), "the gradient changed");
}

template <typename P>
void test_sizes(uint64_t seed) {
  for (int64_t n = 0; n <= 2 * 8 + 1; ++n) {
    for (int k = 0; k < 8; ++k) {
      ++seed;
      test_update<P>(n, pick_options(hash(seed)), seed);
    }
  }
  // Around a block of single elements and of vectors.
  for (const int64_t n : {255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049, 4100}) {
    for (int k = 0; k < 2; ++k) {
      ++seed;
      test_update<P>(n, pick_options(hash(seed)), seed);
    }
  }
  for (const SgdOptions& options : option_sets(0.1)) test_update<P>(19, options, ++seed);
}

}  // namespace

TEST(sgd_update_handles_every_small_size_alignment_and_set_of_options) {
  FOR_EACH_PARAM(test_sizes, 1000000);
}

// More elements than the largest grid has threads: each has a second turn, some of them.
TEST(sgd_update_handles_more_elements_than_threads) {
  if (share.part != 0 || share.of > 4) return;
  const int64_t n = kMaxElementwiseBlocks * kElementwiseThreads + 77;
  describe("update of %lld elements", static_cast<long long>(n));
  Memory<float> value(n, 1, 0), grad(n, 0, 0);
  value.fill_random(1);
  grad.fill_random(2);
  const std::vector<float> before = value.copy();
  check(
      launch_sgd_update<float>({{value.data(), nullptr, {.lr = 0.5}, nullptr}, grad.data(), 1.0, n},
                               nullptr) == cudaSuccess,
      "refused");
  for (int64_t k = 0; k < n; ++k) {
    const float want = before[static_cast<size_t>(k)] - grad[k] * 0.5f;
    check(value[k] == want, "element %lld", static_cast<long long>(k));
  }
  check(value.intact(), "wrote beside the parameter");
}

TEST(races_sgd_update) { test_update<float>(600, {.lr = 0.1, .momentum = 0.9}, 3); }
