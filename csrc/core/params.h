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

// How the optimizer finds a parameter stored: its gradient has the same type, its momentum buffer
// too unless the name says otherwise.
enum class SgdStorage : int8_t {
  kFloat,
  kDouble,
  kBFloat16,
  kFloat16,
  kBFloat16FloatBuf,
  kFloat16FloatBuf
};
constexpr int kSgdStorageCount = 6;

// What an optimizer's pass leaves in the gradient.
enum class GradAfter : int8_t { kKept, kUnscaled, kZero };

}  // namespace fused_step
