// SPDX-License-Identifier: MIT
// The loops and their tables for one instruction set. Included by each isa_*.cpp, which has set
// the target pragma, FUSED_STEP_ISA and FUSED_STEP_VECTOR_BYTES and included isa_headers.h before.

namespace fused_step::cpu {

#include "cpu/simd.h"

#include "cpu/short_rows.h"

#include "cpu/one_pass.h"

#include "cpu/gemm_passes.h"
#include "cpu/register_steps.h"

#include "cpu/serial_steps.h"
#include "cpu/sgd.h"
#include "cpu/widening.h"

namespace FUSED_STEP_ISA {

template <typename T>
constexpr Kernels<T> kTable = {one_pass_chunk<T>, one_pass_update<T>, one_pass_grad<T>,
                               serial_steps<T>,   residual_chunk<T>,  sgd<T>};

extern const Kernels<float> kFloatKernels = kTable<float>;
extern const Kernels<double> kDoubleKernels = kTable<double>;
extern const SgdKernels kSgdKernels = {
    {sgd_slice<float, float>, sgd_slice<double, double>, sgd_slice<BFloat16, BFloat16>,
     sgd_slice<Float16, Float16>, sgd_slice<BFloat16, float>, sgd_slice<Float16, float>},
    {sum_squares<float>, sum_squares<double>, sum_squares<BFloat16>, sum_squares<Float16>,
     sum_squares<BFloat16>, sum_squares<Float16>}};

template <typename S>
constexpr WideningKernels<S> kWideningTable = {
    widen_rows<S>, narrow_row<S>, widened_chunk<S>, one_pass_update<S>, residual_chunk<S>, sgd<S>};

extern const WideningKernels<BFloat16> kBFloat16Kernels = kWideningTable<BFloat16>;
extern const WideningKernels<Float16> kFloat16Kernels = kWideningTable<Float16>;

}  // namespace FUSED_STEP_ISA

}  // namespace fused_step::cpu
