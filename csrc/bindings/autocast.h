// SPDX-License-Identifier: MIT
// What is asked of autocast. Declared here, since its header, ATen/autocast_mode.h, takes 8 s to
// compile: it has all of ATen.
#pragma once

#include <c10/core/DeviceType.h>
#include <c10/core/ScalarType.h>

namespace at::autocast {
TORCH_API at::ScalarType get_autocast_dtype(at::DeviceType device_type);
TORCH_API bool is_autocast_cache_enabled();
}  // namespace at::autocast
