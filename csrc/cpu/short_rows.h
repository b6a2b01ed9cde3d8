// SPDX-License-Identifier: MIT
// One-pass of one output where a row is a few vectors: rows stay in registers between y and dW, so
// that each is loaded, and widened, once. Included once per instruction set (simd.h).

namespace FUSED_STEP_ISA {

// A group of rows, W and dW take 24 of 32 registers, or up to 14 of 16. One vector of 64 bytes is
// left to the blocks of 16 rows, which one transposition sums: 512 x 16 took 0.8 us here, 0.66
// there.
constexpr int kMinShortVecs = kVectorBytes == 64 ? 2 : 1;
constexpr int kMaxShortVecs = kVectorBytes == 64 ? 4 : 2;

// A group has as many rows as 128 bits have lanes. What belongs to each of its rows is computed in
// those: where longer vectors take two cycles, a shorter one takes one.
template <typename T>
constexpr int kGroupRows = 16 / static_cast<int>(sizeof(T));

template <typename T, int kCount>
struct ShortVecOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};
template <typename T>
using Group = typename ShortVecOf<T, kGroupRows<T>>::type;

// By memcpy: of shuffles gcc 12 makes some that cross a whole vector.
template <typename T, int kCount>
FUSED_STEP_INLINE auto sum_of_halves(const typename ShortVecOf<T, 2 * kCount>::type& v) {
  typename ShortVecOf<T, kCount>::type halves[2];
  __builtin_memcpy(halves, &v, sizeof(v));
  return halves[0] + halves[1];
}

// The sum over the lanes of each vector. Overwrites acc.
template <typename T>
FUSED_STEP_INLINE Group<T> group_sums(Vec<T> (&acc)[kGroupRows<T>]) {
  constexpr int kRows = kGroupRows<T>;
  if constexpr (kRows == 4) {
    acc[0] = add_halves<T, 4, 4>(acc[0], acc[1]);
    acc[1] = add_halves<T, 4, 4>(acc[2], acc[3]);
  }
  const Vec<T> sums = add_halves<T, kRows, 2>(acc[0], acc[1]);
  if constexpr (kLanes<T> == 4 * kRows) {
    return sum_of_halves<T, kRows>(sum_of_halves<T, 2 * kRows>(sums));
  } else if constexpr (kLanes<T> == 2 * kRows) {
    return sum_of_halves<T, kRows>(sums);
  } else {
    return sums;
  }
}

// n elements at p, p + stride, ...; zero beyond them.
template <typename T>
FUSED_STEP_INLINE Group<T> load_group(const T* p, int64_t stride, int n) {
  Group<T> group{};
  if (stride == 1 && n == kGroupRows<T>) {
    __builtin_memcpy(&group, p, sizeof(group));
  } else {
    for (int k = 0; k < kGroupRows<T>; ++k) {
      if (k < n) group[k] = p[k * stride];
    }
  }
  return group;
}

// A row's vectors, the last of them with its first lanes alone where the row ends within it.
template <typename T, int kVecs, bool kTail, typename X>
FUSED_STEP_INLINE void load_row(const X* x, const FirstLanes<T>& last, Vec<T> (&row)[kVecs]) {
  for (int v = 0; v < kVecs; ++v) {
    const X* const at = x + v * kLanes<T>;
    row[v] = kTail && v == kVecs - 1 ? load_first(at, last) : load(at);
  }
}

// How many rows of a group add to a sum of their own: an FMA takes 4 cycles.
template <typename T, int kVecs>
constexpr int kGroupSplit = kVecs >= 3 ? 1 : std::min(4 / kVecs, kGroupRows<T>);

template <typename T, int kVecs>
struct ShortSums {
  Vec<T> dweight[kGroupSplit<T, kVecs>][kVecs];
  Group<T> loss, dbias;
};

// Adds the sums of n rows.
template <typename T, int kVecs, bool kTail, bool kRagged, typename X>
FUSED_STEP_INLINE void add_group(const OnePassChunk<T>& a, const Vec<T> (&weight)[kVecs], T bias,
                                 T dy_scale, const X* x, const T* target, int n,
                                 const FirstLanes<T>& last, ShortSums<T, kVecs>& sums,
                                 T* dy) {  // [kGroupRows]
  constexpr int kRows = kGroupRows<T>;
  Vec<T> rows[kRows][kVecs], acc[kRows];
  for (int r = 0; r < kRows; ++r) {
    load_row<T, kVecs, kTail>(x, last, rows[r]);
    if (!kRagged || r + 1 < n) x += a.batch.x_stride;
    acc[r] = rows[r][0] * weight[0];
    for (int v = 1; v < kVecs; ++v) acc[r] += rows[r][v] * weight[v];
  }
  const Group<T> t = load_group(target, a.batch.target_stride, kRagged ? n : kRows);
  Group<T> residual = mse_residual(group_sums<T>(acc), bias, t);
  if (kRagged) {
    for (int r = 0; r < kRows; ++r) residual[r] = r < n ? residual[r] : T(0);
  }
  const Group<T> dy_group = mse_dy(residual, dy_scale);
  sums.loss += mse_term(residual);
  sums.dbias += dy_group;
  __builtin_memcpy(dy, &dy_group, sizeof(dy_group));
  for (int r = 0; r < kRows; ++r) {
    if (kRagged && r >= n) break;  // 0 times what may be infinite
    const Vec<T> dy_r = splat<T>(dy_group[r]);
    Vec<T>(&dweight)[kVecs] = sums.dweight[r % kGroupSplit<T, kVecs>];
    for (int v = 0; v < kVecs; ++v) dweight[v] += rows[r][v] * dy_r;
  }
}

template <typename T>
FUSED_STEP_INLINE T group_sum(const Group<T>& group) {
  T sum = group[0];
  for (int k = 1; k < kGroupRows<T>; ++k) sum += group[k];
  return sum;
}

// One tile of rows of at most kVecs vectors; adds its sums to those of the tiles before.
template <typename T, int kVecs, bool kTail, typename X>
FUSED_STEP_INLINE void short_tile(const OnePassChunk<T>& a, const X* x, const T* target,
                                  int64_t rows, bool first_tile, T* dy) {  // [kMaxTileRows]
  constexpr int kRows = kGroupRows<T>;
  const FirstLanes<T> last = first_lanes<T>(a.I - (kVecs - 1) * kLanes<T>);
  const T bias = a.bias != nullptr ? *a.bias : T(0), dy_scale = static_cast<T>(a.dy_scale);
  Vec<T> weight[kVecs];
  load_row<T, kVecs, kTail>(a.weight, last, weight);
  ShortSums<T, kVecs> sums{};
  const int64_t x_stride = a.batch.x_stride, target_stride = a.batch.target_stride;
  int64_t row = 0;
  for (const X* at = x; row + kRows <= rows; row += kRows, at += kRows * x_stride) {
    add_group<T, kVecs, kTail, false>(a, weight, bias, dy_scale, at, target + row * target_stride,
                                      kRows, last, sums, dy + row);
  }
  if (row < rows) {
    add_group<T, kVecs, kTail, true>(a, weight, bias, dy_scale, x + row * x_stride,
                                     target + row * target_stride, static_cast<int>(rows - row),
                                     last, sums, dy + row);
  }
  // In double from tile to tile: see tile_residuals.
  *a.partial.loss += static_cast<double>(group_sum<T>(sums.loss));
  *a.partial.dbias += static_cast<double>(group_sum<T>(sums.dbias));
  if (a.partial.dweight == nullptr) return;
  for (int v = 0; v < kVecs; ++v) {
    Vec<T> sum = sums.dweight[0][v];
    for (int k = 1; k < kGroupSplit<T, kVecs>; ++k) sum += sums.dweight[k][v];
    T* const out = a.partial.dweight + v * kLanes<T>;
    store(out, first_tile ? sum : load(out) + sum);
  }
}

// One tile, if its rows are so many vectors or less; false, and nothing done, otherwise.
template <typename T, int kVecs = kMinShortVecs, typename X>
FUSED_STEP_INLINE bool try_short_tile(const OnePassChunk<T>& a, const X* x, const T* target,
                                      int64_t rows, bool first_tile, T* dy) {
  if (a.I <= (kMinShortVecs - 1) * kLanes<T>) return false;
  if (a.I < kVecs * kLanes<T>) {
    short_tile<T, kVecs, true>(a, x, target, rows, first_tile, dy);
    return true;
  }
  if (a.I == kVecs * kLanes<T>) {
    short_tile<T, kVecs, false>(a, x, target, rows, first_tile, dy);
    return true;
  }
  if constexpr (kVecs < kMaxShortVecs) {
    return try_short_tile<T, kVecs + 1>(a, x, target, rows, first_tile, dy);
  }
  return false;
}

}  // namespace FUSED_STEP_ISA
