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
  unsigned* tickets;  // [kTickets] (policy.h)
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

// One whole step in one launch: x is read once.
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

// Loss and gradients in one launch, x read once. The gradients lack the factor dy_scale of
// mse_math.h, which the backward pass applies. Null: what nobody needs.
template <typename X, typename P>
struct OnePassGrad {
  Rows<X, P> batch;
  LinearShape shape;
  Reduction reduction;
  const P* weight;    // [O, I]
  const P* bias;      // [O] or null
  P* loss;            // []
  X* dx;              // [B, I] r * W
  Accum<P>* dweight;  // [O, I] r^T x
  Accum<P>* dbias;    // [O] sum of r over rows
  Scratch scratch;    // bytes: one_pass_workspace
};
template <typename X, typename P>
cudaError_t launch_one_pass_grad(const OnePassGrad<X, P>& args, cudaStream_t stream);

// gemm plan: r = y + b - t in the place of y, with loss and the sum of r over rows.
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
  Accum<P>* dbias;  // [O] sum of r over rows, or null
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

}  // namespace fused_step::cuda
