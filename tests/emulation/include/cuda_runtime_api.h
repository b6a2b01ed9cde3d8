// SPDX-License-Identifier: MIT
// Stands in for the toolkit's header where kernels run on the host: what launchers name.
#pragma once

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
