# SPDX-License-Identifier: MIT
"""The mathematics of the fused step, as readable PyTorch.

Every formula of the compiled code is here once more, in the order it is written on paper. Slow and
plain on purpose: this is what to read, and what to test against in float64.

Extents: B rows, I inputs, O outputs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class LinearMSE(NamedTuple):
    """Loss of a linear layer, and its gradients."""

    loss: Tensor  # []
    dx: Tensor  # [..., I]
    dW: Tensor  # [O, I]
    db: Tensor | None  # [O], None where the layer has no bias


class SGDUpdate(NamedTuple):
    """What one update leaves behind."""

    param: Tensor  # shape of the parameter
    buf: Tensor | None  # same shape; None as long as momentum has never been used


class LinearMSESGD(NamedTuple):
    """What one training step of a linear layer leaves behind."""

    loss: Tensor  # [], before the update
    W: SGDUpdate  # [O, I]
    b: SGDUpdate | None  # [O], None where the layer has no bias


def linear_mse(
    x: Tensor, W: Tensor, b: Tensor | None, t: Tensor, reduction: str = "mean"
) -> LinearMSE:
    """Mean (or summed) squared error of ``x @ W.T + b`` against `t`, with its gradients.

    Args:
        x: [..., I] input; leading dimensions are rows, B of them in all.
        W: [O, I] weight.
        b: [O] bias, or None.
        t: [..., O] target, the shape of the output exactly.
        reduction: "mean" or "sum", over all B·O squared residuals.

    Returns:
        The loss and dL/dx, dL/dW, dL/db, in the dtype of the arguments. With no rows the mean is
        NaN, as in PyTorch, and the gradients are zeros.

    Raises:
        ValueError: `reduction` is neither, or `t` has not the shape of the output.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"linear_mse: reduction must be 'mean' or 'sum', got {reduction!r}")
    O, I = W.shape
    y = x @ W.T if b is None else x @ W.T + b
    if t.shape != y.shape:
        raise ValueError(
            f"linear_mse: t must have the shape of the output {list(y.shape)}, got {list(t.shape)}"
        )
    x_rows = x.reshape(math.prod(x.shape[:-1]), I)  # [B, I]
    r = (y - t).reshape(math.prod(y.shape[:-1]), O)  # [B, O]

    if reduction == "sum":
        s_l = 1.0
    elif r.numel() > 0:
        s_l = 1.0 / r.numel()
    else:
        s_l = math.nan  # the mean of nothing; the sums below are over nothing and stay zero
    s = 2.0 * s_l if r.numel() > 0 else 0.0

    return LinearMSE(
        loss=s_l * r.square().sum(),
        dx=(s * (r @ W)).reshape(x.shape),
        dW=s * (r.T @ x_rows),
        db=None if b is None else s * r.sum(dim=0),
    )


def sgd_update(
    param: Tensor,
    grad: Tensor,
    buf: Tensor | None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> SGDUpdate:
    """One update by the rule of ``torch.optim.SGD``; nothing is changed in place.

    Args:
        param: parameter, of any shape.
        grad: dL/dparam, the shape of `param`.
        buf: momentum buffer, the shape of `param`, or None before its first use.
        lr: learning rate, a float or a 0-dim tensor.
        momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.

    Returns:
        The new parameter and the new buffer. Without momentum `buf` comes back as it was.
    """
    g = -grad if maximize else grad
    g = g + weight_decay * param
    if momentum != 0:
        # The first gradient enters the buffer whole, whatever the dampening.
        buf = g if buf is None else momentum * buf + (1 - dampening) * g
        g = g + momentum * buf if nesterov else buf
    return SGDUpdate(param - lr * g, buf)


def linear_mse_sgd(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    t: Tensor,
    W_buf: Tensor | None = None,
    b_buf: Tensor | None = None,
    *,
    reduction: str = "mean",
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> LinearMSESGD:
    """One whole training step: :func:`linear_mse`, then :func:`sgd_update` of `W` and `b`.

    Args:
        x, W, b, t, reduction: as in :func:`linear_mse`.
        W_buf, b_buf: momentum buffers, [O, I] and [O], or None before their first use.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in :func:`sgd_update`.

    Returns:
        The loss before the update, and the new weight and bias with their buffers.
    """
    step = linear_mse(x, W, b, t, reduction)

    def update(param: Tensor, grad: Tensor, buf: Tensor | None) -> SGDUpdate:
        return sgd_update(
            param,
            grad,
            buf,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
        )

    return LinearMSESGD(
        loss=step.loss,
        W=update(W, step.dW, W_buf),
        b=None if b is None or step.db is None else update(b, step.db, b_buf),
    )
