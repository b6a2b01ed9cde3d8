// SPDX-License-Identifier: MIT
// The whole step of one linear layer on CUDA: tensors to pointers, the launches of each plan, and
// the GEMMs.
#include "bindings/linear_mse_sgd_cuda.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/randperm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/Event.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <string_view>

#include "bindings/cuda_support.h"
#include "bindings/dtypes.h"
#include "bindings/linear_mse_passes.h"
#include "core/mse_math.h"
#include "cuda/launch.h"
#include "cuda/policy.h"

namespace fused_step {

using cuda::Plan;

namespace {

// What a launch works on: one batch, or all rows of a run.
struct RowTensors {
  at::Tensor x;       // [rows, I], a row's elements adjacent
  at::Tensor target;  // [rows, O], likewise

  int64_t count() const { return x.size(0); }
  RowTensors narrow(int64_t first, int64_t rows) const {
    return {x.narrow(0, first, rows), target.narrow(0, first, rows)};
  }
  template <typename X, typename P>
  cuda::Rows<X, P> pointers() const {
    return {read<X>(x), read<P>(target), x.stride(0), target.stride(0)};
  }
};

LinearShape shape_of(const LinearSgdState& state, int64_t B) {
  return {B, state.weight.size(1), state.weight.size(0)};
}

constexpr std::array kPlanNames{"tiny", "one-pass", "gemm"};  // by Plan

// The one that use_cuda_plan() names.
std::atomic<std::optional<Plan>>& wanted_plan() {
  static std::atomic<std::optional<Plan>> plan{std::nullopt};
  return plan;
}

Plan plan_of(const LinearSgdState& state, at::ScalarType input_type, int64_t B) {
  const LinearShape shape = shape_of(state, B);
  // No columns: nothing for a kernel to read. The GEMMs leave zeros.
  if (shape.I == 0) return Plan::kGemm;
  const auto x_bytes = static_cast<int64_t>(c10::elementSize(input_type));
  const auto param_bytes = static_cast<int64_t>(state.weight.element_size());
  const std::optional<Plan> wanted = wanted_plan().load(std::memory_order_relaxed);
  if (wanted.has_value() && cuda::serves(*wanted, shape, x_bytes, param_bytes)) return *wanted;
  return cuda::choose_plan(shape, x_bytes, param_bytes);
}

template <typename P>
cuda::Param<P> weight_of(const LinearSgdState& s) {
  return {written<P>(s.weight), written<P>(s.weight_buf), s.weight_options,
          read<float>(s.weight_lr)};
}
template <typename P>
cuda::Param<P> bias_of(const LinearSgdState& s) {
  return {written<P>(s.bias), written<P>(s.bias_buf), s.bias_options, read<float>(s.bias_lr)};
}

// The steps of one launch, from step `first_step` of a run on: their losses go to `losses`.
void tiny_steps(const LinearSgdState& state, const RowTensors& data, int64_t batch_rows,
                int64_t first_step, int64_t steps, void* losses, c10::cuda::CUDAStream stream) {
  const LinearShape shape = shape_of(state, batch_rows);
  with_pair(data.x.scalar_type(), state.weight.scalar_type(), [&](auto of_x, auto of_param) {
    using X = decltype(of_x);
    using P = decltype(of_param);
    const cuda::TinySteps<X, P> args{data.pointers<X, P>(),
                                     data.count(),
                                     batch_rows,
                                     first_step,
                                     steps,
                                     shape.I,
                                     shape.O,
                                     state.reduction,
                                     weight_of<P>(state),
                                     bias_of<P>(state),
                                     static_cast<P*>(losses)};
    C10_CUDA_CHECK(cuda::launch_tiny_steps(args, stream));
  });
}

void one_pass_step(const LinearSgdState& state, const RowTensors& batch, void* loss,
                   DeviceScratch& scratch, c10::cuda::CUDAStream stream) {
  const LinearShape shape = shape_of(state, batch.count());
  with_pair(batch.x.scalar_type(), state.weight.scalar_type(), [&](auto of_x, auto of_param) {
    using X = decltype(of_x);
    using P = decltype(of_param);
    const int64_t bytes = cuda::one_pass_workspace<X, P>(shape);
    const cuda::OnePassStep<X, P> args{batch.pointers<X, P>(),
                                       shape,
                                       state.reduction,
                                       weight_of<P>(state),
                                       bias_of<P>(state),
                                       static_cast<P*>(loss),
                                       reserve_scratch(scratch, stream, bytes)};
    C10_CUDA_CHECK(cuda::launch_one_pass_step(args, stream));
  });
}

// By the update rule, from grad * grad_scale; `grad` is [n] in the accumulator's type.
template <typename P>
void update_param(const cuda::Param<P>& param, const at::Tensor& grad, double grad_scale,
                  c10::cuda::CUDAStream stream) {
  if (param.value == nullptr || grad.numel() == 0) return;
  const cuda::SgdUpdate<P> args{param, read<Accum<P>>(grad), grad_scale, grad.numel()};
  C10_CUDA_CHECK(cuda::launch_sgd_update(args, stream));
}

void update_params(const LinearSgdState& state, const at::Tensor& dweight, const at::Tensor& dbias,
                   double grad_scale, c10::cuda::CUDAStream stream) {
  with_storage(state.weight.scalar_type(), [&](auto of_param) {
    using P = decltype(of_param);
    if (dweight.defined()) update_param(weight_of<P>(state), dweight, grad_scale, stream);
    if (dbias.defined()) update_param(bias_of<P>(state), dbias, grad_scale, stream);
  });
}

// The factor of r^T x where the update is one GEMM into the weight; 0 where the rule needs the
// gradient itself. A factor that is zero in the GEMM's own type would hide a NaN of the gradient.
double gemm_update_factor(const LinearSgdState& s, double dy_scale) {
  const SgdOptions& o = s.weight_options;
  if (o.momentum != 0.0 || o.weight_decay != 0.0 || s.weight_lr.defined()) return 0.0;
  const double factor = (o.maximize ? o.lr : -o.lr) * dy_scale;
  // The sum of a 16-bit weight's gradient is rounded once only if it is made in one piece.
  const int64_t I = s.weight.size(1), O = s.weight.size(0);
  if (s.weight.element_size() == 2 && !cuda::fills_gpu(I, O)) return 0.0;
  const bool exact = s.weight.scalar_type() == at::kDouble;
  const bool in_range = std::abs(factor) >= std::numeric_limits<float>::min() &&
                        std::abs(factor) <= std::numeric_limits<float>::max();
  return exact || in_range ? factor : 0.0;
}

void gemm_step(const LinearSgdState& state, RowTensors batch, void* loss, DeviceScratch& scratch,
               c10::cuda::CUDAStream stream) {
  const int64_t B = batch.count(), O = state.weight.size(0);
  const at::ScalarType dtype = state.weight.scalar_type();
  // A library's GEMM takes one type. Rounding W to 16 bits would not be what was asked for.
  batch.x = batch.x.to(dtype);
  const at::TensorOptions options = batch.x.options();

  const at::Tensor r = at::empty({B, O}, options);
  gemm_into(r, batch.x, state.weight.t());
  at::Tensor dbias;
  if (state.bias.defined()) dbias = at::empty({O}, options.dtype(accum_dtype(dtype)));
  with_storage(dtype, [&](auto of_param) {
    using P = decltype(of_param);
    const int64_t bytes = cuda::residual_workspace<P, P>(B, O);
    const cuda::Residual<P, P> args{written<P>(r),
                                    read<P>(batch.target),
                                    batch.target.stride(0),
                                    B,
                                    O,
                                    state.reduction,
                                    read<P>(state.bias),
                                    static_cast<P*>(loss),
                                    written<Accum<P>>(dbias),
                                    1.0,  // update_params() applies it
                                    reserve_scratch(scratch, stream, bytes)};
    C10_CUDA_CHECK(cuda::launch_residual(args, stream));
  });

  // Every read of W and b has been enqueued before their first write.
  const double dy_scale = mse_dy_scale(state.reduction, B, O);
  const double factor = gemm_update_factor(state, dy_scale);
  at::Tensor dweight;
  if (factor != 0.0) {
    // cuBLAS adds W in the epilogue, to the whole sum and in the type that it sums in, and rounds
    // once: no block after block of rows is added to W, as a CPU's BLAS does (docs/plans.md). With
    // fewer tiles than multiprocessors it may share the sum out, and round the shares of a 16-bit
    // result to 16 bits: gemm_update_factor() keeps those out.
    at::Tensor weight = state.weight;
    weight.addmm_(r.t(), batch.x, 1.0, factor);
  } else {
    dweight = at::empty(state.weight.sizes(), options.dtype(accum_dtype(dtype)));
    gemm_into(dweight, r.t(), batch.x);
  }
  update_params(state, dweight, dbias, dy_scale, stream);
}

// No residual at all: the loss is that of nothing, decay and momentum still move the parameters.
void empty_step(const LinearSgdState& state, at::Tensor loss, c10::cuda::CUDAStream stream) {
  loss.fill_(state.reduction == Reduction::kMean ? std::numeric_limits<double>::quiet_NaN() : 0.0);
  const at::TensorOptions options =
      state.weight.options().dtype(accum_dtype(state.weight.scalar_type()));
  at::Tensor dbias;
  if (state.bias.defined()) dbias = at::zeros(state.bias.sizes(), options);
  update_params(state, at::zeros(state.weight.sizes(), options), dbias, 1.0, stream);
}

// One step; the loss goes into `loss`, 0-dim.
void step(const LinearSgdState& state, const RowTensors& batch, const at::Tensor& loss,
          DeviceScratch& scratch, c10::cuda::CUDAStream stream) {
  if (batch.target.numel() == 0) return empty_step(state, loss, stream);
  const int64_t B = batch.count();
  switch (plan_of(state, batch.x.scalar_type(), B)) {
    case Plan::kTiny:
      return tiny_steps(state, batch, B, 0, 1, loss.mutable_data_ptr(), stream);
    case Plan::kOnePass:
      return one_pass_step(state, batch, loss.mutable_data_ptr(), scratch, stream);
    case Plan::kGemm:
      return gemm_step(state, batch, loss.mutable_data_ptr(), scratch, stream);
  }
}

// Ctrl-C is heard between slices, and what is in the queue runs all the same: so a run lets no more
// than a few slices wait there. Shorter runs wait for nothing.
class Throttle {
 public:
  explicit Throttle(c10::cuda::CUDAStream stream) : stream_(stream) {}

  // A slice has been enqueued.
  void after_slice() {
    if (is_capturing(stream_)) return;  // nothing runs, and an event cannot be waited for
    std::optional<c10::Event>& event = events_[next_++ % events_.size()];
    if (event.has_value()) event->synchronize();
    event.emplace(c10::DeviceType::CUDA);
    event->record(stream_.unwrap());
  }

 private:
  const c10::cuda::CUDAStream stream_;
  std::array<std::optional<c10::Event>, 4> events_;
  size_t next_ = 0;
};

// Rough, and only for the length of slices: a launch, the bytes at 2 TB/s, and the multiply-adds at
// a tenth of an H200's rate, or of one of its 132 multiprocessors' under the tiny plan.
double step_nanoseconds(const LinearShape& s, Plan plan, int64_t element_bytes) {
  const double work = 2.0 * static_cast<double>(s.B) * static_cast<double>(s.I * s.O);
  const double bytes = static_cast<double>(s.B * s.I * element_bytes);
  return plan == Plan::kTiny ? 1000.0 + work / 40.0 : 5000.0 + bytes / 2000.0 + work / 5000.0;
}
constexpr double kSliceNanoseconds = 50e6;

// Rows of a shuffled run under the tiny plan are gathered for many steps at once, into this much.
constexpr int64_t kGatherBytes = 16 * 1024 * 1024;

// The batches of a run, as rows of [n * per_sample] data.
class Runner {
 public:
  Runner(LinearSgdState& state, const RowTensors& data, int64_t n, const RunOptions& options,
         DeviceScratch& scratch, RunWatch& watch)
      : state_(state),
        data_(data),
        n_(n),
        per_sample_(n > 0 ? data.count() / n : 0),
        options_(options),
        scratch_(scratch),
        watch_(watch),
        stream_(c10::cuda::getCurrentCUDAStream(state.weight.device().index())),
        throttle_(stream_) {}

  at::Tensor run() {
    per_epoch_ = cpu::ceil_div(n_, options_.batch_size);
    total_ = options_.epochs * per_epoch_;
    losses_ = at::empty({total_}, state_.weight.options());
    if (total_ == 0) return losses_;
    const int64_t rows = batch_rows();
    const at::ScalarType type = data_.x.scalar_type();
    const Plan plan = plan_of(state_, type, rows);
    const bool tiny = plan == Plan::kTiny && data_.target.numel() > 0;
    const double nanoseconds = step_nanoseconds(shape_of(state_, rows), plan,
                                                static_cast<int64_t>(c10::elementSize(type)));
    slice_ = static_cast<int64_t>(std::clamp(kSliceNanoseconds / nanoseconds, 1.0, 1e6));
    if (options_.shuffle) {
      run_shuffled(tiny);
    } else if (tiny) {
      run_tiny(data_, total_);
    } else {
      for (int64_t k = 0; k < total_; ++k) {
        const int64_t first = k % per_epoch_ * rows;
        step_on(data_.narrow(first, std::min(rows, data_.count() - first)));
      }
    }
    watch_.poll();
    return losses_;
  }

 private:
  int64_t batch_rows() const { return std::min(options_.batch_size, n_) * per_sample_; }

  // `steps` steps over the rows of `data`, again from the first after the last.
  void run_tiny(const RowTensors& data, int64_t steps) {
    for (int64_t k = 0; k < steps;) {
      const int64_t now = std::min(slice_, steps - k);
      tiny_steps(state_, data, batch_rows(), k, now,
                 losses_.select(0, watch_.steps).mutable_data_ptr(), stream_);
      k += now;
      after(now);
    }
  }

  void step_on(const RowTensors& batch) {
    step(state_, batch, losses_.select(0, watch_.steps), scratch_, stream_);
    after(1);
  }

  void run_shuffled(bool tiny) {
    const int64_t row_bytes =
        std::max<int64_t>(1, static_cast<int64_t>(data_.x.element_size()) * data_.x.size(1));
    const int64_t group =
        tiny ? std::max<int64_t>(1, kGatherBytes / (row_bytes * batch_rows())) : 1;
    for (int64_t epoch = 0; epoch < options_.epochs; ++epoch) {
      // From memory that the device reads by itself, so that nobody waits for the copy.
      const at::Tensor order = at::randperm(n_, options_.generator, at::kLong)
                                   .pin_memory()
                                   .to(data_.x.device(), /*non_blocking=*/true);
      for (int64_t k = 0; k < per_epoch_; k += group) {
        const int64_t first = k * options_.batch_size;
        const int64_t last = std::min((k + group) * options_.batch_size, n_);
        const RowTensors rows = gathered(order.narrow(0, first, last - first));
        tiny ? run_tiny(rows, std::min(group, per_epoch_ - k)) : step_on(rows);
      }
    }
  }

  RowTensors gathered(const at::Tensor& index) const {
    return {gathered(data_.x, index), gathered(data_.target, index)};
  }
  at::Tensor gathered(const at::Tensor& rows, const at::Tensor& index) const {
    if (per_sample_ == 1) return at::index_select(rows, 0, index);
    const int64_t columns = rows.size(1);
    return at::index_select(rows.view({n_, per_sample_ * columns}), 0, index)
        .view({index.numel() * per_sample_, columns});
  }

  void after(int64_t steps) {
    watch_.steps += steps;
    since_poll_ += steps;
    state_.weight_options.first_step = state_.bias_options.first_step = false;
    state_.bump_versions();
    if (since_poll_ < slice_) return;
    since_poll_ = 0;
    throttle_.after_slice();
    watch_.poll();
  }

  LinearSgdState& state_;
  const RowTensors data_;
  const int64_t n_;
  const int64_t per_sample_;
  const RunOptions& options_;
  DeviceScratch& scratch_;
  RunWatch& watch_;
  const c10::cuda::CUDAStream stream_;
  Throttle throttle_;
  at::Tensor losses_;  // [total]
  int64_t per_epoch_ = 0, total_ = 0, slice_ = 1, since_poll_ = 0;
};

}  // namespace

void use_cuda_plan(std::optional<std::string_view> name) {
  if (!name.has_value()) {
    wanted_plan() = std::nullopt;
    return;
  }
  const auto found = std::find(kPlanNames.begin(), kPlanNames.end(), *name);
  TORCH_CHECK_VALUE(found != kPlanNames.end(),
                    "use_cuda_plan: name must be tiny, one-pass or gemm, got ", *name);
  wanted_plan() = static_cast<Plan>(found - kPlanNames.begin());
}

const char* cuda_plan_name(const LinearSgdState& state, at::ScalarType input_type, int64_t B) {
  return kPlanNames[static_cast<size_t>(plan_of(state, input_type, B))];
}

std::string why_no_deeper_on_cuda(const LinearSgdState& state, at::ScalarType input_type,
                                  int64_t B) {
  const int64_t O = state.weight.size(0);
  switch (plan_of(state, input_type, B)) {
    case Plan::kTiny:
      return "";
    case Plan::kOnePass:
      return "tiny is one block of the GPU: the batch is too large for it, or a row too long, or "
             "the layer has too many outputs";
    case Plan::kGemm:
      break;
  }
  const int64_t few = cuda::one_pass_outputs(static_cast<int64_t>(c10::elementSize(input_type)));
  const bool by_mma = c10::elementSize(input_type) == 2 && input_type == state.weight.scalar_type();
  const int64_t most = by_mma ? cuda::kMaxMmaOutputs : few;
  if (O > most) {
    return "one-pass serves up to " + std::to_string(most) + " outputs of a " +
           toString(input_type) + " input, the layer has " + std::to_string(O);
  }
  if (O > few) {
    return "one-pass serves " + std::to_string(O) + " outputs of a " + toString(input_type) +
           " input where a row has a multiple of 8 columns, from " +
           std::to_string(cuda::kMinMmaColumns) + " to " +
           std::to_string(cuda::mma_columns(O, false)) + ", and there are enough rows to share out";
  }
  return "a row is too long for one-pass, or empty, or there are too few rows to share out";
}

at::Tensor linear_mse_sgd_cuda(const LinearSgdState& state, const at::Tensor& input,
                               const at::Tensor& target, DeviceScratch& scratch) {
  const c10::cuda::CUDAGuard guard(state.weight.device());
  const BelowDispatcher below;
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  DeviceScratch fresh;
  const RowTensors batch{as_rows(input, state.weight.size(1)),
                         as_rows(target, state.weight.size(0))};
  const at::Tensor loss = at::empty({}, state.weight.options());
  step(state, batch, loss, is_capturing(stream) ? fresh : scratch, stream);
  state.bump_versions();
  return loss;
}

at::Tensor run_linear_mse_sgd_cuda(LinearSgdState state, const at::Tensor& inputs,
                                   const at::Tensor& targets, const RunOptions& options,
                                   DeviceScratch& scratch, RunWatch& watch) {
  const c10::cuda::CUDAGuard guard(state.weight.device());
  const BelowDispatcher below;
  DeviceScratch fresh;
  // Samples of several rows are gathered whole, so they must lie together.
  const bool plain_rows = inputs.dim() == 2;
  const RowTensors data{as_rows(plain_rows ? inputs : inputs.contiguous(), state.weight.size(1)),
                        as_rows(plain_rows ? targets : targets.contiguous(), state.weight.size(0))};
  const bool capturing = is_capturing(c10::cuda::getCurrentCUDAStream());
  return Runner(state, data, inputs.size(0), options, capturing ? fresh : scratch, watch).run();
}

}  // namespace fused_step
