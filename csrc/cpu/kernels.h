// SPDX-License-Identifier: MIT
// What the CPU engine offers: one table of loops per instruction set. A loop reads and writes only
// what its arguments name, allocates nothing and runs on the calling thread.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/float16.h"
#include "core/params.h"

namespace fused_step::cpu {

// A batch, or a chunk of one. Rows are `x_stride` and `target_stride` elements apart; within a row
// the elements are adjacent.
template <typename T>
struct Rows {
  const T* x;       // [rows, I]
  const T* target;  // [rows, O]
  int64_t x_stride;
  int64_t target_stride;
  int64_t rows;
};

// What training changes, as it is stored. `bias` may be null; the buffers are read and written only
// with momentum.
template <typename T>
struct LinearParams {
  T* weight;      // [O, I]
  T* bias;        // [O]
  T* weight_buf;  // [O, I]
  T* bias_buf;    // [O]
  SgdOptions weight_options;
  SgdOptions bias_options;
  int64_t I;
  int64_t O;
};

// Sums over one chunk of rows.
template <typename T>
struct PartialSums {
  T* dweight;     // [O, partial_stride(I)]
  double* dbias;  // [O]
  double* loss;   // [1] sum of r^2
};

// Reads W, writes partial and dx. Null: dweight or dx that nobody needs.
template <typename T>
struct OnePassChunk {
  Rows<T> batch;
  const T* weight;  // [O, I]
  const T* bias;    // [O] or null
  int64_t I;
  int64_t O;
  double dy_scale;
  PartialSums<T> partial;
  T* dx = nullptr;  // [rows, I] dL/dx, rows adjacent
};

// Adds `chunks` partial sums, in order, and updates W. Partial c lies c * chunk_stride elements
// behind the first.
template <typename T>
struct OnePassUpdate {
  const Accum<T>* dweight;  // [chunks, O, partial_stride(I)]
  int64_t chunks;
  int64_t chunk_stride;
  LinearParams<T> params;
};

// Adds `chunks` partial sums, in order, into dW.
template <typename T>
struct OnePassGrad {
  const T* dweight;  // [chunks, O, partial_stride(I)]
  int64_t chunks;
  int64_t chunk_stride;
  T* sum;  // [O, I]
  int64_t I;
};

// Whole steps, one after the other on one thread, each a single chunk: step k takes the next
// batch_size rows of data, or what is left, and starts again at row 0 after the last.
template <typename T>
struct SerialSteps {
  Rows<T> data;
  int64_t batch_size;
  int64_t first_row;
  int64_t steps;
  Reduction reduction;
  LinearParams<T> params;
  PartialSums<T> partial;  // workspace
  T* losses;               // [steps]
};

// y = x W^T becomes dL/dy in place. T is what the target is stored in.
template <typename T>
struct ResidualChunk {
  Accum<T>* y;      // [rows, O] in: x W^T; out: dL/dy
  const T* target;  // [rows, O]
  int64_t target_stride;
  const Accum<T>* bias;  // [O] or null
  int64_t rows;
  int64_t O;
  double dy_scale;
  double* dbias;  // [O]
  double* loss;   // [1] sum of r^2
};

// Elementwise over n parameters. `buf` may be null without momentum.
template <typename T>
struct SgdPass {
  T* param;              // [n]
  const Accum<T>* grad;  // [n]
  T* buf;                // [n]
  int64_t n;
  SgdOptions options;
};

// Rows of a 16-bit matrix, `from_stride` elements apart, as adjacent rows of float.
template <typename S>
struct WidenRows {
  const S* from;  // [rows, columns]
  int64_t from_stride;
  int64_t rows;
  int64_t columns;
  float* to;  // [rows, columns]
};

// What dL/dx and the residual are kept in before the factor that the backward pass brings: not
// Float16, whose range they may leave, on either side, and with the factor not.
template <typename S>
using Unscaled = std::conditional_t<std::is_same_v<S, Float16>, float, S>;

// A chunk whose x is stored as S. Each tile of it is widened into `panel`, and goes through the
// loops for float from there; so do W and the bias, widened before.
template <typename S>
struct WidenedChunk {
  const S* x;  // [rows, I]
  int64_t x_stride;
  const S* target;  // [rows, O]; null where the target is float: `chunk` has it then
  int64_t target_stride;
  Unscaled<S>* dx;            // [rows, I] dL/dx, rows adjacent; null: nobody needs it
  float* panel;               // [widened_panel(I, O)] workspace
  OnePassChunk<float> chunk;  // all but x and dx
};

template <typename T>
struct Kernels {
  void (*one_pass_chunk)(const OnePassChunk<T>&);
  // Rows [o_begin, o_end) of W, columns [i_begin, i_end).
  void (*one_pass_update)(const OnePassUpdate<T>&, int64_t o_begin, int64_t o_end, int64_t i_begin,
                          int64_t i_end);
  // Rows and columns of dW likewise.
  void (*one_pass_grad)(const OnePassGrad<T>&, int64_t o_begin, int64_t o_end, int64_t i_begin,
                        int64_t i_end);
  void (*serial_steps)(const SerialSteps<T>&);  // one or more, by way of run_serial_steps()
  void (*residual_chunk)(const ResidualChunk<T>&);
  void (*sgd)(const SgdPass<T>&);
};

// What 16-bit tensors have beside the loops for float.
template <typename S>
struct WideningKernels {
  void (*widen)(const WidenRows<S>&);
  void (*narrow)(const float* from, S* to, int64_t n);
  void (*one_pass_chunk)(const WidenedChunk<S>&);
  void (*one_pass_update)(const OnePassUpdate<S>&, int64_t o_begin, int64_t o_end, int64_t i_begin,
                          int64_t i_end);
  void (*residual_chunk)(const ResidualChunk<S>&);
  void (*sgd)(const SgdPass<S>&);
};

// A parameter, or a part of one.
struct SgdSlice {
  void* param;  // [n]
  void* grad;   // [n]
  void* buf;    // [n], may be null without momentum
  int64_t n;
  bool first_step;  // buf holds no history yet
};

// What the slices of one param group have in common. The gradient is multiplied by `unscale`, then
// by `clip`; options.first_step is the slice's to say.
struct SgdRule {
  SgdOptions options;
  double unscale = 1.0;
  double clip = 1.0;
  GradAfter grad_after = GradAfter::kKept;
};

// By SgdStorage.
struct SgdKernels {
  void (*update[kSgdStorageCount])(const SgdSlice&, const SgdRule&);
  double (*sum_squares[kSgdStorageCount])(const void* grad, int64_t n);  // grad [n]
};

// The instruction sets in this binary, widest last, and the one in use: the widest that the
// processor has, or the one named by FUSED_STEP_ISA.
enum class Isa : int8_t { kBaseline, kAvx2, kAvx512 };
constexpr int kIsaCount = 3;

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);
Isa isa_used();
// Forces a level, for tests. False, and nothing changed, when the processor lacks it.
bool use_isa(Isa isa);

// Whether the processor multiplies bfloat16 (AVX512_BF16); the loops here do not, GEMMs may.
bool multiplies_bfloat16();

// The tables of the instruction set in use.
template <typename T>
const Kernels<T>& kernels();
template <typename S>
const WideningKernels<S>& widening_kernels();
const SgdKernels& sgd_kernels();

// Steps by the instruction set in use, and the shortest of its vectors that hold a row of W: the
// tiles of a step are as high as a vector is long.
template <typename T>
void run_serial_steps(const SerialSteps<T>& steps);

}  // namespace fused_step::cpu
