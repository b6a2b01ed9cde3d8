# SPDX-License-Identifier: MIT
"""Loss and gradients of a linear layer as contestants: forward and backward, no optimizer.

The input needs no gradient, as that of a first layer, unless the case says that it does, as behind
a body that is trained; `.grad` is None at every start, as after zero_grad().
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from harness.case import Data
from harness.contestant import Trajectory, Unavailable
from harness.torch_steps import TorchStep, linear_parameters, make_linear

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def torch_loss(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    return F.mse_loss(F.linear(x, weight, bias), target)


def fused_loss(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    try:
        from fused_step import linear_mse_loss
    except ImportError as error:
        raise Unavailable(f"fused_step cannot be imported: {error}") from None
    return linear_mse_loss(x, weight, target, linear_bias=bias)


def make_step(model: torch.nn.Linear, loss_of: Loss) -> Callable[[Any, Any], Any]:
    """`step(x, target)` that leaves fresh gradients in the model, and in x if it requires one, and
    returns the loss."""
    weight, bias = model.weight, model.bias

    def step(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        weight.grad = bias.grad = x.grad = None
        loss = loss_of(x, weight, bias, target)
        loss.backward()
        return loss

    return step


def _check_input_grad(x: torch.Tensor, model: torch.nn.Linear, target: torch.Tensor) -> None:
    """Holds x.grad against the formula in float64: it does not show in the parameters."""
    with torch.no_grad():
        weight, bias = model.weight.double(), model.bias.double()
        dy = (x.double() @ weight.T + bias - target.double()) * (2.0 / target.numel())
        exact = dy @ weight
        scale = (dy.abs() @ weight.abs()).max()
        # y and the products are rounded in the dtype of x.
        allowed = 8 * torch.finfo(x.dtype).eps * scale
        error = (x.grad.double() - exact).abs().max()
    if not error <= allowed:
        raise AssertionError(f"dx: error {error:.3g}, allowed {allowed:.3g}")


class LossAndGradients(TorchStep):
    """Forward and backward. In the check, gradients that were off would lead the weights astray."""

    def __init__(self, key: str, label: str, loss_of: Loss, note: str = "", ours: bool = False):
        super().__init__(key, label, note)
        self._loss_of = loss_of
        self.ours = ours

    def build(self, data: Data) -> Callable[[Any, Any], Any]:
        self._model = make_linear(data)
        self._rate = data.case.learning_rate
        return make_step(self._model, self._loss_of)

    def arguments(self, data: Data) -> tuple[torch.Tensor, torch.Tensor]:
        x, target = data.tensors
        return x.detach().requires_grad_(data.case.input_grad), target

    def trajectory(self, steps: int) -> Trajectory:
        x, target = self._arguments
        losses = []
        for _ in range(steps):
            losses.append(self._call(x, target).item())
            if x.requires_grad:
                _check_input_grad(x, self._model, target)
            with torch.no_grad():
                for p in self._model.parameters():
                    p.sub_(self._rate * p.grad)
        return Trajectory(np.array(losses), *linear_parameters(self._model))

    def release(self) -> None:
        super().release()
        self._model = None


class Compiled(LossAndGradients):
    """The same by torch.compile's default backend."""

    imports = ("torch._inductor.compile_fx",)

    def build(self, data: Data) -> Callable[[Any, Any], Any]:
        torch._dynamo.reset()
        self._model = make_linear(data)
        self._rate = data.case.learning_rate
        compiled = torch.compile(self._loss_of, fullgraph=True, dynamic=False)
        # Another model's gradients: compiling is no part of a step.
        make_step(make_linear(data), compiled)(*self._arguments)
        return make_step(self._model, compiled)
