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

// x as it is stored, or widened. Not inlined: one copy serves both types then.
template <bool kOneOutput, typename X>
__attribute__((noinline)) void widened_tile(const OnePassChunk<float>& a, const X* x,
                                            const float* target, int64_t rows, NextTile next,
                                            bool first_tile, float* dx) {
  alignas(64) float dy[(kOneOutput ? 1 : kMaxOnePassOutputs) * kMaxTileRows];
  one_pass_tile<float, kOneOutput>(a, x, target, rows, next, first_tile, dy, dx);
}

template <typename S>
void widened_chunk(const WidenedChunk<S>& a) {
  const int64_t I = a.chunk.I, O = a.chunk.O, rows = a.chunk.batch.rows;
  const int64_t tile = tile_rows(I, sizeof(float));
  const auto row_bytes = a.x_stride * static_cast<int64_t>(sizeof(S));
  const bool prefetch = comes_from_memory(rows, I, O, sizeof(S));
  float* const panel = a.panel;
  float* const target_panel = panel + tile * I;
  OnePassChunk<float> chunk = a.chunk;
  chunk.batch.x_stride = O == 1 ? a.x_stride : I;
  if (a.target != nullptr) chunk.batch.target_stride = O;
  clear_sums(chunk);
  for (int64_t row = 0; row < rows; row += tile) {
    const int64_t n = std::min(tile, rows - row);
    const S* const x = a.x + row * a.x_stride;
    const float* target = target_panel;
    if (a.target != nullptr) {
      widen_rows<S>({a.target + row * a.target_stride, a.target_stride, n, O, target_panel});
    } else {
      target = chunk.batch.target + row * chunk.batch.target_stride;
    }
    const NextTile next{prefetch ? reinterpret_cast<const char*>(x) + n * row_bytes : nullptr,
                        row_bytes};
    // A dx that is rounded is made in the panel, after the last use of x.
    constexpr bool kRounded = !std::is_same_v<Unscaled<S>, float>;
    float* dx = nullptr;
    if (a.dx != nullptr) {
      if constexpr (kRounded) {
        dx = panel;
      } else {
        dx = a.dx + row * I;
      }
    }
    if (O == 1) {  // x is read twice: as often as it would be to widen it and use it once
      widened_tile<true>(chunk, x, target, n, next, row == 0, dx);
    } else {
      widen_rows<S>({x, a.x_stride, n, I, panel});
      widened_tile<false>(chunk, panel, target, n, next, row == 0, dx);
    }
    if constexpr (kRounded) {
      if (dx != nullptr) narrow_row(panel, a.dx + row * I, n * I);
    }
  }
}

}  // namespace FUSED_STEP_ISA
