// SPDX-License-Identifier: MIT
// Loss and gradients of a linear layer on CUDA; results have the dtypes that linear_mse.h names.
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/square.h>
#include <c10/cuda/CUDAGuard.h>

#include <limits>

#include "bindings/cuda_support.h"
#include "bindings/dtypes.h"
#include "bindings/linear_mse.h"
#include "bindings/linear_mse_passes.h"
#include "core/mse_math.h"
#include "cuda/launch.h"
#include "cuda/policy.h"

namespace fused_step {
namespace {

// Rows, and the results that rows are turned into; undefined what is not needed.
struct Batch {
  at::Tensor x;       // [B, I], a row's elements adjacent
  at::Tensor weight;  // [O, I] contiguous
  at::Tensor bias;    // [O] contiguous
  at::Tensor target;  // [B, O], a row's elements adjacent
  at::Tensor loss;    // []
  // Contiguous.
  at::Tensor dx;        // [B, I]
  at::Tensor dweight;   // [O, I]
  at::Tensor dbias;     // [O]
  at::Tensor residual;  // [B, O]
  Reduction reduction = Reduction::kMean;
  double dy_scale = 1.0;

  LinearShape shape() const { return {x.size(0), weight.size(1), weight.size(0)}; }
};

// No residual: the loss is that of nothing, and so are the gradients.
void nothing(const Batch& b) {
  at::Tensor loss = b.loss;
  loss.fill_(b.reduction == Reduction::kMean ? std::numeric_limits<double>::quiet_NaN() : 0.0);
  for (at::Tensor t : {b.dx, b.dweight, b.dbias}) {
    if (t.defined()) t.zero_();
  }
}

void one_pass(const Batch& b, DeviceScratch& scratch, c10::cuda::CUDAStream stream) {
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

// The residual is made in the memory of y, which is given back when nobody asked for it. float16 is
// widened where it waits for the backward pass (linear_mse.h), so the residual is, too.
void gemm(Batch& b, DeviceScratch& scratch, c10::cuda::CUDAStream stream) {
  const auto [B, I, O] = b.shape();
  const at::ScalarType dtype = b.weight.scalar_type();
  const bool waits = b.residual.defined() || b.dx.defined();
  const at::ScalarType wide = waits ? unscaled_dtype(dtype) : dtype;
  const at::TensorOptions options = b.weight.options().dtype(wide);
  // A library's GEMM takes one type.
  const at::Tensor x = b.x.to(dtype);
  at::Tensor r = b.residual.defined() ? b.residual : at::empty({B, O}, options);
  gemm_into(r, x, b.weight.t());
  const at::Tensor target = b.target.to(wide);
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
}

void compute(Batch& b, c10::cuda::CUDAStream stream) {
  if (b.target.numel() == 0) return nothing(b);
  DeviceScratch scratch;
  const LinearShape shape = b.shape();
  const cuda::Plan plan =
      cuda::choose_gradient_plan(shape, static_cast<int64_t>(b.x.element_size()),
                                 static_cast<int64_t>(b.weight.element_size()));
  // One-pass has each residual in registers only, and without columns there is nothing to pass.
  const bool dx_waits_widened = b.dx.defined() && b.dx.scalar_type() != b.x.scalar_type();
  const bool by_gemm =
      plan == cuda::Plan::kGemm || b.residual.defined() || dx_waits_widened || shape.I == 0;
  by_gemm ? gemm(b, scratch, stream) : one_pass(b, scratch, stream);
}

}  // namespace

LinearMseResult linear_mse_cuda(const at::Tensor& input, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, const at::Tensor& target,
                        std::string_view reduction, bool need_dinput, bool need_dweight,
                        bool need_dbias, bool need_dy) {
  check_reduction(reduction);
  check_linear_mse(input, weight, bias, target);
  check_linear_mse_memory(input, weight, bias, target);
  TORCH_CHECK_NOT_IMPLEMENTED(is_served_by_cuda(weight.device()), kLinearMse,
                              ": this build has no kernels for ", weight.device());
  const c10::cuda::CUDAGuard guard(weight.device());
  const BelowDispatcher below;
  const int64_t O = weight.size(0), I = weight.size(1);
  const bool none = reduction == "none";
  const at::TensorOptions options = weight.options(),
                          of_x = options.dtype(unscaled_dtype(input.scalar_type())),
                          of_dy = options.dtype(unscaled_dtype(target.scalar_type())),
                          of_sums = options.dtype(accum_dtype(weight.scalar_type()));
  Batch b;
  b.x = as_rows(input, I);
  b.weight = weight.contiguous();
  if (bias.has_value()) b.bias = bias->contiguous();
  b.target = as_rows(target, O);
  b.reduction = reduction == "mean" ? Reduction::kMean : Reduction::kSum;
  b.loss = at::empty({}, options);
  const int64_t B = b.x.size(0);
  b.dy_scale = mse_dy_scale(b.reduction, B, O);
  if (need_dinput && !none) b.dx = at::empty({B, I}, of_x);
  if (need_dweight && !none) b.dweight = at::empty({O, I}, of_sums);
  if (need_dbias && !none) b.dbias = at::empty({O}, of_sums);
  if (need_dy || none) b.residual = at::empty({B, O}, of_dy);
  compute(b, c10::cuda::getCurrentCUDAStream());

  const auto result = [](const at::Tensor& t, at::IntArrayRef sizes,
                         const at::TensorOptions& like) {
    return t.defined() ? at::_unsafe_view(t, sizes) : at::empty({0}, like);
  };
  const at::Tensor loss =
      none ? at::_unsafe_view(b.residual.square().to(weight.scalar_type()), target.sizes())
           : b.loss;
  at::Tensor dy;
  if (need_dy) dy = b.residual.mul_(b.dy_scale);
  return {loss, result(b.dx, input.sizes(), of_x), result(b.dweight, weight.sizes(), of_sums),
          result(b.dbias, {O}, of_sums), result(dy, target.sizes(), of_dy)};
}

}  // namespace fused_step
