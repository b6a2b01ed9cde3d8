// SPDX-License-Identifier: MIT
// SIMD vectors for one instruction set. Included once per isa_*.cpp, inside that file's target
// pragma and namespace (FUSED_STEP_ISA); no include guard, no system headers of its own.
//
// Vectors are the compiler's vector extension, so that arithmetic is written with operators and
// core/'s formulas take vectors and scalars alike. Only what the extension lacks has intrinsics:
// loads and stores of the first n lanes, and the conversion of 16-bit floats.
//
// Memory is of a storage type S, vectors of its accumulator type: loads widen, stores round once.

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

// The bits of one vector's elements as they are stored in 16 bit.
struct Words {
  typedef uint16_t type __attribute__((vector_size(kVectorBytes / 2)));
  type bits;
};
using UintVec = Vec<uint32_t>;

template <typename S>
constexpr bool kIsWord = sizeof(S) == sizeof(uint16_t);

// Each word as the upper half of 32 bits. By intrinsics, and one shuffle: gcc makes two 128-bit
// conversions and a shift of __builtin_convertvector.
FUSED_STEP_INLINE UintVec upper_halves(const Words& words) {
#if defined(FUSED_STEP_AVX512)
  return (UintVec)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)words.bits) << 16;
#elif defined(FUSED_STEP_AVX2)
  const __m256i places =
      _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                       -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return (UintVec)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256((__m128i)words.bits), places);
#else
  return __builtin_convertvector(words.bits, UintVec) << 16;
#endif
}

// The lower half of each 32 bits.
FUSED_STEP_INLINE Words lower_halves(const UintVec& v) {
#if defined(FUSED_STEP_AVX512)
  return {(Words::type)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v)};
#elif defined(FUSED_STEP_AVX2)
  return {(Words::type)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v),
                                        _mm256_extracti128_si256((__m256i)v, 1))};
#else
  return {__builtin_convertvector(v, Words::type)};
#endif
}

template <typename S>
FUSED_STEP_INLINE Vec<float> widen_words(const Words& words) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    return (Vec<float>)upper_halves(words);
  } else {
#if defined(FUSED_STEP_AVX512)
    return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)words.bits);
#elif defined(FUSED_STEP_AVX2)
    return (Vec<float>)_mm256_cvtph_ps((__m128i)words.bits);
#else
    Vec<float> v;
    for (int k = 0; k < kLanes<float>; ++k) v[k] = widen(Float16{words.bits[k]});
    return v;
#endif
  }
}

template <typename S>
FUSED_STEP_INLINE Words narrow_words(const Vec<float>& v) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    return lower_halves(bfloat16_bits((UintVec)v));
  } else {
#if defined(FUSED_STEP_AVX512) || defined(FUSED_STEP_AVX2)
    // The instructions keep a NaN's payload; all others make the one NaN of narrow().
    const UintVec is_nan = (UintVec)(v != v);
    const UintVec nan = ((UintVec)v & 0x80000000u) | 0x7fc00000u;
    const UintVec bits = (is_nan & nan) | (~is_nan & (UintVec)v);
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#if defined(FUSED_STEP_AVX512)
    return {(Words::type)_mm512_maskz_cvtps_ph(0xffff, (__m512)bits, kNearest)};
#else
    return {(Words::type)_mm256_cvtps_ph((__m256)bits, kNearest)};
#endif
#else
    Words words;
    for (int k = 0; k < kLanes<float>; ++k) words.bits[k] = narrow<Float16>(v[k]).bits;
    return words;
#endif
  }
}

template <typename S>
FUSED_STEP_INLINE Vec<Accum<S>> load(const S* p) {
  if constexpr (kIsWord<S>) {
    Words words;
    __builtin_memcpy(&words, p, sizeof(words));
    return widen_words<S>(words);
  } else {
    Vec<S> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
}

template <typename S>
FUSED_STEP_INLINE void store(S* p, const Vec<Accum<S>>& v) {
  if constexpr (kIsWord<S>) {
    const Words words = narrow_words<S>(v);
    __builtin_memcpy(p, &words, sizeof(words));
  } else {
    __builtin_memcpy(p, &v, sizeof(v));
  }
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

// The first n words at p, zero beyond them.
template <typename S>
FUSED_STEP_INLINE Words first_words(const S* p, int n) {
#if defined(FUSED_STEP_AVX512)
  return {(Words::type)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1u), p)};
#elif defined(FUSED_STEP_AVX2)
  // No masked load of 16-bit elements: 8, 4, 2 and 1 of them, as n has the bits.
  if (n == kLanes<float>) {
    Words all;
    __builtin_memcpy(&all, p, sizeof(all));
    return all;
  }
  uint64_t low = 0, high = 0;
  uint64_t& last = n & 4 ? high : low;
  if (n & 4) __builtin_memcpy(&low, p, 8);
  p += n & 4;
  if (n & 2) {
    uint32_t two;
    __builtin_memcpy(&two, p, 4);
    last = two;
    p += 2;
  }
  if (n & 1) last |= static_cast<uint64_t>(p->bits) << (n & 2 ? 32 : 0);
  return {(Words::type)_mm_set_epi64x(static_cast<int64_t>(high), static_cast<int64_t>(low))};
#else
  Words words{};
  for (int k = 0; k < kLanes<float>; ++k) {
    if (k < n) words.bits[k] = p[k].bits;
  }
  return words;
#endif
}

// Touches no memory beyond the first lanes.
template <typename S>
FUSED_STEP_INLINE Vec<Accum<S>> load_first(const S* p, const FirstLanes<Accum<S>>& lanes) {
  if constexpr (kIsWord<S>) {
    return widen_words<S>(first_words(p, lanes.n));
  } else {
#if defined(FUSED_STEP_AVX512)
    if constexpr (sizeof(S) == 4) {
      return (Vec<S>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << lanes.n) - 1u), p);
    } else {
      return (Vec<S>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << lanes.n) - 1u), p);
    }
#elif defined(FUSED_STEP_AVX2)
    if constexpr (sizeof(S) == 4) {
      return (Vec<S>)_mm256_maskload_ps(p, (__m256i)lanes.bits);
    } else {
      return (Vec<S>)_mm256_maskload_pd(p, (__m256i)lanes.bits);
    }
#else
    if (lanes.n == kLanes<S>) return load(p);
    Vec<S> v{};
    for (int k = 0; k < kLanes<S>; ++k) {
      if (k < lanes.n) v[k] = p[k];
    }
    return v;
#endif
  }
}

// Not a masked store with AVX2: vmaskmovps to memory is microcoded on AMD (42 uops on Zen 2). But
// one with AVX-512: there gcc 12 makes vextractf64x4 with a mask of the loop, which, unlike a
// masked store, faults for lanes that the mask leaves out.
template <typename S>
FUSED_STEP_INLINE void store_first(S* p, const Vec<Accum<S>>& v,
                                   const FirstLanes<Accum<S>>& lanes) {
#if defined(FUSED_STEP_AVX512)
  const unsigned mask = (1u << lanes.n) - 1u;
  if constexpr (kIsWord<S>) {
    const Words words = narrow_words<S>(v);
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), (__m256i)words.bits);
  } else if constexpr (sizeof(S) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), (__m512d)v);
  }
#else
  if constexpr (kIsWord<S>) {
    const Words words = narrow_words<S>(v);
    for (int k = 0; k < kLanes<float>; ++k) {
      if (k < lanes.n) p[k].bits = words.bits[k];
    }
  } else {
    for (int k = 0; k < kLanes<S>; ++k) {
      if (k < lanes.n) p[k] = v[k];
    }
  }
#endif
}

// n elements at p, p + stride, ...; zero beyond them.
template <typename S>
FUSED_STEP_INLINE Vec<Accum<S>> load_strided(const S* p, int64_t stride, int64_t n) {
  constexpr int kN = kLanes<Accum<S>>;
  if (stride == 1 && n == kN) return load(p);
  if constexpr (kIsWord<S>) {
    Words words{};
    for (int k = 0; k < kN; ++k) {
      if (k < n) words.bits[k] = p[k * stride].bits;
    }
    return widen_words<S>(words);
  } else {
    Vec<S> v{};
    for (int k = 0; k < kN; ++k) {
      if (k < n) v[k] = p[k * stride];
    }
    return v;
  }
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
