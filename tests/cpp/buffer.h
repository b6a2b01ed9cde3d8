// SPDX-License-Identifier: MIT
// Memory that notices what should not be touched. Four places, chosen by a seed:
//   heap end    the allocation ends with the last element: AddressSanitizer sees one more
//   guarded     guard words on both sides, for stores that no sanitizer watches
//   page end    an unreadable page follows, page start: one lies before; masked vector loads and
//               stores are not instrumented, but the processor faults on what they touch
// On the heap the first element is 0 to 3 elements off the allocation's alignment. Everything
// starts as NaN, guard words included, so that whatever reads them spoils its result.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/float16.h"

namespace fused_step::test {

template <typename T>
constexpr bool kIs16Bit = sizeof(T) == 2;

inline uint64_t hash(uint64_t a, uint64_t b = 0) {
  uint64_t z = a * 0x9E3779B97F4A7C15u + (b + 1) * 0xD1B54A32D192ED03u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

template <typename T>
T random_number(uint64_t seed, int64_t k) {
  constexpr int kDigits = std::numeric_limits<T>::digits;
  const uint64_t bits = hash(seed, static_cast<uint64_t>(k));
  const T fraction =
      static_cast<T>(bits >> (64 - kDigits)) / static_cast<T>(uint64_t{1} << kDigits);
  const T magnitude = T(0.25) + T(0.75) * fraction;
  return bits & 1 ? -magnitude : magnitude;
}

// +-[1/4, 1], with all of T's digits: never zero, and no product of a few of them is subnormal.
template <typename T>
T random_value(uint64_t seed, int64_t k) {
  if constexpr (kIs16Bit<T>) {
    return narrow<T>(random_number<float>(seed, k));
  } else {
    return random_number<T>(seed, k);
  }
}

template <typename T>
class Buffer {
 public:
  using Bits = std::conditional_t<kIs16Bit<T>, uint16_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  enum class Place { kHeapEnd, kGuarded, kPageEnd, kPageStart };
  static constexpr int kPlaces = 4;
  static constexpr int64_t kGuards = 32;  // two of the widest vectors of float

  Buffer(int64_t n, uint64_t seed) : n_(n), place_(static_cast<Place>(seed % kPlaces)) {
    const int64_t misaligned = static_cast<int64_t>(seed / kPlaces % 4);
    switch (place_) {
      case Place::kHeapEnd:
        before_ = misaligned;
        break;
      case Place::kGuarded:
        before_ = kGuards + misaligned;
        after_ = kGuards;
        break;
      case Place::kPageEnd:
      case Place::kPageStart: {
        const int64_t in_pages = round_up(n * size(), page());
        const int64_t slack = in_pages / size() - n;
        (place_ == Place::kPageEnd ? before_ : after_) = slack;
        break;
      }
    }
    const int64_t total = before_ + n + after_;
    base_ = on_pages() ? map_pages(total * size())
                       // NOLINTNEXTLINE(clang-analyzer-optin.portability.UnixAPI): 0 bytes, too
                       : static_cast<T*>(std::malloc(static_cast<size_t>(total * size())));
    const Bits guard = guard_bits();
    for (int64_t k = 0; k < total; ++k) std::memcpy(base_ + k, &guard, sizeof(T));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (on_pages()) {
      const int64_t bytes = (before_ + n_ + after_) * size();
      ::munmap(reinterpret_cast<char*>(base_) - page(), static_cast<size_t>(bytes + 2 * page()));
    } else {
      std::free(base_);
    }
  }

  T* data() { return base_ + before_; }
  const T* data() const { return base_ + before_; }
  T& operator[](int64_t k) { return data()[k]; }
  const T& operator[](int64_t k) const { return data()[k]; }
  int64_t n() const { return n_; }

  void fill_random(uint64_t seed) {
    for (int64_t k = 0; k < n_; ++k) data()[k] = random_value<T>(seed, k);
  }
  void fill(T value) {
    for (int64_t k = 0; k < n_; ++k) data()[k] = value;
  }
  void fill_nan() { fill(std::bit_cast<T>(guard_bits())); }

  std::vector<T> copy() const { return std::vector<T>(data(), data() + n_); }
  // Bit by bit: NaN equals itself.
  bool equals(const std::vector<T>& other) const {
    return static_cast<int64_t>(other.size()) == n_ &&
           (n_ == 0 || std::memcmp(data(), other.data(), static_cast<size_t>(n_ * size())) == 0);
  }

  // Whether the guard words are as they were made.
  bool intact() const {
    // The slack of a page is looked at next to the data only.
    const int64_t before = before_ < 2 * kGuards ? before_ : 2 * kGuards;
    const int64_t after = after_ < 2 * kGuards ? after_ : 2 * kGuards;
    for (int64_t k = -before; k < 0; ++k) {
      if (!is_guard(k)) return false;
    }
    for (int64_t k = n_; k < n_ + after; ++k) {
      if (!is_guard(k)) return false;
    }
    return true;
  }
  bool is_guard(int64_t k) const {
    const Bits guard = guard_bits();
    return std::memcmp(data() + k, &guard, sizeof(T)) == 0;
  }

 private:
  static int64_t size() { return static_cast<int64_t>(sizeof(T)); }
  static int64_t page() { return ::sysconf(_SC_PAGESIZE); }
  static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
  static Bits guard_bits() {  // a quiet NaN that no arithmetic makes
    if constexpr (kIs16Bit<T>) {
      return 0x7FED;  // in both 16-bit formats
    } else {
      return std::bit_cast<Bits>(std::numeric_limits<T>::quiet_NaN()) | Bits(0x5EED);
    }
  }
  bool on_pages() const { return place_ == Place::kPageEnd || place_ == Place::kPageStart; }

  static T* map_pages(int64_t bytes) {
    void* all = ::mmap(nullptr, static_cast<size_t>(bytes + 2 * page()), PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) std::abort();
    char* const first = static_cast<char*>(all) + page();
    if (bytes > 0 && ::mprotect(first, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE) != 0) {
      std::abort();
    }
    return reinterpret_cast<T*>(first);
  }

  int64_t n_;
  Place place_;
  int64_t before_ = 0, after_ = 0;  // guard words
  T* base_ = nullptr;
};

// Leaves NaN in the stack below the caller, where a loop's own arrays will lie.
[[gnu::noinline]] inline void poison_stack() {
  volatile double stack[4096];
  for (volatile double& slot : stack) slot = std::numeric_limits<double>::quiet_NaN();
}

}  // namespace fused_step::test
