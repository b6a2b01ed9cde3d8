// SPDX-License-Identifier: MIT
// The optimizer's list of tensors, each in guarded memory of its own, as a binding lays it out.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "problem.h"

namespace fused_step::test {

template <typename P, typename Buf>
struct ListTensor {
  Memory<P> param, grad;
  Memory<Buf> buf;

  // `aligned`: to 16 bytes; otherwise an element off, or not, each by itself.
  ListTensor(int64_t n, bool aligned, uint64_t seed)
      : param(n, offset(aligned, seed, 1), hash(seed, 2)),
        grad(n, offset(aligned, seed, 3), hash(seed, 4)),
        buf(n, offset(aligned, seed, 5), hash(seed, 6)) {
    param.fill_random(hash(seed, 7));
    grad.fill_random(hash(seed, 8));
  }

 private:
  static int64_t offset(bool aligned, uint64_t seed, uint64_t what) {
    return aligned ? 0 : static_cast<int64_t>(hash(seed, what) % 3);
  }
};

template <typename P, typename Buf>
struct TensorList {
  std::vector<std::unique_ptr<ListTensor<P, Buf>>> tensors;
  std::vector<cuda::SgdTensor> rows;
  std::vector<cuda::SgdChunk> chunks;

  TensorList(const std::vector<int64_t>& sizes, uint64_t seed) {
    for (size_t k = 0; k < sizes.size(); ++k) {
      const uint64_t of_tensor = hash(seed, k);
      tensors.push_back(
          std::make_unique<ListTensor<P, Buf>>(sizes[k], hash(of_tensor, 20) % 2 == 0, of_tensor));
      ListTensor<P, Buf>& t = *tensors.back();
      rows.push_back({t.param.data(), t.grad.data(), t.buf.data(), sizes[k], 0});
      for (int32_t c = 0; c * cuda::kListChunk<P> < sizes[k]; ++c) {
        chunks.push_back({static_cast<int32_t>(k), c});
      }
    }
  }

  cuda::SgdChunks pointers() const {
    return {rows.data(), chunks.data(), static_cast<int64_t>(chunks.size())};
  }
};

// Every number of elements up to two vectors and one; around a tile of single elements, a block of
// vectors, a chunk and two of them.
template <typename P>
std::vector<int64_t> list_sizes() {
  constexpr int64_t kV = cuda::kVectorBytes / static_cast<int64_t>(sizeof(P));
  std::vector<int64_t> sizes;
  for (int64_t n = 0; n <= 2 * kV + 1; ++n) sizes.push_back(n);
  for (const int64_t around : {int64_t{cuda::kListThreads}, cuda::kListThreads * kV,
                               cuda::kListChunk<P>, 2 * cuda::kListChunk<P>}) {
    for (const int64_t more : {-1, 0, 1}) sizes.push_back(around + more);
  }
  return sizes;
}

}  // namespace fused_step::test

// f<P, Buf>(arguments) for every storage of the optimizer.
#define FOR_EACH_STORAGE(f, ...)                                                                \
  do {                                                                                          \
    const auto for_storage = [&](auto p, auto b) { f<decltype(p), decltype(b)>(__VA_ARGS__); }; \
    FUSED_STEP_FOR_EACH_STORAGE(CALL_FOR_STORAGE)                                               \
  } while (false)
#define CALL_FOR_STORAGE(P, Buf) for_storage(P{}, Buf{});
