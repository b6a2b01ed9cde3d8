// SPDX-License-Identifier: MIT
// Loss and gradients of a linear layer on the CPU, by the passes of the whole step.
#include "bindings/linear_mse.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <vector>

#include "bindings/linear_mse_batch.h"
#include "bindings/linear_mse_bfloat16.h"
#include "bindings/linear_mse_passes.h"
#include "bindings/linear_mse_widened.h"
#include "core/mse_math.h"
#include "cpu/kernels.h"
#include "cpu/policy.h"

namespace fused_step {
namespace {

// Loss and db, from the partial sums of all chunks. P is what parameters are stored in.
template <typename P>
void finish_sums(const LinearMseBatch& b, const double* dbias, const double* loss, int64_t chunks) {
  using T = Accum<P>;
  const int64_t stride = sums_stride(b.O());
  *written<P>(b.loss) = narrow<P>(
      static_cast<T>(sum_chunks(loss, chunks, stride) * mse_loss_scale(b.reduction, b.B(), b.O())));
  if (!b.dbias.defined()) return;
  T* const out = written<T>(b.dbias);
  for (int64_t o = 0; o < b.O(); ++o) {
    out[o] = static_cast<T>(sum_chunks(dbias + o, chunks, stride));
  }
}

template <typename T>
void sum_dweight(const LinearMseBatch& b, const T* partial, int64_t chunks) {
  if (!b.dweight.defined()) return;
  const int64_t I = b.I(), O = b.O();
  const cpu::OnePassGrad<T> grad{partial, chunks, dweight_stride(O, I), written<T>(b.dweight), I};
  for_each_weight(O, I, chunks, [&](int64_t o, int64_t i, int64_t i_end) {
    cpu::kernels<T>().one_pass_grad(grad, o, o + 1, i, i_end);
  });
}

template <typename T>
void one_pass(const LinearMseBatch& b) {
  const int64_t I = b.I(), O = b.O();
  const RowChunks cut = cut_rows(b.B(), cpu::one_pass_chunks({b.B(), I, O}));
  Workspace workspace;
  const cpu::PartialSums<T> partial =
      reserve_partials<T>(workspace, cut.count, O, I, b.dweight.defined());
  one_pass_sums<T>({rows_of<T>(b.x, b.target), read<T>(b.weight), read<T>(b.bias), I, O, b.dy_scale,
                    partial, written<T>(b.dx)},
                   cut);
  sum_dweight(b, partial.dweight, cut.count);
  finish_sums<T>(b, partial.dbias, partial.loss, cut.count);
}

// dL/dy is made in the memory of y, which is given back when nobody asked for it.
template <typename T>
void gemm(LinearMseBatch& b) {
  const int64_t B = b.B(), O = b.O();
  const RowChunks cut = cut_rows(B, cpu::residual_chunks(B, O));
  Workspace workspace;
  const cpu::PartialSums<T> sums = reserve_partials<T>(workspace, cut.count, O, b.I(), false);
  at::Tensor dy = b.dy.defined() ? b.dy : at::empty({B, O}, b.weight.options());
  at::mm_out(dy, b.x, b.weight.t());
  residual_sums<T>({written<T>(dy), read<T>(b.target), b.target.stride(0), read<T>(b.bias), B, O,
                    b.dy_scale, sums.dbias, sums.loss},
                   cut);
  if (b.dweight.defined()) at::mm_out(b.dweight, dy.t(), b.x);
  if (b.dx.defined()) at::mm_out(b.dx, dy, b.weight);
  finish_sums<T>(b, sums.dbias, sums.loss, cut.count);
}

template <typename X, typename P>
WidenedBatch<X, P> widened(const LinearMseBatch& b) {
  return {read<X>(b.x),
          b.x.stride(0),
          read<P>(b.target),
          b.target.stride(0),
          read<P>(b.weight),
          read<P>(b.bias),
          {b.B(), b.I(), b.O()},
          b.dy_scale,
          written<cpu::Unscaled<X>>(b.dx),
          written<cpu::Unscaled<P>>(b.dy)};
}

template <typename X, typename P>
void one_pass_widened(const LinearMseBatch& b) {
  Workspace workspace;
  const WidenedSums sums = widened_one_pass(widened<X, P>(b), b.dweight.defined(), workspace);
  sum_dweight(b, sums.partial.dweight, sums.cut.count);
  finish_sums<P>(b, sums.partial.dbias, sums.partial.loss, sums.cut.count);
}

template <typename X, typename P>
void gemm_widened(const LinearMseBatch& b) {
  Workspace workspace;
  std::vector<double> sums(static_cast<size_t>(sums_stride(b.O())));
  double *const dbias = sums.data(), *const loss = dbias + b.O();
  gemm_16_bit(widened<X, P>(b), b.dweight, dbias, loss, workspace);
  finish_sums<P>(b, dbias, loss, 1);
}

template <typename X, typename P>
void compute(LinearMseBatch& b) {
  const cpu::Plan plan = choose_cpu_plan({b.B(), b.I(), b.O()}, b.weight.scalar_type());
  // One-pass has each dL/dy in registers only.
  const bool one_pass_fits = plan == cpu::Plan::kOnePass && !b.dy.defined();
  if constexpr (kIs16Bit<X>) {
    one_pass_fits ? one_pass_widened<X, P>(b) : gemm_widened<X, P>(b);
  } else {
    one_pass_fits ? one_pass<X>(b) : gemm<X>(b);
  }
}

}  // namespace

LinearMseResult linear_mse_cpu(const at::Tensor& input, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias, const at::Tensor& target,
                               std::string_view reduction, bool need_dinput, bool need_dweight,
                               bool need_dbias, bool need_dy) {
  return evaluate_linear_mse(
      input, weight, bias, target, reduction, need_dinput, need_dweight, need_dbias, need_dy,
      [](LinearMseBatch& b) {
        with_pair(b.x.scalar_type(), b.weight.scalar_type(),
                  [&](auto x, auto param) { compute<decltype(x), decltype(param)>(b); });
      });
}

}  // namespace fused_step
