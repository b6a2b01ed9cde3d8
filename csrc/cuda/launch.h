// SPDX-License-Identifier: MIT
// What the CUDA engine offers. A launcher enqueues on `stream` and returns the launch's error; it
// allocates nothing and never synchronises. Memory is the device's; arguments are checked by the
// caller.
//
// X is the type x is stored in, P that of parameters, targets and the loss: the six pairs float and
// float, double and double, BFloat16 and BFloat16, Float16 and Float16, BFloat16 and float, Float16
// and float. Arithmetic is in Accum<P>.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/float16.h"
#include "core/params.h"

namespace fused_step::cuda {

// A batch. Rows are `x_stride` and `target_stride` elements apart; within a row the elements are
// adjacent.
template <typename X, typename P>
struct Rows {
  const X* x;       // [B, I]
  const P* target;  // [B, O]
  int64_t x_stride;
  int64_t target_stride;
};

// A parameter and how it is updated.
template <typename P>
struct Param {
  P* value;         // [O, I] or [O]; null: the layer has no bias
  P* momentum_buf;  // same shape; null without momentum
  SgdOptions options;
  const float* lr;  // [] on the device, instead of options.lr; null: options.lr
};

// Scratch memory of a launch. `tickets` is zero before the first launch and left zero by each, so
// that launches that follow one another share it.
struct Scratch {
  void* workspace;    // of the bytes that the plan's *_workspace function names, aligned to 16
  unsigned* tickets;  // [kTickets] (policy.h); one-pass takes null, too, for one more launch
};

// Whole steps in one launch of one block: step k takes the next batch_size rows, or what is left of
// `rows`, and starts again at row 0 after the last. Needs no scratch memory.
template <typename X, typename P>
struct TinySteps {
  Rows<X, P> data;
  int64_t rows;  // n
  int64_t batch_size;
  int64_t first_step;  // index of the first step of this launch: its rows follow from it
  int64_t steps;
  int64_t I;
  int64_t O;
  Reduction reduction;
  Param<P> weight;
  Param<P> bias;
  P* losses;  // [steps] before each update
};
template <typename X, typename P>
cudaError_t launch_tiny_steps(const TinySteps<X, P>& args, cudaStream_t stream);

// One whole step in one launch, or two where sums_apart() (policy.h): x is read once.
template <typename X, typename P>
struct OnePassStep {
  Rows<X, P> batch;
  LinearShape shape;
  Reduction reduction;
  Param<P> weight;
  Param<P> bias;
  P* loss;  // []
  Scratch scratch;
};
template <typename X, typename P>
int64_t one_pass_workspace(const LinearShape& shape);  // bytes
template <typename X, typename P>
cudaError_t launch_one_pass_step(const OnePassStep<X, P>& args, cudaStream_t stream);

// Loss and gradients likewise. Null: what nobody needs.
template <typename X, typename P>
struct OnePassGrad {
  Rows<X, P> batch;
  LinearShape shape;
  Reduction reduction;
  double dy_scale;  // mse_dy_scale(), or 1 where the backward pass applies it to dx, dweight, dbias
  const P* weight;  // [O, I]
  const P* bias;    // [O] or null
  P* loss;          // []
  X* dx;            // [B, I] dy * W, where dy = dy_scale * r
  Accum<P>* dweight;  // [O, I] dy^T x
  Accum<P>* dbias;    // [O] sum of dy over rows
  Scratch scratch;    // bytes: one_pass_workspace
};
template <typename X, typename P>
cudaError_t launch_one_pass_grad(const OnePassGrad<X, P>& args, cudaStream_t stream);

// gemm plan: r = y + b - t in the place of y, with loss and a multiple of the sum of r over rows.
template <typename X, typename P>
struct Residual {
  X* y;             // [B, O] x W^T on entry, r on return, rows adjacent
  const P* target;  // [B, O]
  int64_t target_stride;
  int64_t B;
  int64_t O;
  Reduction reduction;
  const P* bias;    // [O] or null
  P* loss;          // []
  Accum<P>* dbias;  // [O] dbias_scale * sum of r over rows, or null
  double dbias_scale;
  Scratch scratch;
};
template <typename X, typename P>
int64_t residual_workspace(int64_t B, int64_t O);  // bytes
template <typename X, typename P>
cudaError_t launch_residual(const Residual<X, P>& args, cudaStream_t stream);

// The update rule on one parameter from a finished gradient: grad_scale * grad.
template <typename P>
struct SgdUpdate {
  Param<P> param;
  const Accum<P>* grad;  // [n]
  double grad_scale;
  int64_t n;
};
template <typename P>
cudaError_t launch_sgd_update(const SgdUpdate<P>& args, cudaStream_t stream);

// A parameter of the optimizer's list, in device memory. All four arrays are apart from those of
// every other tensor.
struct SgdTensor {
  void* param;         // [n]
  void* grad;          // [n]
  void* buf;           // [n], null without momentum
  int64_t n;           // > 0
  int64_t first_step;  // not 0: buf holds no history yet. As wide as the rest: no padding
};

// The elements of a tensor from number * kListChunk<P> (policy.h) on, as many or what is left.
struct SgdChunk {
  int32_t tensor;
  int32_t number;
};

struct SgdChunks {
  const SgdTensor* tensors;
  const SgdChunk* chunks;  // [count]
  int64_t count;           // < 2^31
};

// What stands in device memory because the host does not know it yet. Null: there is none of it.
struct SgdScalars {
  const float* lr_float;    // [] instead of options.lr
  const double* lr_double;  // [] likewise
  const float* grad_scale;  // [] gradients are divided by it
  const float* found_inf;   // [] not 0: nothing is updated, gradients are only zeroed, if at all
  const double* clip;       // [] gradients are multiplied by it, too
};

// The update rule on chunks of tensors stored as P, their momentum buffers as Buf.
template <typename P, typename Buf>
struct SgdList {
  SgdChunks list;
  SgdOptions options;  // first_step is the tensors' to say
  SgdScalars scalars;
  double unscale;  // gradients are multiplied by it
  GradAfter grad_after;
};
template <typename P, typename Buf>
cudaError_t launch_sgd_list(const SgdList<P, Buf>& args, cudaStream_t stream);

// The 2-norm of gradients in several types: a launch for each, with partial sums in one array. The
// last one, which says `finishes`, adds them and writes what came of it. Sums are in double, their
// order follows from the sizes alone.
template <typename P>
struct GradNorm {
  SgdChunks list;          // count may be 0
  double* partials;        // [partials_count] of all launches
  int64_t partials_begin;  // where those of this launch begin
  int64_t partials_count;  // with this launch's, list.count or at least 1
  bool finishes;
  unsigned* ticket;  // [] zero before the launch and left zero by it
  double unscale;
  const float* grad_scale;  // [] or null
  double max_norm;
  double* clip;         // [] sgd_clip()
  float* norm_float;    // [] unscale * norm / grad_scale, or null
  double* norm_double;  // [] likewise
};
template <typename P>
cudaError_t launch_grad_norm(const GradNorm<P>& args, cudaStream_t stream);

// Copies `bytes`, and zeros up to a multiple of 16, to device memory by way of the launches'
// arguments: no memory of the host has to outlive the call, and a graph captures them by value.
cudaError_t launch_put(void* to, const void* from, int64_t bytes, cudaStream_t stream);

}  // namespace fused_step::cuda
