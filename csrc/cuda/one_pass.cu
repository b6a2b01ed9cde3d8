// SPDX-License-Identifier: MIT
// Which one-pass kernel a problem takes.
#include "cuda/one_pass.h"

#include "cuda/one_pass_wide.cuh"
#include "cuda/pairs.h"

namespace fused_step::cuda {
namespace {

// Columns of a lane as vectors of at most 16 bytes, or one by one.
template <typename X, bool kVectors>
constexpr int vector_columns(int lane_columns) {
  constexpr int kFit = static_cast<int>(kVectorBytes / sizeof(X));
  return kVectors ? static_cast<int>(at_most(kFit, lane_columns)) : 1;
}

template <typename X, typename P, bool kVectors, int kOutputs, int kLaneColumns>
cudaError_t launch_rows(const OnePassArgs<X, P>& a, cudaStream_t stream) {
  constexpr int kV = vector_columns<X, kVectors>(kLaneColumns), kVecs = kLaneColumns / kV;
  constexpr int kSlots = kVectors ? kRowsSlots : kRowsScalarSlots;
  constexpr int kRows = static_cast<int>(
      at_least(1, at_most(kSlots / kVecs, rows_sums(sizeof(Accum<P>)) / kOutputs)));
  const int lanes = lanes_of(a.shape.I, kLaneColumns);
  return launch(one_pass_rows_kernel<Tile<X, P, kV, kVecs, kOutputs, kRows>>,
                dim3(static_cast<unsigned>(a.chunks.count)), kRowsThreads, 0, stream, a, lanes);
}

template <typename S, bool kVectors>
struct FeedOf {
  using type = RegisterFeed<S>;
};
template <typename S>
struct FeedOf<S, true> {
  using type = RingFeed<S>;
};

template <typename X, typename P, bool kVectors, int kOutputs>
cudaError_t launch_wide(const OnePassArgs<X, P>& a, cudaStream_t stream) {
  constexpr int kLaneColumns = wide_lane_columns(kOutputs, sizeof(Accum<P>));
  constexpr int kV = vector_columns<X, kVectors>(kLaneColumns), kVecs = kLaneColumns / kV;
  constexpr int kRows = static_cast<int>(at_least(1, kWideSlots / kVecs));
  using S = Tile<X, P, kV, kVecs, kOutputs, kRows>;
  using Feed = typename FeedOf<S, kVectors>::type;
  const auto kernel = one_pass_wide_kernel<S, Feed>;
  const int threads = static_cast<int>(round_up(ceil_div(a.shape.I, kLaneColumns), kWarp));
  const int64_t shared_bytes = Feed::shared_bytes(threads);
  if constexpr (kVectors) {
    const cudaError_t error = allow_shared(kernel, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  return launch(kernel, dim3(static_cast<unsigned>(a.chunks.count)), threads, shared_bytes, stream,
                a);
}

template <typename X, typename P, bool kVectors, int kOutputs>
cudaError_t launch_for_outputs(const OnePassArgs<X, P>& a, cudaStream_t stream) {
  // Each element that is loaded by itself has an address of its own: half as many of them fit the
  // registers.
  constexpr int kLaneColumns = rows_lane_columns(kOutputs, sizeof(Accum<P>)) / (kVectors ? 1 : 2);
  // One vector per lane where a row has no more: lanes that stand idle read nothing.
  constexpr int kFewColumns = vector_columns<X, true>(kLaneColumns);
  if constexpr (kFewColumns < kLaneColumns && kOutputs == 1) {
    if (a.shape.I <= kWarp * kFewColumns) {
      return launch_rows<X, P, kVectors, kOutputs, kFewColumns>(a, stream);
    }
  }
  if (a.shape.I <= kWarp * kLaneColumns) {
    return launch_rows<X, P, kVectors, kOutputs, kLaneColumns>(a, stream);
  }
  return launch_wide<X, P, kVectors, kOutputs>(a, stream);
}

template <typename X, typename P, bool kVectors>
cudaError_t launch_for(const OnePassArgs<X, P>& a, cudaStream_t stream) {
  const int capacity = output_capacity(a.shape.O);
  if (capacity == 1) return launch_for_outputs<X, P, kVectors, 1>(a, stream);
  if constexpr (one_pass_outputs(sizeof(X)) > 2) {
    if (capacity > 2) return launch_for_outputs<X, P, kVectors, 4>(a, stream);
  }
  return launch_for_outputs<X, P, kVectors, 2>(a, stream);
}

template <typename X, typename P>
constexpr bool takes_mma(const LinearShape& s) {
  return fits_mma(s.I, s.O, sizeof(X), sizeof(P));
}

template <typename X, typename P>
Chunks chunks_for(const LinearShape& s) {
  return takes_mma<X, P>(s) ? mma_chunks(s) : one_pass_chunks(s);
}

template <typename X, typename P>
cudaError_t launch_chunks(const OnePassArgs<X, P>& a, cudaStream_t stream) {
  if constexpr (sizeof(P) == 2) {  // and so x, of the same type
    if (takes_mma<X, P>(a.shape)) return launch_one_pass_mma(a, stream);
  }
  if (!fits_one_pass(a.shape.I, a.shape.O, sizeof(X), sizeof(Accum<P>))) {
    return cudaErrorInvalidValue;
  }
  return takes_vectors(a) ? launch_for<X, P, true>(a, stream) : launch_for<X, P, false>(a, stream);
}

}  // namespace

template <typename X, typename P>
cudaError_t launch_one_pass(OnePassArgs<X, P> a, cudaStream_t stream) {
  a.chunks = chunks_for<X, P>(a.shape);
  a.partial_bytes = partial_bytes(a.shape.I, a.shape.O, sizeof(Accum<P>));
  a.dweight_at = partial_dweight_at(a.shape.O);
  if (sums_apart(a.chunks, a.partial_bytes)) a.scratch.tickets = nullptr;
  const cudaError_t error = launch_chunks(a, stream);
  if (error != cudaSuccess || a.scratch.tickets != nullptr) return error;
  const int64_t blocks = sum_blocks(a.shape, sizeof(Accum<P>));
  return launch(one_pass_sum_kernel<X, P>, dim3(static_cast<unsigned>(blocks)), kSumThreads, 0,
                stream, a);
}

template <typename X, typename P>
int64_t one_pass_workspace(const LinearShape& shape) {
  return chunks_for<X, P>(shape).count * partial_bytes(shape.I, shape.O, sizeof(Accum<P>));
}

#define FUSED_STEP_INSTANTIATE(X, P)                                                \
  template cudaError_t launch_one_pass<X, P>(OnePassArgs<X, P> args, cudaStream_t); \
  template int64_t one_pass_workspace<X, P>(const LinearShape&);
FUSED_STEP_FOR_EACH_PAIR(FUSED_STEP_INSTANTIATE)

}  // namespace fused_step::cuda
