# SPDX-License-Identifier: MIT
"""Door 2 as a Python ``torch.autograd.Function``: what ``torch.func`` differentiates.

Outside of ``torch.func`` the operator ``fused_step::linear_mse_loss`` has the same derivative in
C++, since a Function in Python takes longer than a small layer does.

The gradients are made in the forward pass, as they are for dL/dloss = 1; the backward pass
multiplies them by dL/dloss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_step import _extension  # noqa: F401  registers the operator

_OP = torch.ops.fused_step.linear_mse.default


class LinearMSEFunction(torch.autograd.Function):
    """Loss of a linear layer, with its gradients made in the forward pass.

    ``apply(input, weight, bias, target, reduction, need_dinput, need_dweight, need_dbias,
    need_dy)`` returns the loss and what was asked for, not differentiable:

    Shapes: input [..., I], weight [O, I], bias [O] or None, target [..., O]; loss [], or [..., O]
    for the reduction "none"; with dy = 2 · s_l · (y - target), dy·W [..., I], dyᵀ·input [O, I], the
    sum of dy's rows [O] and dy [..., O]; [0] what was not asked for. dy is needed for a gradient of
    the target, and for every gradient under "none".

    Works under ``torch.func``'s ``grad``, ``vjp`` and ``jacrev``. There is no rule for ``vmap``,
    and PyTorch says so; :func:`fused_step.linear_mse_loss` is composed of PyTorch's operators
    there.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = _OP(*args)
        return made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *operands, reduction, _, _, _, _ = inputs
        _, *stash = output
        ctx.mark_non_differentiable(*stash)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, *stash)
        ctx.reduction = reduction

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        needs = tuple(ctx.needs_input_grad[:4])
        made = iter(
            _Gradients.apply(  # type: ignore[no-untyped-call]  # torch's, without annotations
                grad, *ctx.saved_tensors, ctx.reduction, needs
            )
        )
        return (*(next(made) if needed else None for needed in needs), *(None,) * 5)


class _Gradients(torch.autograd.Function):
    """The needed gradients, from those of the forward pass; their derivative is that of the formula
    they come from. A Function of its own, so that a second derivative is right at every level of
    nested transforms."""

    generate_vmap_rule = True  # for jacrev, which maps the backward pass

    @staticmethod
    def forward(
        grad: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        dinput: Tensor,
        dweight: Tensor,
        dbias: Tensor,
        dy: Tensor,
        reduction: str,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor, ...]:
        if reduction == "none":
            return _chain(dy * grad, input, weight, needs)
        stash = (dinput, dweight, dbias, -dy)
        return tuple(
            g * grad if target.numel() else torch.zeros_like(g)
            for g, needed in zip(stash, needs, strict=True)
            if needed
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.reduction, ctx.needs = inputs
        ctx.save_for_backward(*tensors[:5])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        reduction, needs = ctx.reduction, ctx.needs
        grad, input, weight, bias, target = ctx.saved_tensors
        dy_scale = 2.0 / max(1, target.numel()) if reduction == "mean" else 2.0

        def formula(
            grad: Tensor, input: Tensor, weight: Tensor, target: Tensor, *bias: Tensor
        ) -> tuple[Tensor, ...]:
            r = torch.nn.functional.linear(input, weight, *bias) - target
            dy = r * (grad * dy_scale) if target.numel() else r
            return _chain(dy, input, weight, needs)

        given = (grad, input, weight, target, *(() if bias is None else (bias,)))
        # vjp() returns three with has_aux only.
        _, pull_back = torch.func.vjp(formula, *given)  # type: ignore[misc]
        dgrad, dinput, dweight, dtarget, *dbias = pull_back(tuple(grads))
        return (dgrad, dinput, dweight, *(dbias or (None,)), dtarget, *(None,) * 6)


def _chain(dy: Tensor, input: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """The needed ones of the gradients of input, weight, bias and target, from dL/dy [..., O]."""
    O, I = weight.shape
    B = math.prod(dy.shape[:-1])
    rows = dy.reshape(B, O)
    made: tuple[Callable[[], Tensor], ...] = (
        lambda: dy @ weight,
        lambda: rows.T @ input.reshape(B, I),
        lambda: rows.sum(0),
        lambda: -dy,
    )
    return tuple(make() for make, needed in zip(made, needs, strict=True) if needed)
