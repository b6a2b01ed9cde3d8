// SPDX-License-Identifier: MIT
// Memory of a GPU's tensor, as the tests want it: all ones (a NaN in every type) until it is
// written, and either between guard words or ending with the allocation, where AddressSanitizer
// sees one element more.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "buffer.h"
#include "core/float16.h"

namespace fused_step::test {

template <typename T>
class Memory {
 public:
  static constexpr int64_t kGuards = 32;

  // `offset`: elements from an address aligned to 16.
  Memory(int64_t n, int64_t offset, uint64_t seed)
      : n_(n), before_(offset), after_(hash(seed) % 2 == 0 ? kGuards : 0) {
    if (after_ != 0) before_ += kGuards;
    const size_t bytes = static_cast<size_t>(before_ + n + after_) * sizeof(T);
    base_ = static_cast<T*>(std::malloc(bytes));
    if (bytes > 0) std::memset(static_cast<void*>(base_), 0xff, bytes);
  }
  Memory(const Memory& other) : Memory(other.n_, 0, 0) {
    if (n_ > 0) std::memcpy(static_cast<void*>(data()), other.data(), bytes());
  }
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(base_); }

  T* data() { return base_ + before_; }
  const T* data() const { return base_ + before_; }
  T& operator[](int64_t k) { return data()[k]; }
  const T& operator[](int64_t k) const { return data()[k]; }
  int64_t n() const { return n_; }
  size_t bytes() const { return static_cast<size_t>(n_) * sizeof(T); }

  // +-[1/4, 1), as T can hold it.
  void fill_random(uint64_t seed) {
    for (int64_t k = 0; k < n_; ++k) data()[k] = narrow<T>(random_value<Accum<T>>(seed, k));
  }
  std::vector<T> copy() const { return std::vector<T>(data(), data() + n_); }
  // Bit by bit.
  bool equals(const std::vector<T>& other) const {
    return static_cast<int64_t>(other.size()) == n_ &&
           (n_ == 0 || std::memcmp(data(), other.data(), bytes()) == 0);
  }
  bool intact() const { return ones(base_, before_) && ones(data() + n_, after_); }
  bool untouched() const { return intact() && ones(data(), n_); }

 private:
  static bool ones(const T* p, int64_t n) {
    const unsigned char* const bytes = reinterpret_cast<const unsigned char*>(p);
    for (int64_t k = 0; k < n * static_cast<int64_t>(sizeof(T)); ++k) {
      if (bytes[k] != 0xff) return false;
    }
    return true;
  }

  int64_t n_, before_, after_;
  T* base_;
};

}  // namespace fused_step::test
