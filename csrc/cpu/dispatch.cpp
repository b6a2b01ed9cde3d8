// SPDX-License-Identifier: MIT
// Which instruction set's table is in use.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace fused_step::cpu {

#define FUSED_STEP_DECLARE_TABLES(isa)                     \
  namespace isa {                                          \
  extern const Kernels<float> kFloatKernels;               \
  extern const Kernels<double> kDoubleKernels;             \
  extern const WideningKernels<BFloat16> kBFloat16Kernels; \
  extern const WideningKernels<Float16> kFloat16Kernels;   \
  extern const SgdKernels kSgdKernels;                     \
  }

FUSED_STEP_DECLARE_TABLES(baseline)
#if defined(__x86_64__)
FUSED_STEP_DECLARE_TABLES(avx2)
FUSED_STEP_DECLARE_TABLES(avx512)
namespace avx2_short {
void float_steps(const SerialSteps<float>& a);
void double_steps(const SerialSteps<double>& a);
}  // namespace avx2_short
#endif

namespace {

Isa widest_supported() {
  Isa widest = Isa::kBaseline;
  for (int k = 1; k < kIsaCount; ++k) {
    if (isa_supported(static_cast<Isa>(k))) widest = static_cast<Isa>(k);
  }
  return widest;
}

Isa initial_isa() {
  const char* name = std::getenv("FUSED_STEP_ISA");
  for (int k = 0; name != nullptr && k < kIsaCount; ++k) {
    const Isa isa = static_cast<Isa>(k);
    if (std::strcmp(name, isa_name(isa)) == 0 && isa_supported(isa)) return isa;
  }
  return widest_supported();
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* kNames[kIsaCount] = {"baseline", "avx2", "avx512"};
  return kNames[static_cast<int>(isa)];
}

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("fma");
  }
#endif
  return isa == Isa::kBaseline;
}

Isa isa_used() { return current().load(std::memory_order_relaxed); }

bool use_isa(Isa isa) {
  if (!isa_supported(isa)) return false;
  current().store(isa, std::memory_order_relaxed);
  return true;
}

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

#if defined(__x86_64__)
#define FUSED_STEP_PICK_TABLE(table)                    \
  if (isa_used() == Isa::kAvx512) return avx512::table; \
  if (isa_used() == Isa::kAvx2) return avx2::table;     \
  return baseline::table;
#else
#define FUSED_STEP_PICK_TABLE(table) return baseline::table;
#endif

template <>
const Kernels<float>& kernels<float>() {
  FUSED_STEP_PICK_TABLE(kFloatKernels)
}

template <>
const Kernels<double>& kernels<double>() {
  FUSED_STEP_PICK_TABLE(kDoubleKernels)
}

template <>
const WideningKernels<BFloat16>& widening_kernels<BFloat16>() {
  FUSED_STEP_PICK_TABLE(kBFloat16Kernels)
}

template <>
const WideningKernels<Float16>& widening_kernels<Float16>() {
  FUSED_STEP_PICK_TABLE(kFloat16Kernels)
}

const SgdKernels& sgd_kernels() { FUSED_STEP_PICK_TABLE(kSgdKernels) }

namespace {

template <typename T>
bool is_one_row_of(int64_t bytes, const LinearParams<T>& p) {
  return p.O == 1 && p.I > 0 && p.I * static_cast<int64_t>(sizeof(T)) <= bytes;
}

}  // namespace

#if defined(__x86_64__)
#define FUSED_STEP_PICK_STEPS(short_steps, table)                                \
  if (isa_used() != Isa::kBaseline) {                                            \
    if (is_one_row_of(16, steps.params)) return avx2_short::short_steps(steps);  \
    if (is_one_row_of(32, steps.params)) return avx2::table.serial_steps(steps); \
  }
#else
#define FUSED_STEP_PICK_STEPS(short_steps, table)
#endif

template <>
void run_serial_steps<float>(const SerialSteps<float>& steps) {
  if (steps.steps <= 0) return;
  FUSED_STEP_PICK_STEPS(float_steps, kFloatKernels)
  kernels<float>().serial_steps(steps);
}

template <>
void run_serial_steps<double>(const SerialSteps<double>& steps) {
  if (steps.steps <= 0) return;
  FUSED_STEP_PICK_STEPS(double_steps, kDoubleKernels)
  kernels<double>().serial_steps(steps);
}

}  // namespace fused_step::cpu
