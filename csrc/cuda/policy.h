// SPDX-License-Identifier: MIT
// Every tuning number of the CUDA engine, and the choices that follow from the sizes alone: the
// same sizes give the same chunks, and so the same bits, on every GPU. Plain C++, no CUDA.
//
// None of the numbers was tuned on a GPU yet. Their yardstick is an H200: 132 multiprocessors,
// 65536 registers and 228 KiB of shared memory in each, 4.3 TB/s, that is 19 bytes per cycle and
// multiprocessor. At a latency of 1300 cycles under load about 25 KiB per multiprocessor must be in
// flight; every kernel here aims at 32 KiB or more.
#pragma once

#include <cstdint>

#include "core/params.h"

namespace fused_step::cuda {

enum class Plan : int8_t { kTiny, kOnePass, kGemm };

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t to) { return ceil_div(a, to) * to; }
constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int kWarp = 32;
// What one access moves, where the alignment allows it.
constexpr int64_t kVectorBytes = 16;

// One-pass keeps W and dW of a thread's columns in registers. Each output takes two multiply-adds
// for an element, and for a row five shuffles in every lane: at 8 outputs of float 40 of them for
// the 512 bytes of a warp's row, of which a multiprocessor does one a cycle, 13 bytes of x per
// cycle before any arithmetic. Two GEMMs read x twice, and so get through half of the 19 at best.
// Where the one overtakes the other is a count of instructions, for a GPU to correct.
constexpr int64_t kMaxOnePassOutputs = 4;
constexpr int64_t one_pass_outputs(int64_t x_bytes) {
  return x_bytes == 2 ? 2 : kMaxOnePassOutputs;
}

// Outputs that a kernel has room for; O <= kMaxOnePassOutputs.
constexpr int output_capacity(int64_t O) { return O <= 1 ? 1 : O <= 2 ? 2 : 4; }

// A team of 1 to 32 lanes per row: 32 registers of dW and 32 of W in each lane, whatever the number
// of outputs, beside 32 for the rows of x in use and 32 for the next. With one output and 16-bit x
// that fits 168 registers (float spills 20 to 44 bytes there on all but sm_90), 3 blocks of 4 warps
// on a multiprocessor; each warp has 4 KiB of x on its way, all of them 48 KiB. Float, more
// outputs, or elements one by one, take more registers and leave 2 blocks, 32 KiB.
constexpr int kRowsThreads = 128;
constexpr int kRowsSlots = 8;         // vectors of x on their way, per lane
constexpr int kRowsScalarSlots = 16;  // elements likewise, where no vector access fits
constexpr int rows_blocks(bool vectors, int capacity, int64_t x_bytes) {
  return vectors && capacity == 1 && x_bytes == 2 ? 3 : 2;
}
// Products and targets of several rows and outputs are in registers at once.
constexpr int64_t rows_sums(int64_t accum_bytes) { return 64 / accum_bytes; }
constexpr int64_t kLaneSumBytes = 128;
constexpr int rows_lane_columns(int capacity, int64_t accum_bytes) {
  return static_cast<int>(kLaneSumBytes / accum_bytes / capacity);
}
constexpr int64_t rows_columns(int64_t O, int64_t accum_bytes) {
  return kWarp * rows_lane_columns(output_capacity(O), accum_bytes);
}

// Wider: a block per row, at most 16 columns in each thread, and no more threads than the columns
// take. x comes through shared memory in 3 stages, two of them in flight: at 256 threads 16 KiB
// each, 32 KiB in flight with one block on a multiprocessor, 64 with two. Blocks of fewer threads
// have smaller stages, and more of them fit.
constexpr int kWideThreads = 256;
constexpr int wide_blocks(int capacity, int64_t x_bytes) {
  return x_bytes == 4 || (x_bytes == 2 && capacity == 1) ? 2 : 1;  // more would spill
}
constexpr int kWideStages = 3;
constexpr int kWideSlots = 4;  // vectors of x per thread and stage
constexpr int wide_lane_columns(int capacity, int64_t accum_bytes) {
  return static_cast<int>(at_most(kLaneSumBytes / 2, kLaneSumBytes / capacity) / accum_bytes);
}
constexpr int64_t wide_columns(int64_t O, int64_t accum_bytes) {
  return kWideThreads * wide_lane_columns(output_capacity(O), accum_bytes);
}

// On the units that multiply matrices, for x, W and target of one 16-bit type: 8 warps of a block
// have 512 columns of up to 8 outputs each, 256 of up to 16 or 128 of up to 32, which is 128
// registers of dW and 64 of W in each lane. Where dx is made, half as many: W is there twice. x
// comes through shared memory, 8 rows to a stage. Three stages are 192 KiB with up to 8 outputs;
// GPUs that have less take two, or one, which then waits for each of its rows.
constexpr int kMmaThreads = 256;
constexpr int kMmaWarps = kMmaThreads / kWarp;
constexpr int kMmaRows = 8;     // of x, one product takes
constexpr int kMmaOutputs = 8;  // likewise
constexpr int kMaxMmaStages = 3;
constexpr int64_t kMaxMmaOutputs = 32;
constexpr int mma_tiles(int64_t O) { return O <= 8 ? 1 : O <= 16 ? 2 : 4; }
// Of a warp, with so many times 8 outputs, and of a block.
constexpr int mma_warp_columns(int tiles, bool with_dx) { return 512 / tiles / (with_dx ? 2 : 1); }
constexpr int64_t mma_columns(int64_t O, bool with_dx) {
  return kMmaWarps * mma_warp_columns(mma_tiles(O), with_dx);
}
// The warps that share a row.
constexpr int mma_team(int64_t I, int warp_columns) {
  int warps = 1;
  while (warps * warp_columns < I) warps *= 2;
  return warps;
}
constexpr int mma_ring_bytes(int warp_columns, int stages) {
  return 2 * stages * kMmaWarps * kMmaRows * warp_columns;
}
// Half of a block's dW, where teams are added.
constexpr int64_t mma_team_sums(int tiles, int warp_columns) {
  return int64_t{4} * (kMmaWarps / 2) * kMmaOutputs * tiles * warp_columns;
}
// What the warps of a team pass each other: y of each warp, dy of each team.
constexpr int64_t mma_exchange_bytes(int tiles) {
  return int64_t{8} * (kMmaWarps + kMmaWarps / 2) * tiles * kWarp;
}
constexpr int64_t mma_shared_bytes(int tiles, int warp_columns, int stages, int team) {
  const int64_t sums = int64_t{8} * (1 + tiles) * kMmaThreads;
  const int64_t exchange = team > 1 ? mma_exchange_bytes(tiles) : 0;
  return sums + at_least(mma_ring_bytes(warp_columns, stages) + exchange,
                         team < kMmaWarps ? mma_team_sums(tiles, warp_columns) : 0);
}
// What the ordered sum has beside it, and more than that.
constexpr int64_t kStaticShared = 256;
constexpr int mma_stages(int tiles, int warp_columns, int team, int64_t most_shared) {
  int stages = kMaxMmaStages;
  while (stages > 1 &&
         mma_shared_bytes(tiles, warp_columns, stages, team) + kStaticShared > most_shared) {
    --stages;
  }
  return stages;
}
// Rows of fewer columns leave too little on its way: at 64 it is 24 KiB. Where rows begin at any
// element, each would be copied by itself.
constexpr int64_t kMinMmaColumns = 64;
constexpr bool fits_mma(int64_t I, int64_t O, int64_t x_bytes, int64_t param_bytes) {
  return x_bytes == 2 && param_bytes == 2 && O > one_pass_outputs(x_bytes) && O <= kMaxMmaOutputs &&
         I >= kMinMmaColumns && I % 8 == 0 && I <= mma_columns(O, false);
}

// A chunk is the work of one block. 8 rounds of the 396 blocks that an H200 holds at once: however
// many another GPU holds, the last round, which may be partly empty, is one of many.
constexpr int64_t kOneRound = rows_blocks(true, 1, 2) * 132;
constexpr int64_t kMaxChunks = 8 * kOneRound;
// 32 KiB of float: less is not worth a block and its place in the ordered sum. Once each place on
// an H200 has a block, chunks are four times as large before there are more of them: a block's
// first rows, its sums and its fence cost about as much as 32 KiB.
constexpr int64_t kMinChunkElements = 8 * 1024;
constexpr int64_t chunks_by_work(int64_t elements) {
  const int64_t smallest = elements / kMinChunkElements;
  return smallest <= kOneRound ? smallest : at_least(kOneRound, smallest / 4);
}
// Partial sums are at most 1/8 of a 16-bit x: of dW alone they are that at 16 rows for each output,
// of loss and bias beside it, where rows are short, at as many again.
constexpr int64_t min_chunk_rows(int64_t I, int64_t O) {
  return at_least(1, O) * (I < 64 ? 32 : 17);
}
// Fewer blocks than half of an H200's multiprocessors, each with more than this to read: the rest
// of the GPU stands idle for longer than the GEMMs' three to five launches take.
constexpr int64_t kFewChunks = 66;
constexpr int64_t kMaxBytesOfFewChunks = 256 * 1024;

struct Chunks {
  int64_t rows;   // of each but the last
  int64_t count;  // >= 1
  int64_t group;  // chunks whose sums are added first; the groups' sums follow
  int64_t groups;
};

// The sum of all chunks takes group + groups additions, one after the other: least near the root.
constexpr int64_t group_size(int64_t chunks) {
  int64_t size = 1;
  while (size * size < chunks) size *= 2;
  return size;
}

// As many as `wanted`, or fewer; all but the last have a multiple of `unit` rows.
constexpr Chunks chunks_of(const LinearShape& s, int64_t wanted, int64_t unit) {
  const int64_t by_partials = s.B / min_chunk_rows(s.I, s.O);
  Chunks c{};
  c.rows = round_up(
      at_least(1, ceil_div(s.B, at_least(1, at_most(at_most(wanted, by_partials), kMaxChunks)))),
      unit);
  c.count = at_least(1, ceil_div(s.B, c.rows));
  c.group = group_size(c.count);
  c.groups = ceil_div(c.count, c.group);
  return c;
}

constexpr Chunks one_pass_chunks(const LinearShape& s) {
  return chunks_of(s, chunks_by_work(s.B * s.I), 1);
}

// One block is on a multiprocessor at a time. More rounds of an H200's 132 share the work out
// better on other GPUs, but the sums of a chunk, up to 128 KiB, are to be a 64th of its x. Chunks
// are whole steps of a block: 8 rows for each team.
constexpr int64_t kMmaRound = 132;
constexpr Chunks mma_chunks(const LinearShape& s) {
  const int64_t rounds = s.B * 2 / (64 * 4 * at_least(1, s.O) * kMmaRound);
  const int teams = kMmaWarps / mma_team(s.I, mma_warp_columns(mma_tiles(s.O), false));
  return chunks_of(s, kMmaRound * at_least(1, at_most(rounds, 8)), kMmaRows * teams);
}

// Groups, and one for all of them.
constexpr int64_t kMaxGroups = 64;
constexpr int64_t kTickets = kMaxGroups + 1;
static_assert(group_size(kMaxChunks) <= kMaxGroups);

// A chunk's partial sums: loss and O of dbias in double, then O * I of dW.
constexpr int64_t partial_dweight_at(int64_t O) {
  return round_up((1 + O) * static_cast<int64_t>(sizeof(double)), kVectorBytes);
}
constexpr int64_t partial_bytes(int64_t I, int64_t O, int64_t accum_bytes) {
  return partial_dweight_at(O) + round_up(O * I * accum_bytes, kVectorBytes);
}

// The last blocks read the partial sums of a group, then of the groups, at some 64 bytes a cycle of
// one multiprocessor. From these bytes on, 16 thousand cycles, all multiprocessors together are
// done sooner, with the launch that it takes.
constexpr int64_t kMaxBytesOfLastBlocks = 1024 * 1024;
constexpr bool sums_apart(const Chunks& chunks, int64_t partial_bytes) {
  return (chunks.group + chunks.groups) * partial_bytes > kMaxBytesOfLastBlocks;
}
// That launch: a warp has a group of chunks, a block a vector of dW for each lane. One more block
// has loss and bias.
constexpr int kSumThreads = 256;
constexpr int64_t sum_blocks(const LinearShape& s, int64_t accum_bytes) {
  return 1 + ceil_div(s.O * s.I * accum_bytes, kWarp * kVectorBytes);
}

// One block does a whole step: W and momentum in shared memory, 16 KiB for the sums of its 4 warps.
// It takes as many rows at once as its lanes hold, waits for them, and then for their sums: about
// 1200 cycles. Four such passes take 3 us; a launch of many blocks with its ordered sum takes 5.
constexpr int kTinyThreads = 128;
constexpr int kTinyPasses = 4;
constexpr int kTinySlots = 32;  // elements of x in flight per lane
constexpr int64_t kMaxTinyOutputs = 8;
constexpr int tiny_capacity(int64_t O) { return O <= 1 ? 1 : static_cast<int>(kMaxTinyOutputs); }
constexpr int tiny_lane_columns(int64_t I, int64_t O, int64_t accum_bytes) {
  const int many = rows_lane_columns(static_cast<int>(kMaxTinyOutputs), accum_bytes);
  return O > 1 || I <= kWarp * many ? many : rows_lane_columns(1, accum_bytes);
}
constexpr int64_t tiny_columns(int64_t O, int64_t accum_bytes) {
  return kWarp * rows_lane_columns(tiny_capacity(O), accum_bytes);
}
constexpr int tiny_rows(int capacity, int lane_columns, int64_t accum_bytes) {
  return static_cast<int>(
      at_least(1, at_most(kTinySlots / lane_columns, rows_sums(accum_bytes) / capacity)));
}
// The lanes that a row of I elements takes.
constexpr int lanes_of(int64_t I, int lane_columns) {
  int lanes = 1;
  while (lanes * lane_columns < I) lanes *= 2;
  return lanes;
}
constexpr int64_t tiny_rows_per_pass(int64_t I, int64_t O, int64_t accum_bytes) {
  const int columns = tiny_lane_columns(I, O, accum_bytes);
  return kTinyThreads / lanes_of(I, columns) * tiny_rows(tiny_capacity(O), columns, accum_bytes);
}

// The residual pass: 64 KiB of y, target and r are worth a block.
constexpr int kResidualThreads = 256;
constexpr int kResidualBlocks = 3;  // at a time on a multiprocessor
constexpr int64_t kMinResidualElements = 8 * 1024;
constexpr int64_t kMaxResidualBlocks = 8 * 132;
// A chunk's sums of columns are double: with 64 rows at most 1/16 of a 16-bit y.
constexpr int64_t kMinResidualRows = 64;

struct ResidualGrid {
  int64_t columns;  // of a tile: a thread stays in its column
  int64_t tiles;
  int64_t groups;  // of tiles, each the work of one row of blocks
  int64_t rows;    // of a chunk
  int64_t chunks;
};

constexpr ResidualGrid residual_grid(int64_t B, int64_t O) {
  ResidualGrid g{};
  g.tiles = at_least(1, ceil_div(O, kResidualThreads));
  g.columns = at_least(1, ceil_div(O, g.tiles));
  g.groups = at_most(g.tiles, kMaxGroups);
  const int64_t blocks = at_most(B * O / kMinResidualElements, kMaxResidualBlocks);
  const int64_t wanted = at_least(1, at_most(blocks / g.groups, B / kMinResidualRows));
  g.rows = at_least(1, ceil_div(B, wanted));
  g.chunks = at_least(1, ceil_div(B, g.rows));
  return g;
}

// Elementwise passes: each thread has at least one vector; more blocks than this loop.
constexpr int kElementwiseThreads = 256;
// At a time on a multiprocessor: up to 64 registers. Left alone, nvcc spills double at 40 on
// sm_100.
constexpr int kElementwiseBlocks = 4;
constexpr int64_t kMaxElementwiseBlocks = 32 * 132;

// The optimizer over a list of tensors: a chunk of one of them is the work of a block, so that many
// small tensors and a large one keep the whole GPU busy alike. At 4 vectors in each thread a chunk
// of float with momentum moves 80 KiB, 4300 cycles of a multiprocessor's share; the 1000 in which a
// block finds its tensor are hidden by the four to seven others beside it. The last round of blocks
// is one of 6 for the 25 million parameters of a ResNet-50.
constexpr int kListThreads = 256;
constexpr int64_t kListVectors = 4;  // per thread of a chunk
constexpr int64_t list_chunk(int64_t param_bytes) {
  return kListThreads * kListVectors * kVectorBytes / param_bytes;
}
template <typename P>
constexpr int64_t kListChunk = list_chunk(sizeof(P));

// Words that a launch can take by value beside a pointer and their number.
constexpr int put_words(int64_t argument_bytes) {
  return static_cast<int>(argument_bytes / kVectorBytes - 1);
}
// Tables up to this size are put: one launch is less work for the host than pinned memory, a copy
// and the event that tells when it is done.
constexpr int64_t kMaxPutBytes = 32 * 1024;
// A warp's threads read arguments one after the other, each its own: the warps are spread.
constexpr int kPutThreads = 32;

constexpr int64_t accum_bytes_of(int64_t param_bytes) { return at_least(4, param_bytes); }

constexpr bool fits_tiny(int64_t I, int64_t O, int64_t accum_bytes) {
  return O <= kMaxTinyOutputs && I <= tiny_columns(O, accum_bytes);
}
constexpr bool fits_one_pass(int64_t I, int64_t O, int64_t x_bytes, int64_t accum_bytes) {
  return O <= one_pass_outputs(x_bytes) &&
         I <= at_least(rows_columns(O, accum_bytes), wide_columns(O, accum_bytes));
}

// Whether a plan has kernels for these sizes. `x_bytes` and `param_bytes`: of one element.
constexpr bool serves(Plan plan, const LinearShape& s, int64_t x_bytes, int64_t param_bytes) {
  const int64_t accum_bytes = accum_bytes_of(param_bytes);
  switch (plan) {
    case Plan::kTiny:
      return fits_tiny(s.I, s.O, accum_bytes);
    case Plan::kOnePass:
      return fits_mma(s.I, s.O, x_bytes, param_bytes) ||
             fits_one_pass(s.I, s.O, x_bytes, accum_bytes);
    case Plan::kGemm:
      break;
  }
  return true;
}

constexpr Plan choose_plan(const LinearShape& s, int64_t x_bytes, int64_t param_bytes) {
  const int64_t accum_bytes = accum_bytes_of(param_bytes);
  if (fits_tiny(s.I, s.O, accum_bytes) &&
      s.B <= kTinyPasses * tiny_rows_per_pass(s.I, s.O, accum_bytes)) {
    return Plan::kTiny;
  }
  if (!serves(Plan::kOnePass, s, x_bytes, param_bytes)) return Plan::kGemm;
  const bool by_mma = fits_mma(s.I, s.O, x_bytes, param_bytes);
  const int64_t chunks = by_mma ? mma_chunks(s).count : one_pass_chunks(s).count;
  const bool idle = chunks < kFewChunks && s.B * s.I * x_bytes > chunks * kMaxBytesOfFewChunks;
  return idle ? Plan::kGemm : Plan::kOnePass;
}

// For a loss and its gradients, which tiny does not make, nor one-pass on the matrix units a dx of
// wide rows.
constexpr Plan choose_gradient_plan(const LinearShape& s, int64_t x_bytes, int64_t param_bytes,
                                    bool needs_dx) {
  const bool by_mma = fits_mma(s.I, s.O, x_bytes, param_bytes);
  if (by_mma && needs_dx && s.I > mma_columns(s.O, true)) return Plan::kGemm;
  const Plan plan = choose_plan(s, x_bytes, param_bytes);
  if (plan != Plan::kTiny) return plan;
  return serves(Plan::kOnePass, s, x_bytes, param_bytes) ? Plan::kOnePass : Plan::kGemm;
}

// Whether a product of W's shape has a tile of 128 x 128 for each multiprocessor of an H200. If
// not, a library may share its sum out and round each part to the type that it writes.
constexpr bool fills_gpu(int64_t I, int64_t O) {
  return ceil_div(I, 128) * ceil_div(O, 128) >= 132;
}

}  // namespace fused_step::cuda
