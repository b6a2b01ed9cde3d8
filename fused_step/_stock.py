# SPDX-License-Identifier: MIT
"""Tells PyTorch's own methods, and ours, from replacements that somebody has put in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import SGD, Optimizer

# The first SGD made replaces SGD.step by Optimizer.profile_hook_step(SGD.step).
_STEP = getattr(SGD.step, "__wrapped__", SGD.step) if hasattr(SGD.step, "hooked") else SGD.step
_HOOK_CODE = Optimizer.profile_hook_step(_STEP).__code__
_KNOWN_STEPS = [_STEP]


def add_step(step: Callable[..., Any]) -> None:
    """Makes fused_step.SGD.step known, which is made after the extension is loaded."""
    _KNOWN_STEPS.append(step)


def is_stock_sgd_step(step: Any) -> bool:
    """Whether `step`, found in SGD or in an optimizer's ``__dict__``, is SGD's own.

    It may be wrapped by PyTorch's profiler hook, and on an instance by a learning-rate scheduler's
    note that step was called. Nothing else is looked through.
    """
    if hasattr(step, "_wrapped_by_lr_sched"):
        step = step.__wrapped__
    if getattr(step, "__code__", None) is _HOOK_CODE:
        step = step.__wrapped__
    return any(step is known for known in _KNOWN_STEPS)
