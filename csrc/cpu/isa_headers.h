// SPDX-License-Identifier: MIT
// Everything that isa_kernels.h needs from outside, included before the target pragma so that no
// function of a system header is compiled for an instruction set the processor may lack.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/float16.h"
#include "core/mse_math.h"
#include "core/sgd_math.h"
#include "cpu/bias.h"
#include "cpu/kernels.h"
#include "cpu/policy.h"
