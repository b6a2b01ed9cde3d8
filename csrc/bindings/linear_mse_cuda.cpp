// SPDX-License-Identifier: MIT
// Loss and gradients of a linear layer on CUDA; results have the dtypes that linear_mse.h names.
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAGuard.h>

#include <limits>

#include "bindings/cuda_support.h"
#include "bindings/dtypes.h"
#include "bindings/linear_mse_batch.h"
#include "bindings/linear_mse_passes.h"
#include "core/mse_math.h"
#include "cuda/launch.h"
#include "cuda/policy.h"

namespace fused_step {
namespace {

// No residual: the loss is that of nothing, and so are the gradients.
void nothing(const LinearMseBatch& b) {
  at::Tensor loss = b.loss;
  loss.fill_(b.reduction == Reduction::kMean ? std::numeric_limits<double>::quiet_NaN() : 0.0);
  for (at::Tensor t : {b.dx, b.dweight, b.dbias}) {
    if (t.defined()) t.zero_();
  }
}

void one_pass(const LinearMseBatch& b, DeviceScratch& scratch, c10::cuda::CUDAStream stream) {
  const LinearShape shape = b.shape();
  with_pair(b.x.scalar_type(), b.weight.scalar_type(), [&](auto of_x, auto of_param) {
    using X = decltype(of_x);
    using P = decltype(of_param);
    const int64_t bytes = cuda::one_pass_workspace<X, P>(shape);
    const cuda::OnePassGrad<X, P> args{
        {read<X>(b.x), read<P>(b.target), b.x.stride(0), b.target.stride(0)},
        shape,
        b.reduction,
        b.dy_scale,
        read<P>(b.weight),
        read<P>(b.bias),
        written<P>(b.loss),
        written<X>(b.dx),
        written<Accum<P>>(b.dweight),
        written<Accum<P>>(b.dbias),
        reserve_scratch(scratch, stream, bytes)};
    C10_CUDA_CHECK(cuda::launch_one_pass_grad(args, stream));
  });
}

// The residual is made in the memory of y, which becomes dy, or is given back. float16 is
// widened where it waits for the backward pass (linear_mse.h), so the residual is, too.
void gemm(LinearMseBatch& b, DeviceScratch& scratch, c10::cuda::CUDAStream stream) {
  const auto [B, I, O] = b.shape();
  const at::ScalarType dtype = b.weight.scalar_type();
  const bool waits = b.dy.defined() || b.dx.defined();
  const at::ScalarType wide = waits ? unscaled_dtype(dtype) : dtype;
  const at::TensorOptions options = b.weight.options().dtype(wide);
  // A library's GEMM takes one type.
  const at::Tensor x = b.x.to(dtype);
  at::Tensor r = b.dy.defined() ? b.dy : at::empty({B, O}, options);
  gemm_into(r, x, b.weight.t());
  // The conversion of rows that overlap may be laid out by columns.
  const at::Tensor target = as_rows(b.target.to(wide), O);
  const at::Tensor bias = b.bias.defined() ? b.bias.to(wide) : at::Tensor();
  const at::Tensor loss = wide == dtype ? b.loss : at::empty({}, options);
  with_storage(wide, [&](auto of_residual) {
    using P = decltype(of_residual);
    const int64_t bytes = cuda::residual_workspace<P, P>(B, O);
    const cuda::Residual<P, P> args{written<P>(r),
                                    read<P>(target),
                                    target.stride(0),
                                    B,
                                    O,
                                    b.reduction,
                                    read<P>(bias),
                                    written<P>(loss),
                                    written<Accum<P>>(b.dbias),
                                    b.dy_scale,
                                    reserve_scratch(scratch, stream, bytes)};
    C10_CUDA_CHECK(cuda::launch_residual(args, stream));
  });
  if (wide != dtype) b.loss.copy_(loss);
  r = r.to(dtype);
  if (b.dweight.defined()) gemm_into(b.dweight, r.t(), x, b.dy_scale);
  if (b.dx.defined()) gemm_into(b.dx, r, b.weight, b.dy_scale);
  if (b.dy.defined()) b.dy.mul_(b.dy_scale);
}

void compute(LinearMseBatch& b, c10::cuda::CUDAStream stream) {
  if (b.target.numel() == 0) return nothing(b);
  DeviceScratch scratch;
  const LinearShape shape = b.shape();
  const cuda::Plan plan =
      cuda::choose_gradient_plan(shape, static_cast<int64_t>(b.x.element_size()),
                                 static_cast<int64_t>(b.weight.element_size()), b.dx.defined());
  // One-pass has each residual in registers only, and without columns there is nothing to pass.
  const bool dx_waits_widened = b.dx.defined() && b.dx.scalar_type() != b.x.scalar_type();
  const bool by_gemm =
      plan == cuda::Plan::kGemm || b.dy.defined() || dx_waits_widened || shape.I == 0;
  by_gemm ? gemm(b, scratch, stream) : one_pass(b, scratch, stream);
}

}  // namespace

LinearMseResult linear_mse_cuda(const at::Tensor& input, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias, const at::Tensor& target,
                                std::string_view reduction, bool need_dinput, bool need_dweight,
                                bool need_dbias, bool need_dy) {
  return evaluate_linear_mse(input, weight, bias, target, reduction, need_dinput, need_dweight,
                             need_dbias, need_dy, [](LinearMseBatch& b) {
                               TORCH_CHECK_NOT_IMPLEMENTED(
                                   is_served_by_cuda(b.weight.device()), kLinearMse,
                                   ": this build has no kernels for ", b.weight.device());
                               const c10::cuda::CUDAGuard guard(b.weight.device());
                               compute(b, c10::cuda::getCurrentCUDAStream());
                             });
}

}  // namespace fused_step
