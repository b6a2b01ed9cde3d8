// SPDX-License-Identifier: MIT
// The passes of linear_mse_passes.h over 16-bit tensors: W and the bias are widened once, x and the
// target a tile or a panel of rows at a time; all sums are float and end in float.
#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cstdint>

#include "bindings/dtypes.h"
#include "bindings/linear_mse_passes.h"
#include "cpu/kernels.h"
#include "cpu/policy.h"

namespace fused_step {

// What is read, and where the results go; null where nobody needs them.
template <typename X, typename P>
struct WidenedBatch {
  const X* x;  // [B, I]
  int64_t x_stride;
  const P* target;  // [B, O]
  int64_t target_stride;
  const P* weight;  // [O, I]
  const P* bias;    // [O] or null
  LinearShape shape;
  double dy_scale;
  cpu::Unscaled<X>* dx = nullptr;  // [B, I]
  cpu::Unscaled<P>* dy = nullptr;  // [B, O], for the gemm plan
};

// Several arrays in one workspace, each aligned to 64 bytes: all of them are added before the first
// is asked for.
class Arrays {
 public:
  template <typename T>
  int64_t add(int64_t elements) {
    const int64_t at = bytes_;
    bytes_ += round_up(elements * static_cast<int64_t>(sizeof(T)), 64);
    return at;
  }
  void reserve(Workspace& workspace) { base_ = static_cast<char*>(workspace.reserve(bytes_)); }
  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

 private:
  int64_t bytes_ = 0;
  char* base_ = nullptr;
};

// n adjacent elements in float: themselves, or widened into `to`.
template <typename S>
const float* in_float(const S* from, int64_t n, float* to) {
  if constexpr (!kIs16Bit<S>) {
    return from;
  } else {
    if (from == nullptr) return nullptr;
    at::parallel_for(0, n, cpu::kElementwiseGrain, [&](int64_t begin, int64_t end) {
      const int64_t count = end - begin;
      cpu::widening_kernels<S>().widen({from + begin, count, 1, count, to + begin});
    });
    return to;
  }
}

template <typename S>
void widen_rows(const S* from, int64_t stride, int64_t rows, int64_t columns, float* to) {
  const int64_t grain =
      std::max<int64_t>(1, cpu::kElementwiseGrain / std::max<int64_t>(1, columns));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    cpu::widening_kernels<S>().widen(
        {from + begin * stride, stride, end - begin, columns, to + begin * columns});
  });
}

// n adjacent elements, rounded once where S is 16 bit.
template <typename S>
void store_rounded(const float* from, S* to, int64_t n) {
  at::parallel_for(0, n, cpu::kElementwiseGrain, [&](int64_t begin, int64_t end) {
    if constexpr (kIs16Bit<S>) {
      cpu::widening_kernels<S>().narrow(from + begin, to + begin, end - begin);
    } else {
      std::copy(from + begin, from + end, to + begin);
    }
  });
}

// The sums of the whole batch, as partial sums of its chunks.
struct WidenedSums {
  RowChunks cut;
  cpu::PartialSums<float> partial;
};

template <typename X, typename P>
WidenedSums widened_one_pass(const WidenedBatch<X, P>& b, bool with_dweight, Workspace& workspace) {
  const auto [B, I, O] = b.shape;
  const RowChunks cut = cut_rows(B, cpu::one_pass_chunks(b.shape));
  const int64_t panel = round_up(cpu::widened_panel(I, O), 16);
  Arrays arrays;
  const int64_t dweight = arrays.add<float>(with_dweight ? cut.count * dweight_stride(O, I) : 0);
  const int64_t sums = arrays.add<double>(cut.count * sums_stride(O));
  const int64_t weight = arrays.add<float>(kIs16Bit<P> ? O * I : 0);
  const int64_t bias = arrays.add<float>(kIs16Bit<P> ? O : 0);
  const int64_t panels = arrays.add<float>(panel * at::get_num_threads());
  arrays.reserve(workspace);

  cpu::WidenedChunk<X> all{};
  all.x = b.x;
  all.x_stride = b.x_stride;
  all.target_stride = b.target_stride;
  all.dx = b.dx;
  all.chunk.batch.target_stride = b.target_stride;
  if constexpr (kIs16Bit<P>) {
    all.target = b.target;
  } else {
    all.chunk.batch.target = b.target;
  }
  all.chunk.weight = in_float(b.weight, O * I, arrays.at<float>(weight));
  all.chunk.bias = in_float(b.bias, O, arrays.at<float>(bias));
  all.chunk.I = I;
  all.chunk.O = O;
  all.chunk.dy_scale = b.dy_scale;
  double* const of_bias = arrays.at<double>(sums);
  const cpu::PartialSums<float> partial{with_dweight ? arrays.at<float>(dweight) : nullptr, of_bias,
                                        of_bias + O};
  at::parallel_for(0, cut.count, 1, [&](int64_t begin, int64_t end) {
    cpu::WidenedChunk<X> c = all;
    c.panel = arrays.at<float>(panels) + panel * at::get_thread_num();
    for (int64_t k = begin; k < end; ++k) {
      const int64_t row = k * cut.rows;
      c.x = all.x + row * b.x_stride;
      if (all.target != nullptr) c.target = all.target + row * b.target_stride;
      if (all.chunk.batch.target != nullptr) {
        c.chunk.batch.target = all.chunk.batch.target + row * b.target_stride;
      }
      if (all.dx != nullptr) c.dx = all.dx + row * I;
      c.chunk.batch.rows = std::min(cut.rows, B - row);
      c.chunk.partial = chunk_sums(partial, k, O, I);
      cpu::widening_kernels<X>().one_pass_chunk(c);
    }
  });
  return {cut, partial};
}

// Turns y of the n rows from `row` on into dL/dy, and adds their sums to dbias and loss. `sums` is
// workspace for those of its chunks.
template <typename X, typename P>
void add_panel_sums(const WidenedBatch<X, P>& b, int64_t row, int64_t n,
                    float* y,           // [n, O]
                    const float* bias,  // [O] or null
                    double* sums,       // [residual_chunks(n, O), sums_stride(O)]
                    double* dbias,      // [O]
                    double* loss) {
  const int64_t O = b.shape.O;
  const RowChunks cut = cut_rows(n, cpu::residual_chunks(n, O));
  residual_sums<P>({y, b.target + row * b.target_stride, b.target_stride, bias, n, O, b.dy_scale,
                    sums, sums + O},
                   cut);
  for (int64_t o = 0; o < O; ++o) dbias[o] += sum_chunks(sums + o, cut.count, sums_stride(O));
  *loss += sum_chunks(sums + O, cut.count, sums_stride(O));
}

// dW (if wanted) and the sums of the whole batch, by GEMMs in float over panels of rows: torch's
// own GEMM of bfloat16 takes 2.6 times as long as that of float, of float16 50 times, on a
// processor without instructions for them (bfloat16_gemm() is for those that have them). db and the
// loss lie at `dbias` [O] and `loss` [1].
template <typename X, typename P>
void widened_gemm(const WidenedBatch<X, P>& b, const at::Tensor& dweight,  // [O, I] float
                  double* dbias, double* loss, Workspace& workspace) {
  const auto [B, I, O] = b.shape;
  const int64_t most_rows = std::min(std::max<int64_t>(B, 1), cpu::widened_panel_rows(b.shape));
  const RowChunks most = cut_rows(most_rows, cpu::residual_chunks(most_rows, O));
  Arrays arrays;
  const int64_t weight_at = arrays.add<float>(kIs16Bit<P> ? O * I : 0);
  const int64_t bias_at = arrays.add<float>(kIs16Bit<P> ? O : 0);
  const int64_t x_at = arrays.add<float>(most_rows * I);
  const int64_t y_at = arrays.add<float>(most_rows * O);
  const int64_t sums_at = arrays.add<double>(most.count * sums_stride(O));
  arrays.reserve(workspace);
  const auto matrix = [](const float* data, int64_t rows, int64_t columns) {
    return at::from_blob(const_cast<float*>(data), {rows, columns}, at::kFloat);
  };
  const at::Tensor weight = matrix(in_float(b.weight, O * I, arrays.at<float>(weight_at)), O, I);
  const float* const bias = in_float(b.bias, O, arrays.at<float>(bias_at));
  float *const x_data = arrays.at<float>(x_at), *const y_data = arrays.at<float>(y_at);
  double* const sums = arrays.at<double>(sums_at);

  *loss = 0.0;
  std::fill(dbias, dbias + O, 0.0);
  int64_t row = 0;
  do {  // once for an empty batch, whose dW is zero
    const int64_t n = std::min(most_rows, B - row);
    at::Tensor x = matrix(x_data, n, I), y = matrix(y_data, n, O);
    widen_rows(b.x + row * b.x_stride, b.x_stride, n, I, x_data);
    at::mm_out(y, x, weight.t());
    add_panel_sums(b, row, n, y_data, bias, sums, dbias, loss);
    if (b.dy != nullptr) store_rounded(y_data, b.dy + row * O, n * O);
    if (dweight.defined()) {
      at::Tensor all = dweight;
      row == 0 ? at::mm_out(all, y.t(), x) : at::addmm_out(all, all, y.t(), x);
    }
    if (b.dx != nullptr) {
      at::mm_out(x, y, weight);  // the last use of x was dW's
      store_rounded(x_data, b.dx + row * I, n * I);
    }
    row += n;
  } while (row < B);
}

}  // namespace fused_step
