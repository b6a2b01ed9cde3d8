// SPDX-License-Identifier: MIT
// Plain data shared by every engine: the sizes of a linear layer and the options of its update.
#pragma once

#include <cstdint>

namespace fused_step {

enum class Reduction : int8_t { kMean, kSum };

// y[B, O] = x[B, I] * W[O, I]^T + b[O].
struct LinearShape {
  int64_t B;
  int64_t I;
  int64_t O;
};

// torch.optim.SGD's options for one parameter. Double, so that nothing is rounded before the
// accumulator type is known. `first_step`: the momentum buffer holds no history yet.
struct SgdOptions {
  double lr = 0.0;
  double momentum = 0.0;
  double dampening = 0.0;
  double weight_decay = 0.0;
  bool nesterov = false;
  bool maximize = false;
  bool first_step = false;
};

}  // namespace fused_step
