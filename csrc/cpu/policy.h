// SPDX-License-Identifier: MIT
// Every tuning number of the CPU engine, and the choices that follow from the sizes alone: the same
// sizes give the same chunks, and so the same bits, on any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/params.h"

namespace fused_step::cpu {

// One-pass keeps dL/dy of a tile of rows on the stack and W, dW in L2 beside it.
constexpr int64_t kMaxOnePassOutputs = 32;
constexpr int64_t kMaxTileRows = 64;
// Half of a 32 KiB L1: the tile is read for y and again for dW.
constexpr int64_t kTileBytes = 16 * 1024;
// A tile is at least 8 rows, so that one pass over W and dW serves 8 rows of x; above 32 KiB a row
// that tile leaves a 256 KiB share of L2 and 4 rows are used, above 64 KiB there is no tile.
constexpr int64_t kMinTileRows = 4;
constexpr int64_t kMaxTileBytes = 256 * 1024;
// A chunk of at least this size comes from L3 or memory: the dW phase, which reads cache alone,
// prefetches the next tile. With more outputs than this it is bound by arithmetic, not by memory.
constexpr int64_t kPrefetchMinBytes = 192 * 1024;
constexpr int64_t kPrefetchMaxOutputs = 8;

// A parallel region costs 2-5 us, which is the time of about 32 k multiply-adds.
constexpr int64_t kMinChunkWork = 32 * 1024;
constexpr int64_t kMaxChunks = 64;
// Partial sums of dW take at most this share of bytes(x), padding included.
constexpr int64_t kPartialsShare = 16;
// One-pass with fewer chunks than this leaves threads idle; above this work a threaded GEMM wins.
constexpr int64_t kMinParallelChunks = 8;
constexpr int64_t kMaxSerialWork = 512 * 1024;
// Elements per task of an elementwise pass.
constexpr int64_t kElementwiseGrain = 32 * 1024;
// What a tensor costs such a pass beside its elements, in elements: 1000 of 64 take 20 ns each.
constexpr int64_t kItemCost = 128;

// The gemm plan makes dW in panels of whole outputs, this large for each thread, and uses each up
// before the next is made: no buffer of W's size, and the panel is still in cache for the update.
// At 1024 x 1024 x 1024 on two threads a panel of 2 MiB costs nothing against one GEMM, 1 MiB 14 %.
constexpr int64_t kGradPanelBytesPerThread = 1024 * 1024;

enum class Plan : int8_t { kNone, kOnePass, kGemm };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows per chunk, a multiple of 16 so that only the last tile of the last chunk is ragged.
inline int64_t rows_per_chunk(int64_t rows, int64_t chunks) {
  const int64_t even = ceil_div(rows, chunks);
  return chunks == 1 ? even : ceil_div(even, 16) * 16;
}

inline int64_t tile_rows(int64_t I, int64_t element_bytes) {
  const int64_t row_bytes = std::max<int64_t>(1, I * element_bytes);
  const int64_t fit = kTileBytes / row_bytes / 8 * 8;
  if (fit >= 8) return std::min(fit, kMaxTileRows);
  return 8 * row_bytes <= kMaxTileBytes ? 8 : kMinTileRows;
}

// Elements of float in a widened tile of x and target.
inline int64_t widened_panel(int64_t I, int64_t O) {
  return tile_rows(I, sizeof(float)) * (ceil_div(I, 16) * 16 + O);
}

// Elements between the rows of a partial dW: a whole number of the widest vectors, and off the
// multiples of 4 KiB that would put every row of dW into the same set of L1.
inline int64_t partial_stride(int64_t I) { return ceil_div(I, 16) * 16 + 16; }

inline int64_t one_pass_chunks(const LinearShape& s) {
  const int64_t by_work = s.B * s.I * s.O / kMinChunkWork;
  const int64_t partial = std::max<int64_t>(1, s.O) * partial_stride(s.I);
  const int64_t by_partials = s.B * s.I / (kPartialsShare * partial);
  return std::max<int64_t>(1, std::min({by_work, by_partials, kMaxChunks}));
}

inline Plan choose_plan(const LinearShape& s, int64_t element_bytes) {
  if (s.O > kMaxOnePassOutputs) return Plan::kGemm;
  if (kMinTileRows * s.I * element_bytes > kMaxTileBytes) return Plan::kGemm;
  const bool threads_idle = one_pass_chunks(s) < kMinParallelChunks;
  return threads_idle && s.B * s.I * s.O > kMaxSerialWork ? Plan::kGemm : Plan::kOnePass;
}

// Outputs per panel of dW.
inline int64_t grad_panel_outputs(int64_t I, int64_t element_bytes, int64_t threads) {
  const int64_t row_bytes = std::max<int64_t>(1, I * element_bytes);
  return std::max<int64_t>(1, threads * kGradPanelBytesPerThread / row_bytes);
}

// Layers of fewer multiply-adds take torch's GEMMs no less time in bfloat16 than in float, widening
// included; timed as the constants below.
constexpr int64_t kMinBFloat16Work = 2 * 1024 * 1024;
// From so many outputs and weights on, GEMMs in bfloat16 beat one pass over x in float, where the
// processor multiplies bfloat16: linear_mse_loss with all gradients, timed either way by
// _C.use_bfloat16_gemm() on two cores of an EPYC with AVX512_BF16.
constexpr int64_t kMinBFloat16Outputs = 8;
constexpr int64_t kMinBFloat16Weights = 2048;
// Under autocast to bfloat16 x may be bfloat16 or float, W is float: torch's operators round W, and
// a float x, to bfloat16, which takes some of what its GEMMs save. From so many multiply-adds and
// outputs on they are the faster ones there (the same processor).
constexpr int64_t kMinAutocastWork = 16 * 1024 * 1024;
constexpr int64_t kMinAutocastOutputs = 16;
constexpr int64_t kMinAutocastOutputsOfFloat = 32;

// Rows of a panel of 16-bit x that is widened for the gemm plan: at most this many bytes of float
// for x and for y, and enough rows to keep a GEMM at its speed.
constexpr int64_t kWidenedPanelBytes = 8 * 1024 * 1024;
constexpr int64_t kMinWidenedPanelRows = 256;

inline int64_t widened_panel_rows(const LinearShape& s) {
  const int64_t row_bytes =
      static_cast<int64_t>(sizeof(float)) * std::max<int64_t>(1, std::max(s.I, s.O));
  return std::clamp<int64_t>(kWidenedPanelBytes / row_bytes, kMinWidenedPanelRows,
                             std::max<int64_t>(kMinWidenedPanelRows, s.B));
}

inline int64_t residual_chunks(int64_t B, int64_t O) {
  return std::clamp<int64_t>(B * O / kElementwiseGrain, 1, kMaxChunks);
}

}  // namespace fused_step::cpu
