# SPDX-License-Identifier: MIT
"""The five lines of a PyTorch training step as one call."""

from fused_step.train_step import TrainStep

__version__ = "0.1.0"

__all__ = ["TrainStep", "__version__"]
