// SPDX-License-Identifier: MIT
// What the gemm plan does beside its two GEMMs. Included once per instruction set (see simd.h).

namespace FUSED_STEP_ISA {

// Columns [o, o + one vector), or its first lanes: residuals, loss and the bias' sums. Rows are
// summed 64 at a time and then in double, so that the error does not grow with the batch.
template <typename T>
FUSED_STEP_INLINE void residual_columns(const ResidualChunk<T>& a, int64_t o,
                                        const FirstLanes<T>& lanes, bool whole) {
  constexpr int64_t kRows = 64;
  const T dy_scale = static_cast<T>(a.dy_scale);
  Vec<T> bias{};
  if (a.bias != nullptr) bias = whole ? load(a.bias + o) : load_first(a.bias + o, lanes);
  for (int64_t row = 0; row < a.rows; row += kRows) {
    const int64_t end = std::min(row + kRows, a.rows);
    Vec<T> loss{}, dbias{};
    for (int64_t k = row; k < end; ++k) {
      T* const y = a.y + k * a.O + o;
      const T* const t = a.target + k * a.target_stride + o;
      const Vec<T> r = whole ? mse_residual(load(y), bias, load(t))
                             : mse_residual(load_first(y, lanes), bias, load_first(t, lanes));
      const Vec<T> dy = mse_dy(r, dy_scale);
      loss += mse_term(r);
      dbias += dy;
      whole ? store(y, dy) : store_first(y, dy, lanes);
    }
    *a.loss += static_cast<double>(lane_sum<T>(loss));
    T sums[kLanes<T>];
    store(sums, dbias);
    for (int k = 0; k < lanes.n; ++k) a.dbias[o + k] += static_cast<double>(sums[k]);
  }
}

template <typename T>
void residual_chunk(const ResidualChunk<T>& a) {
  *a.loss = 0.0;
  for (int64_t o = 0; o < a.O; ++o) a.dbias[o] = 0.0;
  int64_t o = 0;
  for (; o + kLanes<T> <= a.O; o += kLanes<T>) {
    residual_columns(a, o, first_lanes<T>(kLanes<T>), true);
  }
  if (o < a.O) residual_columns(a, o, first_lanes<T>(a.O - o), false);
}

// Elementwise passes: `Rule` takes p, grad and buf of one element or vector and changes p and buf.
template <typename T, typename Rule>
FUSED_STEP_INLINE void for_each_element(const SgdPass<T>& a, bool reads_buf, bool writes_buf,
                                        const Rule& rule) {
  int64_t k = 0;
  for (; k + kLanes<T> <= a.n; k += kLanes<T>) {
    Vec<T> p = load(a.param + k), buf{};
    const Vec<T> grad = a.grad != nullptr ? load(a.grad + k) : Vec<T>{};
    if (reads_buf) buf = load(a.buf + k);
    rule(p, grad, buf);
    store(a.param + k, p);
    if (writes_buf) store(a.buf + k, buf);
  }
  for (; k < a.n; ++k) {
    T p = a.param[k], buf = reads_buf ? a.buf[k] : T(0);
    rule(p, a.grad != nullptr ? a.grad[k] : T(0), buf);
    a.param[k] = p;
    if (writes_buf) a.buf[k] = buf;
  }
}

template <typename T>
struct SgdRule {
  SgdCoefficients<T> c;
  template <typename V>
  FUSED_STEP_INLINE void operator()(V& p, const V& grad, V& buf) const {
    p = sgd_update(p, grad, buf, c);
  }
};

template <typename T>
void sgd(const SgdPass<T>& a) {
  const SgdRule<T> rule{sgd_coefficients<T>(a.options)};
  for_each_element(a, rule.c.has_momentum && !rule.c.first_step, rule.c.has_momentum, rule);
}

template <typename T>
struct BeforeGemmRule {
  SgdCoefficients<T> c;
  template <typename V>
  FUSED_STEP_INLINE void operator()(V& p, const V&, V& buf) const {
    fused_step::momentum_before_gemm(p, buf, c);
  }
};

template <typename T>
void momentum_before_gemm(const SgdPass<T>& a) {
  const BeforeGemmRule<T> rule{sgd_coefficients<T>(a.options)};
  for_each_element(a, !rule.c.first_step, true, rule);
}

template <typename T>
struct AfterGemmRule {
  SgdCoefficients<T> c;
  template <typename V>
  FUSED_STEP_INLINE void operator()(V& p, const V&, V& buf) const {
    p = fused_step::momentum_after_gemm(p, buf, c);
  }
};

template <typename T>
void momentum_after_gemm(const SgdPass<T>& a) {
  const AfterGemmRule<T> rule{sgd_coefficients<T>(a.options)};
  for_each_element(a, true, false, rule);
}

}  // namespace FUSED_STEP_ISA
