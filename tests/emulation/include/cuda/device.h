// SPDX-License-Identifier: MIT
// Stands in front of csrc/cuda/device.h where kernels run on the host: its twin, word for word in
// what it offers. A copy of copy_async arrives as late as the hardware allows, or as early,
// depending on the schedule.
#pragma once

#include <cmath>
#include <cstring>
#include <tuple>

#include "core/float16.h"
#include "cuda_runtime_api.h"
#include "emulation/builtins.h"
#include "emulation/runtime.h"

#define FUSED_STEP_DYNAMIC_SHARED(name) unsigned char* const name = ::emulation::dynamic_shared()

namespace fused_step::cuda {

template <typename... Params>
cudaError_t allow_shared(void (*kernel)(Params...), int64_t bytes) {
  return ::emulation::allow_shared(reinterpret_cast<const void*>(kernel), bytes)
             ? cudaSuccess
             : cudaErrorInvalidValue;
}

template <typename... Params>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, int64_t shared_bytes,
                   cudaStream_t stream, const Params&... params) {
  // Copied when launched, as parameters are.
  const auto run = [kernel, copies = std::tuple<Params...>(params...)] {
    std::apply(kernel, copies);
  };
  const bool accepted = ::emulation::enqueue(stream, [=] {
    return ::emulation::launch(
        reinterpret_cast<const void*>(kernel), grid, threads, shared_bytes,
        [](const void* body) { (*static_cast<const decltype(run)*>(body))(); }, &run);
  });
  return accepted ? cudaSuccess : cudaErrorInvalidValue;
}

inline int64_t most_shared() { return ::emulation::most_shared; }

constexpr int64_t kArgumentBytes = 4096;
constexpr int64_t kLargeArgumentBytes = 32764;

inline bool takes_large_arguments() { return ::emulation::large_arguments; }

template <typename Word>
void forget(Word&) {}

template <int kBytes>
void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  ::emulation::copy_async(shared, global, kBytes);
}
inline void copy_async_commit() { ::emulation::copy_async_commit(); }
template <int kPending>
void copy_async_wait() {
  ::emulation::copy_async_wait(kPending);
}

// Reads, so that an address that is nobody's is noticed.
inline void prefetch(const void* global) { (void)*static_cast<const volatile char*>(global); }

template <bool kTransposed>
void load_matrices(unsigned (&to)[4], const void* row, EMULATION_SITE) {
  ::emulation::check_aligned(row, 16, "ldmatrix");
  ::emulation::together(row, to,
                        [](const ::emulation::Given& given, ::emulation::Taken& taken) {
                          for (int lane = 0; lane < 32; ++lane) {
                            const int g = lane / 4, t = lane % 4;
                            for (int m = 0; m < 4; ++m) {
                              uint16_t pair[2];
                              for (int k = 0; k < 2; ++k) {
                                const int r = kTransposed ? 2 * t + k : g,
                                          c = kTransposed ? g : 2 * t + k;
                                const auto* from = given.as<const uint16_t*>(8 * m + r);
                                pair[k] = from[c];
                              }
                              std::memcpy(taken.lanes[lane] + 4 * m, pair, 4);
                            }
                          }
                        },
                        {file, line});
}

inline unsigned transposed(unsigned word, EMULATION_SITE) {
  unsigned result;
  ::emulation::together(word, result,
                        [](const ::emulation::Given& given, ::emulation::Taken& taken) {
                          uint16_t matrix[8][8];
                          for (int lane = 0; lane < 32; ++lane) {
                            std::memcpy(&matrix[lane / 4][2 * (lane % 4)], given.lanes[lane], 4);
                          }
                          for (int lane = 0; lane < 32; ++lane) {
                            const int g = lane / 4, t = lane % 4;
                            const uint16_t pair[2] = {matrix[2 * t][g], matrix[2 * t + 1][g]};
                            std::memcpy(taken.lanes[lane], pair, 4);
                          }
                        },
                        {file, line});
  return result;
}

// What a lane gives to a product: a and b, and d as it was.
struct Factors {
  unsigned a[4], b[2];
  float d[4];
};

// sum + the products as the units add them, or worse: not rounded but cut off, each addend one bit
// below the last of the largest one's, their sum at its own last bit. That they cut off: Fasi,
// Higham, Mikaitis, Pranesh, Numerical behavior of NVIDIA tensor cores, 2021.
inline float add_products_cut_off(float sum, const float (&products)[8]) {
  float largest = std::fabs(sum), plain = sum;
  for (const float p : products) {
    largest = std::fmax(largest, std::fabs(p));
    plain += p;
  }
  if (!std::isfinite(plain) || largest == 0.0f) return plain;
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 24);
  double total = std::trunc(sum / unit);
  for (const float p : products) total += std::trunc(p / unit);
  const auto nearest = static_cast<float>(total * unit);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(total * unit)
             ? std::nextafterf(nearest, 0.0f)
             : nearest;
}

template <typename X>
void multiply_add_of_warp(const ::emulation::Given& given, ::emulation::Taken& taken) {
  const auto half = [](unsigned word, int k) {
    return widen(X{static_cast<uint16_t>(word >> 16 * k)});
  };
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const auto from = given.as<Factors>(lane);
    for (int k = 0; k < 2; ++k) {
      for (int w = 0; w < 4; ++w) {
        a[g + 8 * (w % 2)][2 * t + k + 8 * (w / 2)] = half(from.a[w], k);
      }
      for (int w = 0; w < 2; ++w) b[2 * t + k + 8 * w][g] = half(from.b[w], k);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto from = given.as<Factors>(lane);
    float d[4];
    for (int k = 0; k < 4; ++k) {
      const int row = lane / 4 + 8 * (k / 2), column = 2 * (lane % 4) + k % 2;
      d[k] = from.d[k];
      for (int i = 0; i < 16; i += 8) {
        float products[8];  // exact
        for (int j = 0; j < 8; ++j) products[j] = a[row][i + j] * b[i + j][column];
        d[k] = add_products_cut_off(d[k], products);
      }
    }
    std::memcpy(taken.lanes[lane], d, sizeof(d));
  }
}

template <typename X>
void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], EMULATION_SITE) {
  Factors given;
  std::memcpy(given.a, a, sizeof(a));
  std::memcpy(given.b, b, sizeof(b));
  std::memcpy(given.d, d, sizeof(d));
  ::emulation::together(given, d, multiply_add_of_warp<X>, {file, line});
}

}  // namespace fused_step::cuda
