// SPDX-License-Identifier: MIT
// The whole step of one linear layer on the CPU: tensors to pointers, threads, and the GEMMs.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/randperm.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "bindings/linear_mse_bfloat16.h"
#include "bindings/linear_mse_passes.h"
#include "bindings/linear_mse_sgd.h"
#include "bindings/linear_mse_widened.h"
#include "core/mse_math.h"
#include "cpu/bias.h"
#include "cpu/kernels.h"

namespace fused_step {

using cpu::Plan;

namespace {

template <typename P>
cpu::LinearParams<P> params_of(const LinearSgdState& s) {
  return {written<P>(s.weight),   written<P>(s.bias), written<P>(s.weight_buf),
          written<P>(s.bias_buf), s.weight_options,   s.bias_options,
          s.weight.size(1),       s.weight.size(0)};
}

template <typename T>
T total_loss(const double* loss, const RowChunks& cut, int64_t O, double scale) {
  return static_cast<T>(sum_chunks(loss, cut.count, sums_stride(O)) * scale);
}

// Every read of W has ended.
template <typename P>
void update_from_partials(const cpu::PartialSums<Accum<P>>& partial, int64_t chunks,
                          const cpu::LinearParams<P>& params) {
  const int64_t I = params.I, O = params.O;
  const cpu::OnePassUpdate<P> update{partial.dweight, chunks, dweight_stride(O, I), params};
  for_each_weight(O, I, chunks, [&](int64_t o, int64_t i, int64_t i_end) {
    kernels_of<P>().one_pass_update(update, o, o + 1, i, i_end);
  });
  cpu::update_bias<P>(partial.dbias, chunks, sums_stride(O), params);
}

template <typename T>
void serial_steps(const cpu::Rows<T>& data, int64_t batch_size, int64_t first_row, int64_t steps,
                  Reduction reduction, const cpu::LinearParams<T>& params, Workspace& workspace,
                  T* losses) {
  cpu::run_serial_steps<T>({data, batch_size, first_row, steps, reduction, params,
                            reserve_partials<T>(workspace, 1, params.O, params.I), losses});
}

template <typename T>
T one_pass_step(const cpu::Rows<T>& batch, Reduction reduction, const cpu::LinearParams<T>& params,
                Workspace& workspace) {
  const int64_t B = batch.rows, I = params.I, O = params.O;
  const int64_t wanted = cpu::one_pass_chunks({B, I, O});
  if (wanted == 1) {
    T loss;
    serial_steps(batch, B, 0, 1, reduction, params, workspace, &loss);
    return loss;
  }
  const RowChunks cut = cut_rows(B, wanted);
  const cpu::PartialSums<T> partial = reserve_partials<T>(workspace, cut.count, O, I);
  one_pass_sums<T>(
      {batch, params.weight, params.bias, I, O, mse_dy_scale(reduction, B, O), partial}, cut);
  update_from_partials(partial, cut.count, params);
  return total_loss<T>(partial.loss, cut, O, mse_loss_scale(reduction, B, O));
}

// Updates n outputs from o on.
template <typename P>
void update_outputs(const cpu::LinearParams<P>& params,
                    const Accum<P>* grad,  // [n, I]
                    int64_t o, int64_t n) {
  // Tasks of a fixed size: where vectors end does not depend on the number of threads.
  const int64_t elements = n * params.I;
  const int64_t tasks = cpu::ceil_div(elements, cpu::kElementwiseGrain);
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = first * cpu::kElementwiseGrain;
    const int64_t end = std::min(last * cpu::kElementwiseGrain, elements);
    const int64_t at = o * params.I + begin;
    P* const buf = params.weight_buf != nullptr ? params.weight_buf + at : nullptr;
    kernels_of<P>().sgd(
        {params.weight + at, grad + begin, buf, end - begin, params.weight_options});
  });
}

// dW = dy^T x panel by panel, each used up at once. Never as one GEMM into W: BLAS adds blocks of
// rows one after the other to what is there, and a block's share that is less than half a unit in
// the last place of W is lost. With 4096 rows W took 0.15 of an update of a few units.
template <typename T>
void gemm_update(const at::Tensor& dy, const at::Tensor& x, const cpu::LinearParams<T>& params,
                 T* workspace) {
  const int64_t I = params.I, O = params.O;
  const int64_t outputs = cpu::grad_panel_outputs(I, sizeof(T), at::get_num_threads());
  for (int64_t o = 0; o < O; o += outputs) {
    const int64_t n = std::min(outputs, O - o);
    at::Tensor grad = at::from_blob(workspace, {n, I}, dy.options());
    at::mm_out(grad, dy.narrow(1, o, n).t(), x);
    update_outputs(params, workspace, o, n);
  }
}

template <typename T>
T gemm_step(const LinearSgdState& state, const at::Tensor& rows, const cpu::Rows<T>& batch,
            const cpu::LinearParams<T>& params, Workspace& workspace) {
  const int64_t B = batch.rows, I = params.I, O = params.O;
  // Rows that overlap no BLAS takes: they would be copied for each panel, and after the first one
  // there must be no want of memory.
  const at::Tensor x = B > 1 && rows.stride(0) < I ? rows.contiguous() : rows;
  const RowChunks cut = cut_rows(B, cpu::residual_chunks(B, O));

  const int64_t y_bytes = round_up(B * O * static_cast<int64_t>(sizeof(T)), 64);
  const int64_t sums_bytes =
      round_up(cut.count * sums_stride(O) * static_cast<int64_t>(sizeof(double)), 64);
  const int64_t panel = std::min(O, cpu::grad_panel_outputs(I, sizeof(T), at::get_num_threads()));
  char* base = static_cast<char*>(
      workspace.reserve(y_bytes + sums_bytes + panel * I * static_cast<int64_t>(sizeof(T))));
  auto* sums = reinterpret_cast<double*>(base + y_bytes);
  at::Tensor y = at::from_blob(base, {B, O}, state.weight.options().requires_grad(false));
  at::mm_out(y, x, state.weight.t());

  residual_sums<T>({reinterpret_cast<T*>(base), batch.target, batch.target_stride, params.bias, B,
                    O, mse_dy_scale(state.reduction, B, O), sums, sums + O},
                   cut);

  // The last reader of W was y.
  gemm_update<T>(y, x, params, reinterpret_cast<T*>(base + y_bytes + sums_bytes));
  cpu::update_bias<T>(sums, cut.count, sums_stride(O), params);
  return total_loss<T>(sums + O, cut, O, mse_loss_scale(state.reduction, B, O));
}

// The same two plans where x or W is 16 bit: dW as a whole, in float.
template <typename X, typename P>
float widened_step(const LinearSgdState& state, const WidenedBatch<X, P>& batch, Plan plan,
                   Workspace& workspace) {
  const auto [B, I, O] = batch.shape;
  const cpu::LinearParams<P> params = params_of<P>(state);
  const double loss_scale = mse_loss_scale(state.reduction, B, O);
  if (plan == Plan::kOnePass) {
    const WidenedSums sums = widened_one_pass(batch, /*with_dweight=*/true, workspace);
    update_from_partials(sums.partial, sums.cut.count, params);
    return total_loss<float>(sums.partial.loss, sums.cut, O, loss_scale);
  }
  const BelowDispatcher below;
  const at::Tensor dweight = at::detail::empty_cpu({O, I}, at::TensorOptions().dtype(at::kFloat));
  std::vector<double> sums(static_cast<size_t>(sums_stride(O)));
  double *const dbias = sums.data(), *const loss = dbias + O;
  gemm_16_bit(batch, dweight, dbias, loss, workspace);
  update_outputs(params, read<float>(dweight), 0, O);
  cpu::update_bias<P>(dbias, 1, O, params);
  return static_cast<float>(*loss * loss_scale);
}

template <typename X, typename P>
Accum<P> step(const LinearSgdState& state, const at::Tensor& x, const at::Tensor& target,
              Workspace& workspace) {
  const int64_t B = x.size(0), I = state.weight.size(1), O = state.weight.size(0);
  const Plan plan = plan_for(state, B);
  if constexpr (kIs16Bit<X>) {
    const WidenedBatch<X, P> batch{read<X>(x),
                                   x.stride(0),
                                   read<P>(target),
                                   target.stride(0),
                                   read<P>(state.weight),
                                   read<P>(state.bias),
                                   {B, I, O},
                                   mse_dy_scale(state.reduction, B, O)};
    return widened_step(state, batch, plan, workspace);
  } else {
    const cpu::Rows<X> batch = rows_of<X>(x, target);
    const cpu::LinearParams<X> params = params_of<X>(state);
    if (plan == Plan::kOnePass) return one_pass_step(batch, state.reduction, params, workspace);
    const BelowDispatcher below;
    return gemm_step(state, x, batch, params, workspace);
  }
}

// Rows `index` of `from` [n, row_bytes], one after the other.
void gather_rows(const char* from, int64_t from_stride, const int64_t* index, int64_t rows,
                 int64_t row_bytes, char* to) {
  const int64_t grain = std::max<int64_t>(1, 64 * 1024 / std::max<int64_t>(1, row_bytes));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      std::memcpy(to + k * row_bytes, from + index[k] * from_stride, row_bytes);
    }
  });
}

// The batches of a run, as rows of [n * rows_per_sample] data: x stored as X, the rest as P.
template <typename X, typename P>
class Runner {
 public:
  Runner(LinearSgdState& state, const at::Tensor& x, const at::Tensor& target, int64_t n,
         const RunOptions& options, Workspace& workspace, RunWatch& watch)
      : state_(state),
        x_(x),
        target_(target),
        per_sample_(n > 0 ? x.size(0) / n : 0),
        n_(n),
        options_(options),
        workspace_(workspace),
        watch_(watch) {}

  at::Tensor run() {
    const int64_t per_epoch = cpu::ceil_div(n_, options_.batch_size);
    at::Tensor losses = at::detail::empty_cpu(
        {options_.epochs * per_epoch}, at::TensorOptions().dtype(state_.weight.scalar_type()));
    loss_ = written<P>(losses);
    const int64_t total = losses.numel();
    if (total == 0) return losses;
    const int64_t batch_rows = std::min(options_.batch_size, n_) * per_sample_;
    const LinearShape shape{batch_rows, state_.weight.size(1), state_.weight.size(0)};
    const bool serial = !kIs16Bit<X> && !options_.shuffle && batch_rows > 0 &&
                        plan_for(state_, batch_rows) == Plan::kOnePass &&
                        cpu::one_pass_chunks(shape) == 1;
    // About a millisecond of steps at 10 multiply-adds per nanosecond.
    slice_ = std::max<int64_t>(1, 10'000'000 / (2 * shape.B * shape.I * shape.O + 500));
    if constexpr (!kIs16Bit<X>) {
      if (serial) run_serial(batch_rows, total);
    }
    if (!serial) run_batches(per_epoch);
    return losses;
  }

 private:
  void run_serial(int64_t batch_rows, int64_t total) {
    const cpu::Rows<P> data = rows_of<P>(x_, target_);
    int64_t row = 0;
    const int64_t per_epoch = cpu::ceil_div(data.rows, batch_rows);
    for (int64_t done = 0; done < total;) {
      const int64_t steps = std::min(slice_, total - done);
      row = done % per_epoch * batch_rows;
      serial_steps(data, batch_rows, row, steps, state_.reduction, params_of<P>(state_), workspace_,
                   loss_ + done);
      after(steps);
      done += steps;
      watch_.poll();
    }
  }

  void run_batches(int64_t per_epoch) {
    int64_t done = 0, since_poll = 0;
    for (int64_t epoch = 0; epoch < options_.epochs; ++epoch) {
      at::Tensor order;
      if (options_.shuffle) order = at::randperm(n_, options_.generator, at::kLong);
      for (int64_t k = 0; k < per_epoch; ++k) {
        const int64_t first = k * options_.batch_size;
        const int64_t count = std::min(options_.batch_size, n_ - first);
        loss_[done] = narrow<P>(
            options_.shuffle
                ? shuffled_step(order, first, count)
                : step<X, P>(state_, x_.narrow(0, first * per_sample_, count * per_sample_),
                             target_.narrow(0, first * per_sample_, count * per_sample_),
                             workspace_));
        after(1);
        ++done;
        if (++since_poll >= slice_) {
          since_poll = 0;
          watch_.poll();
        }
      }
    }
    watch_.poll();
  }

  Accum<P> shuffled_step(const at::Tensor& order, int64_t first, int64_t count) {
    const int64_t* index = order.const_data_ptr<int64_t>() + first;
    return step<X, P>(state_, gathered(x_, x_batch_, index, count),
                      gathered(target_, target_batch_, index, count), workspace_);
  }

  at::Tensor gathered(const at::Tensor& from, at::Tensor& batch, const int64_t* index,
                      int64_t count) {
    const int64_t columns = from.size(1);
    if (!batch.defined()) {
      const int64_t rows = std::min(options_.batch_size, n_) * per_sample_;
      batch = at::detail::empty_cpu({rows, columns}, at::TensorOptions().dtype(from.scalar_type()));
    }
    const int64_t bytes = from.element_size();
    gather_rows(static_cast<const char*>(from.const_data_ptr()),
                from.stride(0) * per_sample_ * bytes, index, count, per_sample_ * columns * bytes,
                static_cast<char*>(batch.mutable_data_ptr()));
    return batch.narrow(0, 0, count * per_sample_);
  }

  void after(int64_t steps) {
    watch_.steps += steps;
    state_.weight_options.first_step = state_.bias_options.first_step = false;
    state_.bump_versions();
  }

  LinearSgdState& state_;
  const at::Tensor& x_;       // [n * per_sample, I]
  const at::Tensor& target_;  // [n * per_sample, O]
  const int64_t per_sample_;
  const int64_t n_;
  const RunOptions& options_;
  Workspace& workspace_;
  RunWatch& watch_;
  at::Tensor x_batch_, target_batch_;
  P* loss_ = nullptr;
  int64_t slice_ = 1;
};

}  // namespace

Plan plan_for(const LinearSgdState& state, int64_t B) {
  return choose_cpu_plan({B, state.weight.size(1), state.weight.size(0)},
                         state.weight.scalar_type());
}

at::Tensor linear_mse_sgd_cpu(const LinearSgdState& state, const at::Tensor& input,
                              const at::Tensor& target, Workspace& workspace) {
  const at::Tensor x = as_rows(input, state.weight.size(1));
  const at::Tensor t = as_rows(target, state.weight.size(0));
  const at::ScalarType dtype = state.weight.scalar_type();
  at::Tensor loss = at::detail::empty_cpu({}, at::TensorOptions().dtype(dtype));
  with_pair(x.scalar_type(), dtype, [&](auto of_x, auto of_param) {
    using X = decltype(of_x);
    using P = decltype(of_param);
    *written<P>(loss) = narrow<P>(step<X, P>(state, x, t, workspace));
  });
  state.bump_versions();
  return loss;
}

at::Tensor run_linear_mse_sgd_cpu(LinearSgdState state, const at::Tensor& inputs,
                                  const at::Tensor& targets, const RunOptions& options,
                                  Workspace& workspace, RunWatch& watch) {
  const BelowDispatcher below;
  // Samples of several rows are gathered whole, so they must lie together.
  const bool plain_rows = inputs.dim() == 2;
  const at::Tensor x = as_rows(plain_rows ? inputs : inputs.contiguous(), state.weight.size(1));
  const at::Tensor t = as_rows(plain_rows ? targets : targets.contiguous(), state.weight.size(0));
  const int64_t n = inputs.size(0);
  return with_pair(x.scalar_type(), state.weight.scalar_type(), [&](auto of_x, auto of_param) {
    return Runner<decltype(of_x), decltype(of_param)>(state, x, t, n, options, workspace, watch)
        .run();
  });
}

}  // namespace fused_step
