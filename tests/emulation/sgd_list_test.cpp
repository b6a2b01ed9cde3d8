// SPDX-License-Identifier: MIT
// The update of a list of tensors.
#include <optional>
#include <vector>

#include "tensor_list.h"

using namespace fused_step;
using namespace fused_step::cuda;
using namespace fused_step::test;

namespace {

// What a step finds beside the options; what is not there is no pointer.
struct Around {
  std::optional<float> lr_float = std::nullopt;
  std::optional<double> lr_double = std::nullopt;
  double unscale = 1.0;
  std::optional<float> grad_scale = std::nullopt;
  std::optional<float> found_inf = std::nullopt;
  std::optional<double> clip = std::nullopt;
  GradAfter after = GradAfter::kKept;

  SgdScalars scalars() const {
    return {pointer(lr_float), pointer(lr_double), pointer(grad_scale), pointer(found_inf),
            pointer(clip)};
  }
  bool skips() const { return found_inf.value_or(0.0f) != 0.0f; }
  double factor() const {
    return grad_scale.has_value() ? static_cast<double>(1.0f / *grad_scale) : unscale;
  }

 private:
  template <typename T>
  static const T* pointer(const std::optional<T>& value) {
    return value.has_value() ? &*value : nullptr;
  }
};

Around pick_around(uint64_t seed) {
  Around around;
  switch (hash(seed, 1) % 3) {
    case 0:
      around.lr_float = 0.0625f;
      break;
    case 1:
      around.lr_double = 0.3;
      break;
  }
  switch (hash(seed, 2) % 5) {
    case 0:
      around.unscale = 0.3;
      around.after = GradAfter::kUnscaled;
      break;
    case 1:
      around.grad_scale = 3.0f;
      around.after = GradAfter::kUnscaled;
      break;
    case 2:
      around.grad_scale = 1.0f;
      around.after = GradAfter::kUnscaled;
      break;
  }
  if (hash(seed, 3) % 3 == 0) around.found_inf = static_cast<float>(hash(seed, 4) % 2);
  if (hash(seed, 5) % 3 == 0) around.clip = 0.7;
  if (hash(seed, 6) % 3 == 0) around.after = GradAfter::kZero;
  return around;
}

// One tensor of the list as it must be after the step.
template <typename P, typename Buf>
struct Want {
  std::vector<P> param_before, grad_before;
  std::vector<Buf> buf_before;
  std::vector<Bound<P>> param, grad;
  std::vector<Bound<Buf>> buf;

  Want(const ListTensor<P, Buf>& t, const SgdOptions& options, const Around& around)
      : param_before(t.param.copy()), grad_before(t.grad.copy()), buf_before(t.buf.copy()) {
    for (int64_t k = 0; k < t.param.n(); ++k) {
      const Bound<P> unscaled =
          Bound<P>{value(t.grad[k]), 0} * Bound<P>(static_cast<long double>(around.factor()));
      Bound<P> p{value(t.param[k]), 0}, b{value(t.buf[k]), 0};
      torch_sgd(p, unscaled * Bound<P>(static_cast<long double>(around.clip.value_or(1.0))), b,
                options);
      param.push_back(p);
      buf.push_back(b);
      grad.push_back(around.after == GradAfter::kZero ? Bound<P>{0, 0} : unscaled);
    }
  }

  void check_tensor(const ListTensor<P, Buf>& t, const SgdOptions& options,
                    const Around& around) const {
    if (around.skips()) {
      check(t.param.equals(param_before) && t.buf.equals(buf_before), "a skipped step did it all");
      check(t.param.intact() && t.buf.intact(), "wrote beside");
    } else {
      check_values("param", t.param, param);
      if (options.momentum != 0) {
        check_values("buf", t.buf, buf);
      } else {
        check(t.buf.untouched(), "a buffer without momentum changed");
      }
    }
    const bool zeroes = around.after == GradAfter::kZero;
    const bool unscales =
        around.after == GradAfter::kUnscaled && around.factor() != 1.0 && !around.skips();
    if (zeroes || unscales) {
      check_values("grad", t.grad, grad);
    } else {
      check(t.grad.equals(grad_before) && t.grad.intact(), "the gradient changed");
    }
  }
};

template <typename P, typename Buf>
void test_list(const std::vector<int64_t>& sizes, SgdOptions options, const Around& around,
               uint64_t seed) {
  if (around.lr_float.has_value()) options.lr = static_cast<double>(*around.lr_float);
  if (around.lr_double.has_value()) options.lr = *around.lr_double;
  TensorList<P, Buf> list(sizes, seed);
  std::vector<Want<P, Buf>> want;
  std::vector<SgdOptions> options_of;
  for (size_t k = 0; k < sizes.size(); ++k) {
    options.first_step = hash(seed, 1000 + k) % 2 == 0;
    ListTensor<P, Buf>& t = *list.tensors[k];
    if (options.momentum != 0 && !options.first_step) t.buf.fill_random(hash(seed, 2000 + k));
    if (options.momentum == 0) list.rows[k].buf = nullptr;
    list.rows[k].first_step = options.first_step ? 1 : 0;
    want.emplace_back(t, options, around);
    options_of.push_back(options);
  }
  SgdOptions given = options;
  given.first_step = !options.first_step;  // the tensors' own word counts
  if (around.lr_float.has_value() || around.lr_double.has_value()) given.lr = 77.0;
  check(
      launch_sgd_list<P, Buf>({list.pointers(), given, around.scalars(),
                               around.grad_scale.has_value() ? 55.0 : around.unscale, around.after},
                              nullptr) == cudaSuccess,
      "refused");
  char text[160];
  append(text, sizeof(text), options);
  for (size_t k = 0; k < sizes.size(); ++k) {
    describe(
        "list <%s, %s> n %lld, %s, lr on the device %d, factor %g, found_inf %g, clip %g, "
        "after %d, seed %llu",
        kName<P>, kName<Buf>, static_cast<long long>(sizes[k]), text,
        static_cast<int>(around.lr_float.has_value() || around.lr_double.has_value()),
        around.factor(), static_cast<double>(around.found_inf.value_or(0.0f)),
        around.clip.value_or(1.0), static_cast<int>(around.after),
        static_cast<unsigned long long>(seed));
    want[k].check_tensor(*list.tensors[k], options_of[k], around);
  }
}

template <typename P, typename Buf>
void test_sizes(uint64_t seed) {
  const std::vector<int64_t> sizes = list_sizes<P>();
  for (int k = 0; k < 12; ++k) {
    if (takes(++seed)) {
      test_list<P, Buf>(sizes, pick_options(hash(seed)), pick_around(hash(seed, 1)), seed);
    }
  }
}

template <typename P, typename Buf>
void test_options(uint64_t seed) {
  for (const SgdOptions& options : option_sets(0.1)) {
    for (int k = 0; k < 6; ++k) {
      if (!takes(++seed)) continue;
      test_list<P, Buf>({9, 16, 19}, options, k == 0 ? Around{} : pick_around(hash(seed)), seed);
    }
  }
}

}  // namespace

TEST(sgd_list_handles_every_size_and_alignment) { FOR_EACH_STORAGE(test_sizes, 1000000); }

TEST(sgd_list_handles_every_set_of_options) { FOR_EACH_STORAGE(test_options, 2000000); }

TEST(sgd_list_handles_many_small_tensors_beside_a_large_one) {
  std::vector<int64_t> sizes(300, 3);
  sizes[150] = 5 * kListChunk<float> + 2;
  test_list<float, float>(sizes, {.lr = 0.1, .momentum = 0.9}, {}, share.part);
}

TEST(sgd_list_handles_nothing) { test_list<float, float>({}, {.lr = 0.1}, {}, 1); }

TEST(races_sgd_list) {
  const Around around{.grad_scale = 2.0f, .after = GradAfter::kUnscaled};
  test_list<float, float>({600, 1, 5000}, {.lr = 0.1, .momentum = 0.9}, around, 3);
}

// Elements and not a chunk's place are 64 bits wide: the tensor's chunks from 2^31 elements on
// alone are in memory.
TEST(sgd_list_reaches_elements_beyond_2_to_the_31) {
  constexpr int64_t kBegin = (int64_t{1} << 31) / kListChunk<float> * kListChunk<float>;
  const int64_t n = kListChunk<float> + 5;
  TensorList<float, float> list({n}, 4);
  ListTensor<float, float>& t = *list.tensors[0];
  const SgdOptions options{.lr = 0.5};
  const Want<float, float> want(t, options, {});
  const auto before_all = [&](float* p) {
    return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(p) - kBegin * sizeof(float));
  };
  list.rows[0] = {before_all(t.param.data()), before_all(t.grad.data()), nullptr, kBegin + n, 0};
  constexpr auto kFirst = static_cast<int32_t>(kBegin / kListChunk<float>);
  list.chunks = {{0, kFirst}, {0, kFirst + 1}};
  describe("list beyond 2^31 elements");
  check(launch_sgd_list<float, float>({list.pointers(), options, {}, 1.0, GradAfter::kKept},
                                      nullptr) == cudaSuccess,
        "refused");
  want.check_tensor(t, options, {});
}
