// SPDX-License-Identifier: MIT
// Reads the Python side of a loss: is calling it nothing but the mean or sum of the squared errors
// of an output and a target?
#pragma once

#include <Python.h>

#include "bindings/verdict.h"
#include "bindings/watch.h"
#include "core/params.h"

namespace fused_step {

struct SquaredError {
  Reduction reduction = Reduction::kMean;
  bool is_mse_loss = true;  // else written with operators, which autocast treats in another way
  bool may_be_kept = true;  // false: it may change unseen (a partial's keywords)
};

// nn.MSELoss, F.mse_loss or a partial of it; a function or a class of the user's own that computes
// the same; None for that of a LinearMSELoss, the model, whose layer read_only_layer() has found.
// Notes in `watch` what it came from; false where the loss is something else.
bool read_loss(PyObject* loss, PyObject* model, Verdict& verdict, Watch& watch,
               SquaredError& reading);

}  // namespace fused_step
