// SPDX-License-Identifier: MIT
// The optimizer's passes over a tensor, in every storage: sizes x places x guards.
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "bounded.h"
#include "buffer.h"
#include "check.h"
#include "core/float16.h"
#include "cpu/kernels.h"

using namespace fused_step;
using namespace fused_step::cpu;
using namespace fused_step::test;

namespace {

constexpr int64_t kMaxVectors = 2 * 16 + 1;

template <typename T, typename Buf>
constexpr SgdStorage storage() {
  if (std::is_same_v<T, float>) return SgdStorage::kFloat;
  if (std::is_same_v<T, double>) return SgdStorage::kDouble;
  constexpr bool kFloatBuf = std::is_same_v<Buf, float>;
  if (std::is_same_v<T, BFloat16>) {
    return kFloatBuf ? SgdStorage::kBFloat16FloatBuf : SgdStorage::kBFloat16;
  }
  return kFloatBuf ? SgdStorage::kFloat16FloatBuf : SgdStorage::kFloat16;
}

template <typename Body>
void for_each_storage(const Body& body) {
  body(float{}, float{});
  body(double{}, double{});
  body(BFloat16{}, BFloat16{});
  body(Float16{}, Float16{});
  body(BFloat16{}, float{});
  body(Float16{}, float{});
}

// A result as it is stored: half a unit in the last place more of error. All values are normal
// numbers or below one unit of the smallest.
template <typename S, typename A>
Bounded<A> stored(const Bounded<A>& x) {
  if (std::is_same_v<S, A>) return x;
  const long double eps = std::is_same_v<S, BFloat16> ? 0x1p-8L : 0x1p-11L;
  return {x.v, x.e + eps * (std::fabs(x.v) + x.e) + 0x1p-25L};
}

struct Scaling {
  double unscale;
  double clip;
  GradAfter after;
};

template <typename T, typename Buf>
void test_update(int64_t n, const SgdOptions& o, const Scaling& scaling, uint64_t seed) {
  using A = Accum<T>;
  const bool has_buf = o.momentum != 0;
  Buffer<T> start_p(n, 0), start_grad(n, 0);
  Buffer<Buf> start_buf(n, 0);
  start_p.fill_random(hash(seed, 1));
  start_grad.fill_random(hash(seed, 2));
  if (has_buf && !o.first_step) start_buf.fill_random(hash(seed, 3));

  std::vector<Bounded<A>> want_p, want_grad, want_buf;
  for (int64_t k = 0; k < n; ++k) {
    const Bounded<A> unscaled = Bounded<A>{widen(start_grad[k]), 0} * Bounded<A>(scaling.unscale);
    Bounded<A> p{widen(start_p[k]), 0}, buf{widen(start_buf[k]), 0};
    torch_sgd(p, unscaled * Bounded<A>(scaling.clip), buf, o);
    want_p.push_back(stored<T>(p));
    want_buf.push_back(stored<Buf>(buf));
    want_grad.push_back(stored<T>(unscaled));
  }
  char text[160];
  append(text, sizeof(text), o);
  for_each_isa([&](const char* isa) {
    describe("%s, %s, n %lld, %s, unscale %g, clip %g, after %d, seed %llu", type_name<T>(), isa,
             static_cast<long long>(n), text, scaling.unscale, scaling.clip,
             static_cast<int>(scaling.after), static_cast<unsigned long long>(seed));
    Buffer<T> p(n, hash(seed, 4)), grad(n, hash(seed, 5));
    Buffer<Buf> buf(n, hash(seed, 6));
    for (int64_t k = 0; k < n; ++k) {
      p[k] = start_p[k];
      grad[k] = start_grad[k];
      buf[k] = start_buf[k];
    }
    SgdSlice slice{p.data(), grad.data(), has_buf ? buf.data() : nullptr, n, o.first_step};
    SgdOptions options = o;
    options.first_step = !o.first_step;  // the slice's own word counts
    poison_stack();
    sgd_kernels().update[static_cast<int>(storage<T, Buf>())](
        slice, {options, scaling.unscale, scaling.clip, scaling.after});
    const auto check_all = [&](const char* what, const auto& got, const auto& want) {
      for (int64_t k = 0; k < n; ++k) {
        check_close<A>(what, k, static_cast<long double>(widen(got[k])),
                       want[static_cast<size_t>(k)]);
      }
    };
    check_all("p", p, want_p);
    if (has_buf) {
      check_all("buf", buf, want_buf);
    } else {
      check(buf.equals(start_buf.copy()), "buf was written");
    }
    if (scaling.after == GradAfter::kKept) {
      check(grad.equals(start_grad.copy()), "grad changed");
    } else if (scaling.after == GradAfter::kUnscaled) {
      check_all("grad", grad, want_grad);
    } else {
      for (int64_t k = 0; k < n; ++k) check(widen(grad[k]) == 0, "grad[%d] is not 0", int(k));
    }
    check(p.intact() && buf.intact() && grad.intact(), "wrote beside an array");
  });
}

}  // namespace

TEST(optimizer_pass_updates_every_element_of_every_storage) {
  uint64_t seed = 21000000;
  for_each_storage([&](auto type, auto buf) {
    for (const SgdOptions& o : option_sets(0.1)) {
      for (int64_t n = 0; n <= kMaxVectors; ++n) {
        test_update<decltype(type), decltype(buf)>(n, o, {1.0, 1.0, GradAfter::kKept}, ++seed);
      }
    }
  });
}

TEST(optimizer_pass_unscales_clips_and_zeroes) {
  uint64_t seed = 22000000;
  const SgdOptions momentum{0.1, 0.9, 0.0, 0.1, true, true, false};
  const SgdOptions bare{0.1, 0.0, 0.0, 0.0, false, false, false};
  const Scaling scalings[] = {{0.25, 1.0, GradAfter::kUnscaled},
                              {0.3, 0.7, GradAfter::kUnscaled},
                              {1.0, 0.7, GradAfter::kKept},
                              {1.0, 1.0, GradAfter::kZero},
                              {0.3, 0.7, GradAfter::kZero}};
  for_each_storage([&](auto type, auto buf) {
    for (const SgdOptions& o : {momentum, bare}) {
      for (const Scaling& scaling : scalings) {
        for (int64_t n = 0; n <= kMaxVectors; ++n) {
          test_update<decltype(type), decltype(buf)>(n, o, scaling, ++seed);
        }
      }
    }
  });
}

TEST(optimizer_pass_has_the_same_bits_wherever_a_tensor_is_cut) {
  constexpr int64_t n = 97;
  const SgdOptions o{0.1, 0.9, 0.3, 0.1, false, false, false};
  for_each_storage([&](auto type, auto buf_type) {
    using T = decltype(type);
    using Buf = decltype(buf_type);
    for_each_isa([&](const char* isa) {
      describe("%s, %s", type_name<T>(), isa);
      const auto update = sgd_kernels().update[static_cast<int>(storage<T, Buf>())];
      std::vector<T> whole;
      std::vector<Buf> whole_buf;
      for (int64_t cut = 0; cut <= n; ++cut) {
        Buffer<T> p(n, 1), grad(n, 1);
        Buffer<Buf> buf(n, 1);
        p.fill_random(1);
        grad.fill_random(2);
        buf.fill_random(3);
        update({p.data(), grad.data(), buf.data(), cut, false}, {o});
        update({p.data() + cut, grad.data() + cut, buf.data() + cut, n - cut, false}, {o});
        if (cut == 0) {
          whole = p.copy();
          whole_buf = buf.copy();
        }
        check(p.equals(whole) && buf.equals(whole_buf), "other bits when cut at %d", int(cut));
      }
    });
  });
}

TEST(sum_of_squares_takes_every_element_once) {
  for_each_storage([](auto type, auto buf_type) {
    using T = decltype(type);
    for (int64_t n = 0; n <= 4 * kMaxVectors; ++n) {
      Buffer<T> x(n, hash(23000000, static_cast<uint64_t>(n)));
      x.fill_random(static_cast<uint64_t>(n));
      Sum<double> want;
      for (int64_t k = 0; k < n; ++k) {
        const Bounded<double> value{widen(x[k]), 0};
        want.add(value * value);
      }
      for_each_isa([&](const char* isa) {
        describe("%s, %s, n %lld", type_name<T>(), isa, static_cast<long long>(n));
        const auto sum =
            sgd_kernels().sum_squares[static_cast<int>(storage<T, decltype(buf_type)>())];
        check_close<double>("sum", 0, sum(x.data(), n), want.total());
        check(x.intact(), "wrote beside the array");
      });
    }
  });
}
