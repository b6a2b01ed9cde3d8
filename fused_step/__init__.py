# SPDX-License-Identifier: MIT
"""The five lines of a PyTorch training step as one call."""

from fused_step.functional import linear_mse_loss
from fused_step.modules import LinearMSELoss
from fused_step.optim import SGD
from fused_step.train_step import TrainStep

__version__ = "0.1.0"

__all__ = ["SGD", "LinearMSELoss", "TrainStep", "__version__", "linear_mse_loss"]
