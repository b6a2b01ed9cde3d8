# SPDX-License-Identifier: MIT
"""Tells PyTorch's own methods, and ours, from replacements that somebody has put in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import SGD, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

# The first SGD made replaces SGD.step by Optimizer.profile_hook_step(SGD.step).
_STEP = getattr(SGD.step, "__wrapped__", SGD.step) if hasattr(SGD.step, "hooked") else SGD.step
_HOOK_CODE = Optimizer.profile_hook_step(_STEP).__code__
_KNOWN_STEPS = [_STEP]
_ZERO_GRAD = SGD.zero_grad
_INIT_GROUP = getattr(SGD._init_group, "_torchdynamo_orig_callable", SGD._init_group)
# Attributes of an instance that stand in front of the class' or ask for a scaled step.
_REPLACED = ("zero_grad", "_init_group", "grad_scale", "found_inf")


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


def is_stock_init_group(init_group: Any) -> bool:
    """Whether this is SGD's own _init_group, wrapped by torch.compile's machinery or not."""
    return getattr(init_group, "_torchdynamo_orig_callable", init_group) is _INIT_GROUP


def is_stock_sgd(optimizer: Optimizer) -> bool:
    """Whether `optimizer` is a torch.optim.SGD itself whose step() and zero_grad() are PyTorch's.

    Hooks and what a GradScaler leaves on the optimizer are looked at, options and tensors are not.
    """
    own = optimizer.__dict__
    return (
        type(optimizer) is SGD
        and is_stock_sgd_step(SGD.step)
        and SGD.zero_grad is _ZERO_GRAD
        and is_stock_init_group(SGD._init_group)
        and is_stock_sgd_step(own.get("step", _STEP))
        and own.keys().isdisjoint(_REPLACED)
        and optimizer.defaults["differentiable"] is False
        and not has_step_hooks(optimizer)
    )


def has_stock_zero_grad(optimizer: Optimizer) -> bool:
    """Whether zero_grad() of `optimizer` is PyTorch's."""
    return type(optimizer).zero_grad is _ZERO_GRAD and "zero_grad" not in optimizer.__dict__


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether a step of `optimizer` runs hooks, its own or those of all optimizers."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )
