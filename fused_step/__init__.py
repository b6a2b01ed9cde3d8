# SPDX-License-Identifier: MIT
"""The five lines of a PyTorch training step as one call."""

import sys

__version__ = "0.1.0"

__all__ = ["SGD", "LinearMSELoss", "TrainStep", "__version__", "linear_mse_loss"]

# ``python -m fused_step COMMAND`` imports this file before it looks for the command, which may be
# to compile the module or to remove it: loading it here would be too early.
_is_command = (
    sys.argv[:1] == ["-m"]
    and sys.orig_argv[-len(sys.argv)].removeprefix("-m").split(".")[0] == __name__
)
if not _is_command:
    from fused_step.functional import linear_mse_loss
    from fused_step.modules import LinearMSELoss
    from fused_step.optim import SGD
    from fused_step.train_step import TrainStep
