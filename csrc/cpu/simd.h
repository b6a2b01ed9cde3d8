// SPDX-License-Identifier: MIT
// SIMD vectors for one instruction set. Included once per isa_*.cpp, inside that file's target
// pragma and namespace (FUSED_STEP_ISA); no include guard, no system headers of its own.
//
// Vectors are the compiler's vector extension, so that arithmetic is written with operators and
// core/'s formulas take vectors and scalars alike. Only what the extension lacks has intrinsics:
// loads and stores of the first n lanes.

namespace FUSED_STEP_ISA {

template <typename T>
struct VecTraits;
template <>
struct VecTraits<float> {
  using Mask = int32_t;
};
template <>
struct VecTraits<double> {
  using Mask = int64_t;
};

constexpr int kVectorBytes = FUSED_STEP_VECTOR_BYTES;

template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vec = typename VecOf<T>::type;
template <typename T>
using BitsVec = Vec<typename VecTraits<T>::Mask>;

template <typename T>
FUSED_STEP_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <typename T>
FUSED_STEP_INLINE void store(T* p, const Vec<T>& v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// s in every lane; the subtraction (unlike an addition) keeps -0 and folds away.
template <typename T>
FUSED_STEP_INLINE Vec<T> splat(T s) {
  return s - Vec<T>{};
}

// The first n lanes, 0 <= n <= kLanes, made once and used for many rows.
template <typename T>
struct FirstLanes {
  BitsVec<T> bits;
  int n;
};

template <typename T>
FUSED_STEP_INLINE FirstLanes<T> first_lanes(int64_t n) {
  using M = typename VecTraits<T>::Mask;
  BitsVec<T> lane;
  for (int k = 0; k < kLanes<T>; ++k) lane[k] = static_cast<M>(k);
  return {lane < static_cast<M>(n), static_cast<int>(n)};
}

// Zero beyond the first lanes, whatever v holds there (a product with 0 would keep its NaN).
template <typename T>
FUSED_STEP_INLINE Vec<T> keep(const Vec<T>& v, const FirstLanes<T>& lanes) {
  return (Vec<T>)((BitsVec<T>)v & lanes.bits);
}

// Touches no memory beyond the first lanes.
template <typename T>
FUSED_STEP_INLINE Vec<T> load_first(const T* p, const FirstLanes<T>& lanes) {
#if defined(FUSED_STEP_AVX512)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << lanes.n) - 1u), p);
  } else {
    return (Vec<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << lanes.n) - 1u), p);
  }
#elif defined(FUSED_STEP_AVX2)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm256_maskload_ps(p, (__m256i)lanes.bits);
  } else {
    return (Vec<T>)_mm256_maskload_pd(p, (__m256i)lanes.bits);
  }
#else
  Vec<T> v{};
  for (int k = 0; k < kLanes<T>; ++k) {
    if (k < lanes.n) v[k] = p[k];
  }
  return v;
#endif
}

// A scalar loop, not a masked store: vmaskmovps to memory is microcoded on AMD (42 uops on Zen 2).
template <typename T>
FUSED_STEP_INLINE void store_first(T* p, const Vec<T>& v, const FirstLanes<T>& lanes) {
  for (int k = 0; k < kLanes<T>; ++k) {
    if (k < lanes.n) p[k] = v[k];
  }
}

// n elements at p, p + stride, ...; zero beyond them.
template <typename T>
FUSED_STEP_INLINE Vec<T> load_strided(const T* p, int64_t stride, int64_t n) {
  if (stride == 1 && n == kLanes<T>) return load(p);
  Vec<T> v{};
  for (int k = 0; k < kLanes<T>; ++k) {
    if (k < n) v[k] = p[k * stride];
  }
  return v;
}

// Within each group of kGroup lanes: the blocks of kWidth lanes of a, then those of b, of which
// each gives its low (kPart = 0) or high (kPart = 1) half.
template <int kN, int kGroup, int kWidth, int kPart>
struct HalvesPattern {
  static constexpr int at(int lane) {
    const int group = lane / kGroup, in_group = lane % kGroup;
    const int half = kWidth / 2, per_vector = kGroup / 2;
    const int from_b = in_group / per_vector, k = in_group % per_vector;
    const int block = k / half, in_half = k % half;
    return from_b * kN + group * kGroup + block * kWidth + kPart * half + in_half;
  }
};

template <int kDistance>
struct ButterflyPattern {
  static constexpr int at(int lane) { return lane ^ kDistance; }
};

template <typename Pattern, typename V, int... kLane>
FUSED_STEP_INLINE V pick(const V& a, const V& b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, Pattern::at(kLane)...);
}

template <typename T, int kGroup, int kWidth>
FUSED_STEP_INLINE Vec<T> add_halves(const Vec<T>& a, const Vec<T>& b) {
  constexpr int kN = kLanes<T>;
  using All = std::make_integer_sequence<int, kN>;
  return pick<HalvesPattern<kN, kGroup, kWidth, 0>>(a, b, All{}) +
         pick<HalvesPattern<kN, kGroup, kWidth, 1>>(a, b, All{});
}

// Lane k of the result is the sum over acc[k]'s lanes. Halves within 128-bit lanes are added first,
// where a shuffle costs one cycle; then whole 128-bit lanes. Overwrites acc.
template <typename T>
FUSED_STEP_INLINE Vec<T> transpose_sum(Vec<T> (&acc)[kLanes<T>]) {
  constexpr int kN = kLanes<T>;
  constexpr int kLane = 16 / static_cast<int>(sizeof(T));  // elements in 128 bits
  int n = kN;
  if constexpr (kLane == 4) {
    for (int k = 0; k < n / 2; ++k) acc[k] = add_halves<T, 4, 4>(acc[2 * k], acc[2 * k + 1]);
    n /= 2;
  }
  for (int k = 0; k < n / 2; ++k) acc[k] = add_halves<T, kLane, 2>(acc[2 * k], acc[2 * k + 1]);
  n /= 2;
  if constexpr (kN == 4 * kLane) {
    for (int k = 0; k < n / 2; ++k) acc[k] = add_halves<T, kN, kN>(acc[2 * k], acc[2 * k + 1]);
    n /= 2;
  }
  if constexpr (kN > kLane) acc[0] = add_halves<T, kN, 2 * kLane>(acc[0], acc[1]);
  return acc[0];
}

template <typename T>
FUSED_STEP_INLINE T lane_sum(Vec<T> v) {
  constexpr int kN = kLanes<T>;
  using All = std::make_integer_sequence<int, kN>;
  if constexpr (kN >= 16) v = v + pick<ButterflyPattern<8>>(v, v, All{});
  if constexpr (kN >= 8) v = v + pick<ButterflyPattern<4>>(v, v, All{});
  if constexpr (kN >= 4) v = v + pick<ButterflyPattern<2>>(v, v, All{});
  v = v + pick<ButterflyPattern<1>>(v, v, All{});
  return v[0];
}

// The lanes of v in double.
template <typename T>
struct WideOf {
  typedef double type __attribute__((vector_size(kLanes<T> * sizeof(double))));
};
template <typename T>
using WideVec = typename WideOf<T>::type;

template <typename T>
FUSED_STEP_INLINE WideVec<T> widened(const Vec<T>& v) {
  return __builtin_convertvector(v, WideVec<T>);
}

// sums[k] += v[k].
template <typename T>
FUSED_STEP_INLINE void add_widened(double* sums, const Vec<T>& v) {
  WideVec<T> wide;
  __builtin_memcpy(&wide, sums, sizeof(wide));
  wide += widened<T>(v);
  __builtin_memcpy(sums, &wide, sizeof(wide));
}

}  // namespace FUSED_STEP_ISA
