// SPDX-License-Identifier: MIT
// The optimizer's passes over a tensor: the update, and the sum of squares for its norm. Included
// once per instruction set (see simd.h).
//
// Nothing here depends on where a tensor is cut or where it lies: each element has the same bits
// from a full vector as from the first lanes of one.

namespace FUSED_STEP_ISA {

// What a slice's gradient is multiplied by, in the accumulator type.
template <typename A>
struct GradFactors {
  A unscale;
  A clip;
  GradAfter after;
};

// One vector at element k, or its first lanes.
template <typename T, typename Buf, bool kScaled, bool kTail>
FUSED_STEP_INLINE void sgd_vector(T* param, T* grad, Buf* buf, int64_t k,
                                  const FirstLanes<Accum<T>>& lanes,
                                  const SgdCoefficients<Accum<T>>& c,
                                  const GradFactors<Accum<T>>& factors) {
  using V = Vec<Accum<T>>;
  const auto get = [&](const auto* from) { return kTail ? load_first(from, lanes) : load(from); };
  const auto put = [&](auto* to, const V& v) {
    if constexpr (kTail) {
      store_first(to, v, lanes);
    } else {
      store(to, v);
    }
  };
  V g = get(grad + k);
  if constexpr (kScaled) {
    g = product(g, factors.unscale);
    if (factors.after == GradAfter::kUnscaled) put(grad + k, g);
    if (factors.after == GradAfter::kZero) put(grad + k, V{});
    g = product(g, factors.clip);
  }
  V b{};
  if (c.has_momentum && !c.first_step) b = get(buf + k);
  put(param + k, sgd_update(get(param + k), g, b, c));
  if (c.has_momentum) put(buf + k, b);
}

template <typename T, typename Buf, bool kScaled>
FUSED_STEP_INLINE void sgd_vectors(const SgdSlice& a, const SgdCoefficients<Accum<T>>& c,
                                   const GradFactors<Accum<T>>& factors) {
  constexpr int64_t kN = kLanes<Accum<T>>;
  T* const param = static_cast<T*>(a.param);
  T* const grad = static_cast<T*>(a.grad);
  Buf* const buf = static_cast<Buf*>(a.buf);
  const int64_t n = a.n;
  const auto all = first_lanes<Accum<T>>(kN);
  int64_t k = 0;
  for (; k + kN <= n; k += kN) {
    sgd_vector<T, Buf, kScaled, false>(param, grad, buf, k, all, c, factors);
  }
  if (k < n) {
    sgd_vector<T, Buf, kScaled, true>(param, grad, buf, k, first_lanes<Accum<T>>(n - k), c,
                                      factors);
  }
}

// Reads a slice of param, grad and (with momentum, but for the first step) buf; writes param, buf,
// and grad where the rule says so. The three may not overlap.
template <typename T, typename Buf>
void sgd_slice(const SgdSlice& a, const SgdRule& rule) {
  using A = Accum<T>;
  SgdOptions options = rule.options;
  options.first_step = a.first_step;
  const SgdCoefficients<A> c = sgd_coefficients<A>(options);
  const GradFactors<A> factors{static_cast<A>(rule.unscale), static_cast<A>(rule.clip),
                               rule.grad_after};
  const bool scaled =
      factors.unscale != A(1) || factors.clip != A(1) || factors.after != GradAfter::kKept;
  if (scaled) {
    sgd_vectors<T, Buf, true>(a, c, factors);
  } else {
    sgd_vectors<T, Buf, false>(a, c, factors);
  }
}

// Squares of the lanes of v, added to sums in double; a float's square is exact there.
template <typename A>
FUSED_STEP_INLINE void add_squares(WideVec<A>& sums, const Vec<A>& v) {
  const WideVec<A> wide = widened<A>(v);
  sums += wide * wide;
}

template <typename T>
double sum_squares(const void* from, int64_t n) {
  using A = Accum<T>;
  constexpr int64_t kN = kLanes<A>;
  const T* const x = static_cast<const T*>(from);
  WideVec<A> sums[2] = {};
  int64_t k = 0;
  for (; k + 2 * kN <= n; k += 2 * kN) {
    add_squares<A>(sums[0], load(x + k));
    add_squares<A>(sums[1], load(x + k + kN));
  }
  for (; k < n; k += kN) {
    const auto lanes = first_lanes<A>(std::min(kN, n - k));
    add_squares<A>(sums[0], load_first(x + k, lanes));
  }
  sums[0] += sums[1];
  double sum = 0.0;
  for (int lane = 0; lane < kN; ++lane) sum += sums[0][lane];
  return sum;
}

}  // namespace FUSED_STEP_ISA
