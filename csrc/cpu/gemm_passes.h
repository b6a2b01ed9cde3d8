// SPDX-License-Identifier: MIT
// What the gemm plan does beside its two GEMMs. Included once per instruction set (see simd.h).

namespace FUSED_STEP_ISA {

// kRows rows at columns [o, o + one vector), or its first lanes: residuals, loss, the bias' sums.
template <typename S, int kRows, bool kTail>
FUSED_STEP_INLINE void residual_block(const ResidualChunk<S>& a, int64_t row, int64_t o,
                                      const FirstLanes<Accum<S>>& lanes, WideVec<Accum<S>>& loss) {
  using T = Accum<S>;
  Vec<T> bias{}, dbias{}, terms{};
  if (a.bias != nullptr) bias = kTail ? load_first(a.bias + o, lanes) : load(a.bias + o);
  for (int k = 0; k < kRows; ++k) {
    T* const y = a.y + (row + k) * a.O + o;
    const S* const t = a.target + (row + k) * a.target_stride + o;
    const Vec<T> r = kTail ? mse_residual(load_first(y, lanes), bias, load_first(t, lanes))
                           : mse_residual(load(y), bias, load(t));
    const Vec<T> dy = mse_dy(r, static_cast<T>(a.dy_scale));
    terms += mse_term(r);
    dbias += dy;
    if constexpr (kTail) {
      store_first(y, dy, lanes);
    } else {
      store(y, dy);
    }
  }
  loss += widened<T>(terms);
  if constexpr (kTail) {
    for (int k = 0; k < lanes.n; ++k) a.dbias[o + k] += static_cast<double>(dbias[k]);
  } else {
    add_widened<T>(a.dbias + o, dbias);
  }
}

// Rows one after the other, as the prefetcher likes them; sums go into double every kRows rows, so
// that their error does not grow with the sizes.
template <typename S, int kRows>
FUSED_STEP_INLINE void residual_rows(const ResidualChunk<S>& a, int64_t row) {
  using T = Accum<S>;
  WideVec<T> loss{};
  int64_t o = 0;
  for (; o + kLanes<T> <= a.O; o += kLanes<T>) {
    residual_block<S, kRows, false>(a, row, o, first_lanes<T>(kLanes<T>), loss);
  }
  if (o < a.O) residual_block<S, kRows, true>(a, row, o, first_lanes<T>(a.O - o), loss);
  for (int k = 0; k < kLanes<T>; ++k) *a.loss += loss[k];
}

template <typename S>
void residual_chunk(const ResidualChunk<S>& a) {
  *a.loss = 0.0;
  for (int64_t o = 0; o < a.O; ++o) a.dbias[o] = 0.0;
  int64_t row = 0;
  for (; row + 4 <= a.rows; row += 4) residual_rows<S, 4>(a, row);
  for (; row < a.rows; ++row) residual_rows<S, 1>(a, row);
}

template <typename S>
void sgd(const SgdPass<S>& a) {
  using T = Accum<S>;
  const SgdCoefficients<T> c = sgd_coefficients<T>(a.options);
  const bool reads_buf = c.has_momentum && !c.first_step;
  int64_t k = 0;
  for (; k + kLanes<T> <= a.n; k += kLanes<T>) {
    Vec<T> buf{};
    if (reads_buf) buf = load(a.buf + k);
    store(a.param + k, sgd_update(load(a.param + k), load(a.grad + k), buf, c));
    if (c.has_momentum) store(a.buf + k, buf);
  }
  for (; k < a.n; ++k) {
    T buf = reads_buf ? widen(a.buf[k]) : T(0);
    a.param[k] = narrow<S>(sgd_update(widen(a.param[k]), a.grad[k], buf, c));
    if (c.has_momentum) a.buf[k] = narrow<S>(buf);
  }
}

}  // namespace FUSED_STEP_ISA
