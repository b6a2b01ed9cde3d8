// SPDX-License-Identifier: MIT
// The one-pass plan: each tile of rows is read for y and, while it is in cache, again for dW; its
// dx needs only dL/dy and W. Included once per instruction set (see simd.h).

namespace FUSED_STEP_ISA {

// A block of dot products has as many accumulators as a vector has lanes, so that transpose_sum
// gives all sums as one vector. With several outputs it has at most four rows; with one, as many as
// there are: few rows have several accumulators each, for vectors side by side.
template <typename T, int kRows, int kOutputs>
constexpr int kDotVecs = kLanes<T> / (kRows * kOutputs);
template <typename T>
constexpr int kMinDotRows = std::min(4, kLanes<T>);

// The rows of a block. All there: four addresses from each of two pointers and a stride, which is
// all that the 16 general registers have room for. Ragged: rows beyond the last repeat it.
template <typename T, int kRows, bool kRagged>
class BlockRows {
 public:
  FUSED_STEP_INLINE BlockRows(const T* x, int64_t stride, int rows) : stride_(stride) {
    if constexpr (kRagged) {
      for (int r = 0; r < kRows; ++r) at_[r] = x + (r < rows ? r : rows - 1) * stride;
    } else {
      for (int r = 0; r < kRows; r += 4) at_[r / 4] = x + r * stride;
    }
  }
  FUSED_STEP_INLINE const T* operator[](int r) const {
    return kRagged ? at_[r] : at_[r / 4] + r % 4 * stride_;
  }

 private:
  const T* at_[kRagged ? kRows : (kRows + 3) / 4];
  int64_t stride_;
};

// Adds the products of one vector of columns of the block's rows and outputs.
template <typename T, int kRows, int kOutputs, bool kTail, typename X, typename W>
FUSED_STEP_INLINE void add_products(const X& x, const W& weight, int64_t i,
                                    const FirstLanes<T>& lanes, Vec<T>* acc) {  // [kOutputs, kRows]
  Vec<T> w[kOutputs];
  for (int p = 0; p < kOutputs; ++p) {
    w[p] = kTail ? load_first(weight[p] + i, lanes) : load(weight[p] + i);
  }
  for (int r = 0; r < kRows; ++r) {
    const Vec<T> x_r = kTail ? load_first(x[r] + i, lanes) : load(x[r] + i);
    for (int p = 0; p < kOutputs; ++p) acc[p * kRows + r] += x_r * w[p];
  }
}

// Dot products of the block's rows with its rows of W; lane p * kRows + row. In a ragged block the
// lanes of missing rows and outputs are of no use.
template <typename T, int kRows, int kOutputs, bool kRagged, typename X>
FUSED_STEP_INLINE Vec<T> dot_block(const X* x,  // [rows, I]
                                   int64_t x_stride, int rows,
                                   const T* weight,  // [outputs, I]
                                   int outputs, int64_t I) {
  constexpr int kVecs = kDotVecs<T, kRows, kOutputs>, kSums = kRows * kOutputs;
  const BlockRows<X, kRows, kRagged> x_rows(x, x_stride, rows);
  const BlockRows<T, kOutputs, kRagged> w_rows(weight, I, outputs);
  Vec<T> acc[kLanes<T>];
  for (auto& a : acc) a = Vec<T>{};
  int64_t i = 0;
  for (; i + kVecs * kLanes<T> <= I; i += kVecs * kLanes<T>) {
    for (int v = 0; v < kVecs; ++v) {
      add_products<T, kRows, kOutputs, false>(x_rows, w_rows, i + v * kLanes<T>, FirstLanes<T>{},
                                              acc + v * kSums);
    }
  }
  for (; kVecs > 1 && i + kLanes<T> <= I; i += kLanes<T>) {
    add_products<T, kRows, kOutputs, false>(x_rows, w_rows, i, FirstLanes<T>{}, acc);
  }
  if (i < I) {
    add_products<T, kRows, kOutputs, true>(x_rows, w_rows, i, first_lanes<T>(I - i), acc);
  }
  return transpose_sum<T>(acc);
}

// Puts the lanes of a block's sums into the columns of `products`.
template <typename T, int kRows, int kOutputs>
FUSED_STEP_INLINE void store_sums(const Vec<T>& sums, int outputs,
                                  T* products) {  // [outputs, kMaxTileRows]
  if constexpr (kRows == kLanes<T>) {
    store(products, sums);
  } else {
    T lanes[kLanes<T>];
    store(lanes, sums);
    for (int p = 0; p < outputs; ++p) {
      for (int r = 0; r < kRows; ++r) {
        T sum = lanes[p * kRows + r];
        for (int v = 1; v < kDotVecs<T, kRows, kOutputs>; ++v) {
          sum += lanes[(v * kOutputs + p) * kRows + r];
        }
        products[p * kMaxTileRows + r] = sum;
      }
    }
  }
}

// The products of one block, whose first row is x and first output o.
template <typename T, int kRows, int kOutputs, bool kRagged, typename X>
FUSED_STEP_INLINE void block_products(const OnePassChunk<T>& a, const X* x, int64_t rows, int64_t o,
                                      T* products) {  // [outputs, kMaxTileRows]
  const int outputs = static_cast<int>(std::min<int64_t>(kOutputs, a.O - o));
  store_sums<T, kRows, kOutputs>(
      dot_block<T, kRows, kOutputs, kRagged>(x, a.batch.x_stride, static_cast<int>(rows),
                                             a.weight + o * a.I, outputs, a.I),
      outputs, products);
}

// The products of the rows from `row` on with the one row of W: in blocks of kRows while there are
// as many, then in blocks of half.
template <typename T, int kRows, typename X>
FUSED_STEP_INLINE void row_products(const OnePassChunk<T>& a, const X* x, int64_t row, int64_t rows,
                                    T* products) {
  const int64_t x_stride = a.batch.x_stride;
  for (; row + kRows <= rows; row += kRows) {
    block_products<T, kRows, 1, false>(a, x + row * x_stride, kRows, 0, products + row);
  }
  if constexpr (kRows > kMinDotRows<T>) {
    row_products<T, kRows / 2>(a, x, row, rows, products);
  } else if (row < rows) {
    block_products<T, kRows, 1, true>(a, x + row * x_stride, rows - row, 0, products + row);
  }
}

// The products of a block's rows with the rows of W from o on, likewise; three outputs of four take
// one block and not two, since in short rows most of its time goes into the sums' transposition.
template <typename T, int kOutputs, bool kRagged, typename X>
FUSED_STEP_INLINE void output_products(const OnePassChunk<T>& a, const X* x, int64_t rows,
                                       int64_t o, T* products) {  // [O, kMaxTileRows]
  constexpr int kRows = kMinDotRows<T>;
  for (; o + kOutputs <= a.O; o += kOutputs) {
    block_products<T, kRows, kOutputs, kRagged>(a, x, rows, o, products + o * kMaxTileRows);
  }
  if constexpr (kOutputs == 4) {
    if (o + 3 == a.O) {
      return block_products<T, kRows, 4, true>(a, x, rows, o, products + o * kMaxTileRows);
    }
  }
  if constexpr (kOutputs > 1) output_products<T, kOutputs / 2, kRagged>(a, x, rows, o, products);
}

// products[o * kMaxTileRows + row] = x_row . W_o.
template <typename T, bool kOneOutput, typename X>
FUSED_STEP_INLINE void tile_products(const OnePassChunk<T>& a, const X* x, int64_t rows,
                                     T* products) {
  if constexpr (kOneOutput) {
    row_products<T, kLanes<T>>(a, x, 0, rows, products);
  } else {
    constexpr int kRows = kMinDotRows<T>, kOutputs = kLanes<T> / kRows;
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) {
      output_products<T, kOutputs, false>(a, x + row * a.batch.x_stride, kRows, 0, products + row);
    }
    if (row < rows) {
      output_products<T, kOutputs, true>(a, x + row * a.batch.x_stride, rows - row, 0,
                                         products + row);
    }
  }
}

// products become dL/dy; adds to the sums of the bias and of the loss.
template <typename T>
FUSED_STEP_INLINE void tile_residuals(const OnePassChunk<T>& a, const T* target, int64_t rows,
                                      T* products) {
  const T dy_scale = static_cast<T>(a.dy_scale);
  for (int64_t o = 0; o < a.O; ++o) {
    const T bias = a.bias != nullptr ? a.bias[o] : T(0);
    T* column = products + o * kMaxTileRows;
    Vec<T> loss{}, dbias{};
    for (int64_t row = 0; row < rows; row += kLanes<T>) {
      const int64_t n = std::min<int64_t>(kLanes<T>, rows - row);
      const Vec<T> t =
          load_strided(target + row * a.batch.target_stride + o, a.batch.target_stride, n);
      Vec<T> r = mse_residual(load(column + row), bias, t);
      if (n < kLanes<T>) r = keep(r, first_lanes<T>(n));
      const Vec<T> dy = mse_dy(r, dy_scale);
      loss += mse_term(r);
      dbias += dy;
      store(column + row, dy);
    }
    // A tile's sum is at most 64 terms; tiles are added in double, so that the error of loss and
    // bias does not grow with the number of rows.
    *a.partial.loss += static_cast<double>(lane_sum<T>(loss));
    a.partial.dbias[o] += static_cast<double>(lane_sum<T>(dbias));
  }
}

// How many rows are summed apart, so that about 8 chains of additions run at once: an FMA takes 4
// cycles and two start in each.
template <int kOutputs, int kVecs>
constexpr int kRowSplit = kOutputs * kVecs >= 8 ? 1 : (kOutputs * kVecs >= 4 ? 2 : 4);

// The tile of x after this one, as it is stored; null: not to be prefetched.
struct NextTile {
  const char* at;
  int64_t row_bytes;
};

// dW[kOutputs, kVecs vectors] (+)= dy^T x over the rows of a tile; the tile is summed first and
// then added, which bounds the error by rows/tile + tile rather than by rows. `kTail`: the one
// vector has only the first lanes of x; dweight's rows are padded to whole vectors. Of each row of
// the next tile one line is prefetched.
template <typename T, int kOutputs, int kVecs, bool kTail, typename X>
FUSED_STEP_INLINE void outer_block(const X* x, int64_t x_stride, int64_t rows, NextTile next,
                                   const T* dy,  // [kOutputs, kMaxTileRows]
                                   const FirstLanes<T>& lanes, bool first_tile,
                                   T* dweight,  // [kOutputs, stride]
                                   int64_t stride) {
  constexpr int kSplit = kRowSplit<kOutputs, kVecs>;
  Vec<T> acc[kSplit][kOutputs][kVecs];
  for (auto& part : acc) {
    for (auto& output : part) {
      for (auto& a : output) a = Vec<T>{};
    }
  }
  const auto add_row = [&](int64_t row, Vec<T>(&part)[kOutputs][kVecs]) {
    Vec<T> x_row[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      const X* const at = x + row * x_stride + v * kLanes<T>;
      x_row[v] = kTail ? load_first(at, lanes) : load(at);
    }
    for (int p = 0; p < kOutputs; ++p) {
      const Vec<T> dy_p = splat(dy[p * kMaxTileRows + row]);
      for (int v = 0; v < kVecs; ++v) part[p][v] += x_row[v] * dy_p;
    }
  };
  int64_t row = 0;
  if (next.at != nullptr) {
    for (; row + kSplit <= rows; row += kSplit) {
      for (int k = 0; k < kSplit; ++k) {
        __builtin_prefetch(next.at + (row + k) * next.row_bytes);
        add_row(row + k, acc[k]);
      }
    }
  }
  for (; row + kSplit <= rows; row += kSplit) {
    for (int k = 0; k < kSplit; ++k) add_row(row + k, acc[k]);
  }
  for (; row < rows; ++row) add_row(row, acc[0]);
  for (int p = 0; p < kOutputs; ++p) {
    for (int v = 0; v < kVecs; ++v) {
      for (int k = 1; k < kSplit; ++k) acc[0][p][v] += acc[k][p][v];
      T* const out = dweight + p * stride + v * kLanes<T>;
      store(out, first_tile ? acc[0][p][v] : load(out) + acc[0][p][v]);
    }
  }
}

// The outputs from o on of kVecs vectors of columns from i on, kOutputs at a time, then half.
template <typename T, int kOutputs, int kVecs, bool kTail, typename X>
FUSED_STEP_INLINE void outer_outputs(const OnePassChunk<T>& a, const X* x, int64_t rows,
                                     NextTile next, const T* dy, const FirstLanes<T>& lanes,
                                     int64_t o, bool first_tile, T* dweight) {
  const int64_t stride = partial_stride(a.I);
  for (; o + kOutputs <= a.O; o += kOutputs) {
    outer_block<T, kOutputs, kVecs, kTail>(x, a.batch.x_stride, rows, o == 0 ? next : NextTile{},
                                           dy + o * kMaxTileRows, lanes, first_tile,
                                           dweight + o * stride, stride);
  }
  if constexpr (kOutputs > 1) {
    outer_outputs<T, kOutputs / 2, kVecs, kTail>(a, x, rows, next, dy, lanes, o, first_tile,
                                                 dweight);
  }
}

// All outputs of kVecs vectors of columns from i on.
template <typename T, bool kOneOutput, int kVecs, bool kTail = false, typename X>
FUSED_STEP_INLINE void outer_columns(const OnePassChunk<T>& a, const X* x, int64_t rows,
                                     NextTile next, const T* dy, int64_t i, bool first_tile) {
  outer_outputs<T, kOneOutput ? 1 : 4, kVecs, kTail>(a, x + i, rows, next, dy,
                                                     first_lanes<T>(kTail ? a.I - i : kLanes<T>), 0,
                                                     first_tile, a.partial.dweight + i);
}

// Each block of columns prefetches one line of each row of the next tile, from the first on. With
// one output these are a quarter of the tile (half of a 16-bit one; with AVX-512 half as much),
// about what memory delivers during this phase; the y phase then runs at the speed of memory by
// itself.
template <typename T, bool kOneOutput, typename X>
FUSED_STEP_INLINE void tile_outer(const OnePassChunk<T>& a, const X* x, int64_t rows, NextTile next,
                                  const T* dy, bool first_tile) {
  // Accumulators: 1 x 8 or 4 x 2 vectors, beside which x and dy find room in 16 registers.
  constexpr int kVecs = kOneOutput ? 8 : 2;
  constexpr int64_t kLine = 64;
  int64_t i = 0;
  for (; i + kVecs * kLanes<T> <= a.I; i += kVecs * kLanes<T>) {
    outer_columns<T, kOneOutput, kVecs>(a, x, rows, next, dy, i, first_tile);
    if (next.at != nullptr) next.at += kLine;
  }
  if (kOneOutput && i + 4 * kLanes<T> <= a.I) {
    outer_columns<T, kOneOutput, 4>(a, x, rows, NextTile{}, dy, i, first_tile);
    i += 4 * kLanes<T>;
  }
  for (; i + kLanes<T> <= a.I; i += kLanes<T>) {
    outer_columns<T, kOneOutput, 1>(a, x, rows, NextTile{}, dy, i, first_tile);
  }
  if (i < a.I) outer_columns<T, kOneOutput, 1, true>(a, x, rows, NextTile{}, dy, i, first_tile);
}

// dx[kRows, kVecs vectors] = dy W. `kTail`: the one vector has only the first lanes.
template <typename T, int kRows, int kVecs, bool kTail>
FUSED_STEP_INLINE void input_grad_block(const OnePassChunk<T>& a,
                                        const T* dy,  // [O, kMaxTileRows], from the first row on
                                        int64_t i, const FirstLanes<T>& lanes,
                                        T* dx) {  // [kRows, I], from column i on
  Vec<T> acc[kRows][kVecs];
  for (auto& row : acc) {
    for (auto& v : row) v = Vec<T>{};
  }
  for (int64_t o = 0; o < a.O; ++o) {
    const T* const weight = a.weight + o * a.I + i;
    Vec<T> w[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      w[v] = kTail ? load_first(weight, lanes) : load(weight + v * kLanes<T>);
    }
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> dy_r = splat(dy[o * kMaxTileRows + r]);
      for (int v = 0; v < kVecs; ++v) acc[r][v] += w[v] * dy_r;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      T* const out = dx + r * a.I + v * kLanes<T>;
      kTail ? store_first(out, acc[r][v], lanes) : store(out, acc[r][v]);
    }
  }
}

template <typename T, int kRows>
FUSED_STEP_INLINE void input_grad_rows(const OnePassChunk<T>& a, const T* dy, T* dx) {
  // 4 x 2 accumulators, beside which W and dy find room in 16 registers.
  constexpr int kVecs = 2;
  int64_t i = 0;
  for (; i + kVecs * kLanes<T> <= a.I; i += kVecs * kLanes<T>) {
    input_grad_block<T, kRows, kVecs, false>(a, dy, i, FirstLanes<T>{}, dx + i);
  }
  for (; i + kLanes<T> <= a.I; i += kLanes<T>) {
    input_grad_block<T, kRows, 1, false>(a, dy, i, FirstLanes<T>{}, dx + i);
  }
  if (i < a.I) input_grad_block<T, kRows, 1, true>(a, dy, i, first_lanes<T>(a.I - i), dx + i);
}

template <typename T>
FUSED_STEP_INLINE void tile_input_grads(const OnePassChunk<T>& a, int64_t rows, const T* dy,
                                        T* dx) {  // [rows, I]
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) input_grad_rows<T, 4>(a, dy + row, dx + row * a.I);
  for (; row < rows; ++row) input_grad_rows<T, 1>(a, dy + row, dx + row * a.I);
}

// Whether the rows of a chunk are worth prefetching.
FUSED_STEP_INLINE bool comes_from_memory(int64_t rows, int64_t I, int64_t O,
                                         int64_t element_bytes) {
  return O <= kPrefetchMaxOutputs && rows * I * element_bytes >= kPrefetchMinBytes;
}

// One tile; adds its sums to those of the tiles before, the first of which sets dW. x may be 16
// bit.
template <typename T, bool kOneOutput, typename X>
FUSED_STEP_INLINE void one_pass_tile(const OnePassChunk<T>& a, const X* x, const T* target,
                                     int64_t rows, NextTile next, bool first_tile,
                                     T* dy,  // workspace: [O, kMaxTileRows]
                                     T* dx) {
  if (!kOneOutput || !try_short_tile<T>(a, x, target, rows, first_tile, dy)) {
    tile_products<T, kOneOutput>(a, x, rows, dy);
    tile_residuals(a, target, rows, dy);
    if (a.partial.dweight != nullptr) tile_outer<T, kOneOutput>(a, x, rows, next, dy, first_tile);
  }
  if (dx != nullptr) tile_input_grads(a, rows, dy, dx);
}

template <typename T, bool kOneOutput>
FUSED_STEP_INLINE void one_pass_tiles(const OnePassChunk<T>& a) {
  const int64_t tile = tile_rows(a.I, sizeof(T));
  const Rows<T>& b = a.batch;
  const auto row_bytes = b.x_stride * static_cast<int64_t>(sizeof(T));
  const bool prefetch = comes_from_memory(b.rows, a.I, a.O, sizeof(T));
  alignas(64) T dy[(kOneOutput ? 1 : kMaxOnePassOutputs) * kMaxTileRows];
  for (int64_t row = 0; row < b.rows; row += tile) {
    const int64_t n = std::min(tile, b.rows - row);
    const T* const x = b.x + row * b.x_stride;
    // Past the chunk's end it is the first tile of the next chunk, or nobody's: harmless.
    const NextTile next{prefetch ? reinterpret_cast<const char*>(x) + n * row_bytes : nullptr,
                        row_bytes};
    one_pass_tile<T, kOneOutput>(a, x, b.target + row * b.target_stride, n, next, row == 0, dy,
                                 a.dx != nullptr ? a.dx + row * a.I : nullptr);
  }
}

template <typename T>
FUSED_STEP_INLINE void clear_sums(const OnePassChunk<T>& a) {
  *a.partial.loss = 0.0;
  for (int64_t o = 0; o < a.O; ++o) a.partial.dbias[o] = 0.0;
  if (a.batch.rows == 0 && a.partial.dweight != nullptr) {
    for (int64_t k = 0; k < a.O * partial_stride(a.I); ++k) a.partial.dweight[k] = T(0);
  }
}

template <typename T>
void one_pass_chunk(const OnePassChunk<T>& a) {
  clear_sums(a);
  a.O == 1 ? one_pass_tiles<T, true>(a) : one_pass_tiles<T, false>(a);
}

// The sum of all chunks, in order, from `partial` on.
template <typename T, int kCount>
FUSED_STEP_INLINE void sum_chunks(const T* partial, int64_t chunks, int64_t chunk_stride,
                                  Vec<T> (&sum)[kCount]) {
  for (int v = 0; v < kCount; ++v) sum[v] = load(partial + v * kLanes<T>);
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    partial += chunk_stride;
    for (int v = 0; v < kCount; ++v) sum[v] += load(partial + v * kLanes<T>);
  }
}

// Calls block(o, i, kVecs) for columns [i, i + kVecs vectors) of row o, and with kVecs = 0 for
// those up to i_end, fewer than a vector.
template <typename T, typename Block>
FUSED_STEP_INLINE void for_each_block(int64_t o_begin, int64_t o_end, int64_t i_begin,
                                      int64_t i_end, const Block& block) {
  for (int64_t o = o_begin; o < o_end; ++o) {
    int64_t i = i_begin;
    for (; i + 4 * kLanes<T> <= i_end; i += 4 * kLanes<T>) {
      block(o, i, std::integral_constant<int, 4>());
    }
    for (; i + kLanes<T> <= i_end; i += kLanes<T>) block(o, i, std::integral_constant<int, 1>());
    if (i < i_end) block(o, i, std::integral_constant<int, 0>());
  }
}

template <typename S, int kVecs>
FUSED_STEP_INLINE void update_columns(const OnePassUpdate<S>& a, const SgdCoefficients<Accum<S>>& c,
                                      int64_t o, int64_t i, int64_t i_end) {
  using T = Accum<S>;
  constexpr int kCount = kVecs > 0 ? kVecs : 1;
  Vec<T> grad[kCount];
  sum_chunks<T, kCount>(a.dweight + o * partial_stride(a.params.I) + i, a.chunks, a.chunk_stride,
                        grad);
  const FirstLanes<T> lanes = first_lanes<T>(kVecs > 0 ? kLanes<T> : i_end - i);
  for (int v = 0; v < kCount; ++v) {
    const int64_t at = o * a.params.I + i + v * kLanes<T>;
    S* const weight = a.params.weight + at;
    S* const momentum = c.has_momentum ? a.params.weight_buf + at : nullptr;
    Vec<T> buf{};
    if constexpr (kVecs > 0) {
      if (c.has_momentum && !c.first_step) buf = load(momentum);
      store(weight, sgd_update(load(weight), grad[v], buf, c));
      if (c.has_momentum) store(momentum, buf);
    } else {
      if (c.has_momentum && !c.first_step) buf = load_first(momentum, lanes);
      store_first(weight, sgd_update(load_first(weight, lanes), grad[v], buf, c), lanes);
      if (c.has_momentum) store_first(momentum, buf, lanes);
    }
  }
}

template <typename S>
void one_pass_update(const OnePassUpdate<S>& a, int64_t o_begin, int64_t o_end, int64_t i_begin,
                     int64_t i_end) {
  using T = Accum<S>;
  const SgdCoefficients<T> c = sgd_coefficients<T>(a.params.weight_options);
  for_each_block<T>(o_begin, o_end, i_begin, i_end, [&](int64_t o, int64_t i, auto vecs) {
    update_columns<S, decltype(vecs)::value>(a, c, o, i, i_end);
  });
}

template <typename T, int kVecs>
FUSED_STEP_INLINE void grad_columns(const OnePassGrad<T>& a, int64_t o, int64_t i, int64_t i_end) {
  constexpr int kCount = kVecs > 0 ? kVecs : 1;
  Vec<T> grad[kCount];
  sum_chunks<T, kCount>(a.dweight + o * partial_stride(a.I) + i, a.chunks, a.chunk_stride, grad);
  T* const out = a.sum + o * a.I + i;
  if constexpr (kVecs > 0) {
    for (int v = 0; v < kCount; ++v) store(out + v * kLanes<T>, grad[v]);
  } else {
    store_first(out, grad[0], first_lanes<T>(i_end - i));
  }
}

template <typename T>
void one_pass_grad(const OnePassGrad<T>& a, int64_t o_begin, int64_t o_end, int64_t i_begin,
                   int64_t i_end) {
  for_each_block<T>(o_begin, o_end, i_begin, i_end, [&](int64_t o, int64_t i, auto vecs) {
    grad_columns<T, decltype(vecs)::value>(a, o, i, i_end);
  });
}

}  // namespace FUSED_STEP_ISA
