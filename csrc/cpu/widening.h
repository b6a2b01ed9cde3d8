// SPDX-License-Identifier: MIT
// 16-bit tensors under the loops for float: what is stored is widened once, a tile at a time and
// into cache, and what becomes of it is rounded once. With O outputs a tile is read O / 2 times for
// y and O / 4 times for dW; the conversion is paid once, and no loop is compiled a second time.
// Included once per instruction set (see simd.h).

namespace FUSED_STEP_ISA {

template <typename S>
FUSED_STEP_INLINE void widen_row(const S* from, int64_t n, float* to) {
  int64_t k = 0;
  for (; k + kLanes<float> <= n; k += kLanes<float>) store(to + k, load(from + k));
  if (k < n) {
    const FirstLanes<float> lanes = first_lanes<float>(n - k);
    store_first(to + k, load_first(from + k, lanes), lanes);
  }
}

template <typename S>
void widen_rows(const WidenRows<S>& a) {
  if (a.from_stride == a.columns) return widen_row(a.from, a.rows * a.columns, a.to);
  for (int64_t r = 0; r < a.rows; ++r) {
    widen_row(a.from + r * a.from_stride, a.columns, a.to + r * a.columns);
  }
}

template <typename S>
void narrow_row(const float* from, S* to, int64_t n) {
  int64_t k = 0;
  for (; k + kLanes<float> <= n; k += kLanes<float>) store(to + k, load(from + k));
  if (k < n) {
    const FirstLanes<float> lanes = first_lanes<float>(n - k);
    store_first(to + k, load_first(from + k, lanes), lanes);
  }
}

template <typename S>
void widened_chunk(const WidenedChunk<S>& a) {
  const int64_t I = a.chunk.I, O = a.chunk.O, rows = a.chunk.batch.rows;
  const int64_t tile = tile_rows(I, sizeof(float));
  float* const x = a.panel;
  float* const target = x + tile * I;
  clear_sums(a.chunk);
  for (int64_t row = 0; row < rows; row += tile) {
    const int64_t n = std::min(tile, rows - row);
    OnePassChunk<float> part = a.chunk;
    part.batch.rows = n;
    widen_rows<S>({a.x + row * a.x_stride, a.x_stride, n, I, x});
    part.batch.x = x;
    part.batch.x_stride = I;
    if (a.target != nullptr) {
      widen_rows<S>({a.target + row * a.target_stride, a.target_stride, n, O, target});
      part.batch.target = target;
      part.batch.target_stride = O;
    } else {
      part.batch.target += row * part.batch.target_stride;
    }
    if constexpr (std::is_same_v<Unscaled<S>, float>) {
      part.dx = a.dx != nullptr ? a.dx + row * I : nullptr;
      one_pass_rows(part, row == 0);
    } else {
      // dx is made of dL/dy and W, after the last use of x: in its memory.
      part.dx = a.dx != nullptr ? x : nullptr;
      one_pass_rows(part, row == 0);
      if (a.dx != nullptr) narrow_row(x, a.dx + row * I, n * I);
    }
  }
}

}  // namespace FUSED_STEP_ISA
