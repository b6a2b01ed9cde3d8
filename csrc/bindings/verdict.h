// SPDX-License-Identifier: MIT
// Collects why a fused plan does not apply: the first reason is enough for a step, explain() wants
// them all.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/inline.h"

namespace fused_step {

class Verdict {
 public:
  // `reasons` null: only whether.
  explicit Verdict(std::vector<std::string>* reasons) : reasons_(reasons) {}

  // Notes `reason` if `holds`; true when the caller need look no further. Inlined: a step asks some
  // forty times, and a call for each is a twentieth of a small one's time.
  FUSED_STEP_INLINE bool against(bool holds, const char* reason) {
    return __builtin_expect(holds, 0) && note(reason);
  }
  // The same of something with a name: `name` and `what` make the reason.
  FUSED_STEP_INLINE bool against(bool holds, const char* name, const char* what) {
    return __builtin_expect(holds, 0) && note(std::string(name) + what);
  }
  // Notes a reason beyond which there is nothing to look at; false.
  bool reject(std::string reason) {
    note(std::move(reason));
    return false;
  }

  bool applies() const { return applies_; }
  // Whether reasons are put into words at all.
  bool explains() const { return reasons_ != nullptr; }

 private:
  bool note(std::string reason) {
    applies_ = false;
    if (reasons_ == nullptr) return true;
    reasons_->push_back(std::move(reason));
    return false;
  }

  std::vector<std::string>* reasons_;
  bool applies_ = true;
};

}  // namespace fused_step
