// SPDX-License-Identifier: MIT
// The passes over a batch that the whole step and the differentiable op have in common: tensors to
// rows, rows to chunks, chunks to threads.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <cstdint>

#include "bindings/dtypes.h"
#include "cpu/kernels.h"
#include "cpu/policy.h"

namespace fused_step {

// Scratch memory that outlives a step, so that a step allocates only its loss.
class Workspace {
 public:
  // At least `bytes`, aligned to 64.
  void* reserve(int64_t bytes) {
    if (!memory_.defined() || memory_.numel() < bytes) {
      memory_ = at::Tensor();  // freed before the larger one is taken
      memory_ = at::detail::empty_cpu({bytes}, at::TensorOptions().dtype(at::kByte));
    }
    return memory_.mutable_data_ptr();
  }

 private:
  at::Tensor memory_;
};

// The ATen calls of an op are its own: autograd, version counting and autocast stay outside.
class BelowDispatcher {
 private:
  at::AutoDispatchBelowADInplaceOrView below_autograd_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
};

// The loops over tensors stored as S.
template <typename S>
const auto& kernels_of() {
  if constexpr (kIs16Bit<S>) {
    return cpu::widening_kernels<S>();
  } else {
    return cpu::kernels<S>();
  }
}

// [rows, columns] with adjacent columns, a copy only where no such view exists.
inline at::Tensor as_rows(const at::Tensor& t, int64_t columns) {
  if (t.dim() == 2 && (t.stride(1) == 1 || columns == 1)) return t;
  const int64_t rows = c10::multiply_integers(t.sizes().slice(0, t.dim() - 1));
  return t.contiguous().view({rows, columns});
}

template <typename T>
cpu::Rows<T> rows_of(const at::Tensor& x, const at::Tensor& target) {
  return {read<T>(x), read<T>(target), x.stride(0), target.stride(0), x.size(0)};
}

inline int64_t round_up(int64_t n, int64_t to) { return cpu::ceil_div(n, to) * to; }

// How a pass is cut: chunk c has `rows` rows from c * rows on, the last one what is left.
struct RowChunks {
  int64_t rows;
  int64_t count;
};

// At least one chunk, which is empty for an empty batch.
inline RowChunks cut_rows(int64_t B, int64_t wanted) {
  const int64_t rows = std::max<int64_t>(1, cpu::rows_per_chunk(B, wanted));
  return {rows, std::max<int64_t>(1, cpu::ceil_div(B, rows))};
}

// Elements from one chunk's dW, and from its dbias and loss, to the next one's.
inline int64_t dweight_stride(int64_t O, int64_t I) { return O * cpu::partial_stride(I); }
inline int64_t sums_stride(int64_t O) { return O + 1; }

// Partial sums of `chunks` chunks in a workspace: all dW, if wanted, then for each chunk O + 1
// doubles.
template <typename T>
cpu::PartialSums<T> reserve_partials(Workspace& workspace, int64_t chunks, int64_t O, int64_t I,
                                     bool with_dweight = true) {
  const int64_t elements = with_dweight ? chunks * dweight_stride(O, I) : 0;
  const int64_t dweight_bytes = round_up(elements * static_cast<int64_t>(sizeof(T)), 64);
  char* base = static_cast<char*>(workspace.reserve(
      dweight_bytes + chunks * sums_stride(O) * static_cast<int64_t>(sizeof(double))));
  auto* sums = reinterpret_cast<double*>(base + dweight_bytes);
  return {with_dweight ? reinterpret_cast<T*>(base) : nullptr, sums, sums + O};
}

// Those of chunk c, where `first` are those of chunk 0.
template <typename T>
cpu::PartialSums<T> chunk_sums(const cpu::PartialSums<T>& first, int64_t c, int64_t O, int64_t I) {
  return {first.dweight != nullptr ? first.dweight + c * dweight_stride(O, I) : nullptr,
          first.dbias + c * sums_stride(O), first.loss + c * sums_stride(O)};
}

// `all` describes the whole batch, and as its partial sums those of chunk 0.
template <typename T>
void one_pass_sums(const cpu::OnePassChunk<T>& all, const RowChunks& cut) {
  const cpu::Kernels<T>& kernels = cpu::kernels<T>();
  at::parallel_for(0, cut.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t row = c * cut.rows;
      cpu::OnePassChunk<T> chunk = all;
      chunk.batch.x += row * all.batch.x_stride;
      chunk.batch.target += row * all.batch.target_stride;
      chunk.batch.rows = std::min(cut.rows, all.batch.rows - row);
      chunk.partial = chunk_sums(all.partial, c, all.O, all.I);
      if (all.dx != nullptr) chunk.dx += row * all.I;
      kernels.one_pass_chunk(chunk);
    }
  });
}

// Calls task(o, i, i_end) for all of an [O, I] matrix that is the sum of `chunks` others, 256
// columns of a row at a time.
template <typename Task>
void for_each_weight(int64_t O, int64_t I, int64_t chunks, const Task& task) {
  constexpr int64_t kColumns = 256;
  const int64_t blocks = cpu::ceil_div(I, kColumns);
  const int64_t grain = std::max<int64_t>(1, cpu::kElementwiseGrain / (kColumns * chunks));
  at::parallel_for(0, O * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = k % blocks * kColumns;
      task(k / blocks, i, std::min(i + kColumns, I));
    }
  });
}

// `all` likewise, for the gemm plan. T is what the target is stored in.
template <typename T>
void residual_sums(const cpu::ResidualChunk<T>& all, const RowChunks& cut) {
  const auto& kernels = kernels_of<T>();
  at::parallel_for(0, cut.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t row = c * cut.rows;
      cpu::ResidualChunk<T> chunk = all;
      chunk.y += row * all.O;
      chunk.target += row * all.target_stride;
      chunk.rows = std::min(cut.rows, all.rows - row);
      chunk.dbias += c * sums_stride(all.O);
      chunk.loss += c * sums_stride(all.O);
      kernels.residual_chunk(chunk);
    }
  });
}

// Sums of all chunks, in order.
inline double sum_chunks(const double* first, int64_t chunks, int64_t stride) {
  double sum = 0.0;
  for (int64_t c = 0; c < chunks; ++c) sum += first[c * stride];
  return sum;
}

}  // namespace fused_step
