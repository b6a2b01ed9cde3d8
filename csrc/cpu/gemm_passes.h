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

template <typename T>
void sgd(const SgdPass<T>& a) {
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
    T buf = reads_buf ? a.buf[k] : T(0);
    a.param[k] = sgd_update(a.param[k], a.grad[k], buf, c);
    if (c.has_momentum) a.buf[k] = buf;
  }
}

}  // namespace FUSED_STEP_ISA
