// SPDX-License-Identifier: MIT
// Stands in front of csrc/cuda/device.h where kernels run on the host: its twin, word for word in
// what it offers. A copy of copy_async arrives as late as the hardware allows, or as early,
// depending on the schedule.
#pragma once

#include <tuple>

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

}  // namespace fused_step::cuda
