// SPDX-License-Identifier: MIT
// Tests of cpu/simd.h for one instruction set. Included by each simd_*.cpp, which has set what
// isa_*.cpp sets and included simd_test.h before.

namespace fused_step::test {

#include "cpu/simd.h"

namespace FUSED_STEP_ISA {

template <typename T>
std::array<T, kLanes<T>> lanes_of(const Vec<T>& v) {
  std::array<T, kLanes<T>> lanes;
  __builtin_memcpy(lanes.data(), &v, sizeof(v));
  return lanes;
}

template <typename T>
void check_lane(int k, T got, T want) {
  check(same_bits(got, want), "lane %d is %g, want %g", k, static_cast<double>(got),
        static_cast<double>(want));
}

constexpr int kSeeds = 16;  // every place of a Buffer, every misalignment

template <typename S>
void load_and_store() {
  constexpr int kN = kLanes<Accum<S>>;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    Buffer<S> from(kN, seed), to(kN, seed / 4 + seed % 4 * 4);
    from.fill_random(seed);
    store(to.data(), load(from.data()));
    check(to.equals(from.copy()), "store(load) changed the elements");
    check(to.intact(), "store wrote beyond a vector");
  }
}

template <typename T>
void splat_fills_every_lane() {
  for (const T s : {T(1.5), T(0), -T(0), std::numeric_limits<T>::infinity()}) {
    const auto lanes = lanes_of<T>(splat(s));
    for (int k = 0; k < kLanes<T>; ++k) check_lane(k, lanes[static_cast<size_t>(k)], s);
  }
}

template <typename T>
void keep_zeroes_the_lanes_beyond_n() {
  constexpr int kN = kLanes<T>;
  // What stays keeps its bits; what goes is +0 even where it was NaN.
  for (const T filler :
       {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity(), -T(0), T(3)}) {
    Buffer<T> from(kN, 0);
    from.fill_random(1);
    from[0] = filler;
    from[kN - 1] = filler;
    for (int n = 0; n <= kN; ++n) {
      const FirstLanes<T> lanes = first_lanes<T>(n);
      check(lanes.n == n, "n is %d, want %d", lanes.n, n);
      const auto got = lanes_of<T>(keep(load(from.data()), lanes));
      for (int k = 0; k < kN; ++k) {
        check_lane(k, got[static_cast<size_t>(k)], k < n ? from[k] : T(0));
      }
    }
  }
}

template <typename S>
void load_first_reads_n_and_zeroes_the_rest() {
  using T = Accum<S>;
  constexpr int kN = kLanes<T>;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    for (int n = 0; n <= kN; ++n) {
      Buffer<S> from(n, seed);
      from.fill_random(seed);
      const auto got = lanes_of<T>(load_first(from.data(), first_lanes<T>(n)));
      for (int k = 0; k < kN; ++k) {
        check_lane(k, got[static_cast<size_t>(k)], k < n ? widen(from[k]) : T(0));
      }
    }
  }
}

template <typename S>
void store_first_writes_n() {
  using T = Accum<S>;
  constexpr int kN = kLanes<T>;
  Buffer<T> from(kN, 0);
  from.fill_random(2);
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    for (int n = 0; n <= kN; ++n) {
      Buffer<S> to(n, seed);
      store_first(to.data(), load(from.data()), first_lanes<T>(n));
      for (int k = 0; k < n; ++k) check_lane(k, widen(to[k]), widen(narrow<S>(from[k])));
      check(to.intact(), "n %d: wrote beyond", n);
    }
  }
}

template <typename S>
void load_strided_reads_n_and_zeroes_the_rest() {
  using T = Accum<S>;
  constexpr int kN = kLanes<T>;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    for (const int64_t stride : {0, 1, 2, 3, kN, kN + 1}) {
      for (int n = 0; n <= kN; ++n) {
        Buffer<S> from(n == 0 ? 0 : (n - 1) * stride + 1, seed);
        from.fill_random(seed);
        const auto got = lanes_of<T>(load_strided(from.data(), stride, n));
        for (int k = 0; k < kN; ++k) {
          check_lane(k, got[static_cast<size_t>(k)], k < n ? widen(from[k * stride]) : T(0));
        }
      }
    }
  }
}

template <typename T>
void transpose_sum_gives_lane_k_the_sum_of_vector_k() {
  constexpr int kN = kLanes<T>;
  const auto check_sums = [](const T(&in)[kN][kN], const T(&want)[kN]) {
    Vec<T> acc[kLanes<T>];
    for (int v = 0; v < kN; ++v) acc[v] = load(in[v]);
    const auto got = lanes_of<T>(transpose_sum<T>(acc));
    for (int v = 0; v < kN; ++v) {
      if (std::isnan(want[v])) {
        check(std::isnan(got[static_cast<size_t>(v)]), "lane %d lost its NaN", v);
      } else {
        check_lane(v, got[static_cast<size_t>(v)], want[v]);
      }
    }
  };
  // One element alone: it reaches its lane and no other. Then NaN, which must not spread.
  for (const T alone : {T(1), std::numeric_limits<T>::quiet_NaN()}) {
    for (int v = 0; v < kN; ++v) {
      for (int k = 0; k < kN; ++k) {
        T in[kN][kN] = {}, want[kN] = {};
        in[v][k] = want[v] = alone;
        check_sums(in, want);
      }
    }
  }
  // Different integers everywhere; their sums are exact.
  T in[kN][kN], want[kN] = {};
  for (int v = 0; v < kN; ++v) {
    for (int k = 0; k < kN; ++k) want[v] += in[v][k] = static_cast<T>(1 + v * 37 + k * k);
  }
  check_sums(in, want);
}

template <typename T>
void lane_sum_adds_every_lane_once() {
  constexpr int kN = kLanes<T>;
  T all[kN], sum = 0;
  for (int k = 0; k < kN; ++k) {
    T one[kN] = {};
    one[k] = T(3);
    check(lane_sum<T>(load(one)) == T(3), "lane %d alone sums to %g", k,
          static_cast<double>(lane_sum<T>(load(one))));
    sum += all[k] = static_cast<T>(1 + k * k);
  }
  check(lane_sum<T>(load(all)) == sum, "%g, want %g", static_cast<double>(lane_sum<T>(load(all))),
        static_cast<double>(sum));
}

template <typename T>
void add_widened_adds_each_lane_in_double() {
  constexpr int kN = kLanes<T>;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    Buffer<T> from(kN, seed);
    Buffer<double> sums(kN, seed / 4 + seed % 4 * 4);
    from.fill_random(seed);
    sums.fill_random(seed + 1);
    const std::vector<double> before = sums.copy();
    const WideVec<T> wide = widened<T>(load(from.data()));
    add_widened<T>(sums.data(), load(from.data()));
    for (int k = 0; k < kN; ++k) {
      const double lane = static_cast<double>(from[k]);
      check_lane(k, static_cast<double>(wide[k]), lane);
      check_lane(k, sums[k], before[static_cast<size_t>(k)] + lane);
    }
    check(sums.intact(), "wrote beyond a vector");
  }
}

template <typename S>
void load_widens_every_value_as_core_does() {
  constexpr int kN = kLanes<float>;
  for (uint32_t first = 0; first < 0x10000u; first += kN) {
    S from[kN];
    for (uint32_t k = 0; k < kN; ++k) from[k].bits = static_cast<uint16_t>(first + k);
    const auto got = lanes_of<float>(load(from));
    for (int k = 0; k < kN; ++k) {
      check(same_bits(got[static_cast<size_t>(k)], widen(from[k])), "%04x is widened to %a",
            from[k].bits, static_cast<double>(got[static_cast<size_t>(k)]));
    }
  }
}

template <typename S>
void store_rounds_as_core_does() {
  constexpr int kN = kLanes<float>;
  float from[kN];
  S to[kN];
  int filled = 0;
  const auto add = [&](uint32_t bits) {
    from[filled] = float_from_bits(bits);
    if (++filled < kN) return;
    filled = 0;
    store(to, load(from));
    for (int k = 0; k < kN; ++k) {
      const uint16_t want = narrow<S>(from[k]).bits;
      check(to[k].bits == want, "%a becomes %04x, want %04x", static_cast<double>(from[k]),
            to[k].bits, want);
    }
  };
  for_each_float_to_round<S>(add);
}

template <typename S>
constexpr SimdStorageCases kStorageCases = {
    load_and_store<S>, load_first_reads_n_and_zeroes_the_rest<S>, store_first_writes_n<S>,
    load_strided_reads_n_and_zeroes_the_rest<S>};

extern const SimdStorageCases kFloatStorage = kStorageCases<float>;
extern const SimdStorageCases kDoubleStorage = kStorageCases<double>;
extern const SimdStorageCases kBFloat16Storage = kStorageCases<BFloat16>;
extern const SimdStorageCases kFloat16Storage = kStorageCases<Float16>;

template <typename S>
constexpr SimdWordCases kWordCases = {load_widens_every_value_as_core_does<S>,
                                      store_rounds_as_core_does<S>};

extern const SimdWordCases kBFloat16Words = kWordCases<BFloat16>;
extern const SimdWordCases kFloat16Words = kWordCases<Float16>;

template <typename T>
constexpr SimdCases kCases = {splat_fills_every_lane<T>, keep_zeroes_the_lanes_beyond_n<T>,
                              transpose_sum_gives_lane_k_the_sum_of_vector_k<T>,
                              lane_sum_adds_every_lane_once<T>,
                              add_widened_adds_each_lane_in_double<T>};

extern const SimdCases kFloatCases = kCases<float>;
extern const SimdCases kDoubleCases = kCases<double>;

}  // namespace FUSED_STEP_ISA

}  // namespace fused_step::test
