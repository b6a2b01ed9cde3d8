// SPDX-License-Identifier: MIT
// Many steps of one output in one call: the weight and its momentum stay in registers from step to
// step; a step is then a few dozen cycles, and its latency is the chain y -> dW -> W. Included once
// per instruction set and width of vectors (simd.h).

namespace FUSED_STEP_ISA {

// Where the steps are in the data: batches follow each other and start again after the last row.
template <typename T>
struct BatchCursor {
  const SerialSteps<T>& a;
  int64_t row;
  double full_dy_scale;

  explicit FUSED_STEP_INLINE BatchCursor(const SerialSteps<T>& args)
      : a(args),
        row(args.first_row),
        full_dy_scale(mse_dy_scale(args.reduction, args.batch_size, args.params.O)) {}

  FUSED_STEP_INLINE int64_t rows() const { return std::min(a.batch_size, a.data.rows - row); }
  FUSED_STEP_INLINE double dy_scale(int64_t rows) const {
    return rows == a.batch_size ? full_dy_scale : mse_dy_scale(a.reduction, rows, a.params.O);
  }
  FUSED_STEP_INLINE const T* x() const { return a.data.x + row * a.data.x_stride; }
  FUSED_STEP_INLINE const T* target() const { return a.data.target + row * a.data.target_stride; }
  FUSED_STEP_INLINE void advance(int64_t rows) {
    row += rows;
    if (row >= a.data.rows) row = 0;
  }
};

// The step's weight as vectors, the last of them partly filled.
template <typename T, int kVecs>
struct RegisterRow {
  Vec<T> v[kVecs];

  FUSED_STEP_INLINE void read(const T* p, const FirstLanes<T>& last) {
    for (int k = 0; k + 1 < kVecs; ++k) v[k] = load(p + k * kLanes<T>);
    v[kVecs - 1] = load_first(p + (kVecs - 1) * kLanes<T>, last);
  }
  FUSED_STEP_INLINE void write(T* p, const FirstLanes<T>& last) const {
    for (int k = 0; k + 1 < kVecs; ++k) store(p + k * kLanes<T>, v[k]);
    store_first(p + (kVecs - 1) * kLanes<T>, v[kVecs - 1], last);
  }
};

// Sums of one batch. Loss and bias are summed in double: see tile_residuals.
template <typename T, int kVecs>
struct BatchSums {
  RegisterRow<T, kVecs> dweight;
  double dbias;
  double loss;
};

// Adds the sums of n <= kLanes rows; dW of even and odd rows apart, to halve the chain of
// additions.
template <typename T, int kVecs>
FUSED_STEP_INLINE void add_rows(const RegisterRow<T, kVecs>& weight, T bias, T dy_scale,
                                const T* x,  // [n, I]
                                int64_t x_stride,
                                const T* target,  // [n, 1]
                                int64_t target_stride, int n, const FirstLanes<T>& last,
                                BatchSums<T, kVecs>& sums) {
  Vec<T> products[kLanes<T>];
  for (int r = 0; r < kLanes<T>; ++r) {
    RegisterRow<T, kVecs> row;
    row.read(x + (r < n ? r : n - 1) * x_stride, last);
    products[r] = row.v[0] * weight.v[0];
    for (int k = 1; k < kVecs; ++k) products[r] += row.v[k] * weight.v[k];
  }
  Vec<T> r = mse_residual(transpose_sum<T>(products), bias, load_strided(target, target_stride, n));
  if (n < kLanes<T>) r = keep(r, first_lanes<T>(n));
  const Vec<T> dy_vec = mse_dy(r, dy_scale);
  sums.loss += static_cast<double>(lane_sum<T>(mse_term(r)));
  sums.dbias += static_cast<double>(lane_sum<T>(dy_vec));

  T dy[kLanes<T>];
  store(dy, dy_vec);
  RegisterRow<T, kVecs> even{}, odd{};
  for (int k = 0; k < kLanes<T>; ++k) {
    if (k >= n) break;
    RegisterRow<T, kVecs> row;
    row.read(x + k * x_stride, last);
    for (int v = 0; v < kVecs; ++v) (k % 2 == 0 ? even : odd).v[v] += row.v[v] * splat(dy[k]);
  }
  for (int v = 0; v < kVecs; ++v) sums.dweight.v[v] += even.v[v] + odd.v[v];
}

template <typename T, int kVecs>
FUSED_STEP_INLINE void register_steps(const SerialSteps<T>& a) {
  const LinearParams<T>& p = a.params;
  const FirstLanes<T> last = first_lanes<T>(p.I - (kVecs - 1) * kLanes<T>);
  SgdCoefficients<T> weight_c = sgd_coefficients<T>(p.weight_options);
  SgdCoefficients<T> bias_c = sgd_coefficients<T>(p.bias_options);
  RegisterRow<T, kVecs> weight, weight_buf{};
  weight.read(p.weight, last);
  if (weight_c.has_momentum && !weight_c.first_step) weight_buf.read(p.weight_buf, last);
  const bool has_bias = p.bias != nullptr;
  T bias = has_bias ? *p.bias : T(0);
  const bool has_bias_buf = has_bias && bias_c.has_momentum;
  T bias_buf = has_bias_buf && !bias_c.first_step ? *p.bias_buf : T(0);

  BatchCursor<T> at(a);
  for (int64_t step = 0; step < a.steps; ++step) {
    const int64_t rows = at.rows();
    const T dy_scale = static_cast<T>(at.dy_scale(rows));
    const T *x = at.x(), *target = at.target();
    BatchSums<T, kVecs> sums{};
    int64_t row = 0;
    for (; row + kLanes<T> <= rows; row += kLanes<T>) {
      add_rows<T, kVecs>(weight, bias, dy_scale, x + row * a.data.x_stride, a.data.x_stride,
                         target + row * a.data.target_stride, a.data.target_stride, kLanes<T>, last,
                         sums);
    }
    if (row < rows) {
      add_rows<T, kVecs>(weight, bias, dy_scale, x + row * a.data.x_stride, a.data.x_stride,
                         target + row * a.data.target_stride, a.data.target_stride,
                         static_cast<int>(rows - row), last, sums);
    }
    for (int v = 0; v < kVecs; ++v) {
      weight.v[v] = sgd_update(weight.v[v], sums.dweight.v[v], weight_buf.v[v], weight_c);
    }
    // Where x or lr is infinite the empty lanes have become 0 * inf, which the next y would take
    // in.
    weight.v[kVecs - 1] = keep(weight.v[kVecs - 1], last);
    if (has_bias) bias = sgd_update(bias, static_cast<T>(sums.dbias), bias_buf, bias_c);
    weight_c.first_step = bias_c.first_step = false;
    a.losses[step] = static_cast<T>(sums.loss * mse_loss_scale(a.reduction, rows, 1));
    at.advance(rows);
  }

  weight.write(p.weight, last);
  if (weight_c.has_momentum) weight_buf.write(p.weight_buf, last);
  if (has_bias) *p.bias = bias;
  if (has_bias_buf) *p.bias_buf = bias_buf;
}

}  // namespace FUSED_STEP_ISA
