# SPDX-License-Identifier: MIT
"""Contestants made of PyTorch alone: the five lines, and the step written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from harness.case import Data
from harness.contestant import PerCall


def make_linear(data: Data, dtype: torch.dtype | None = None) -> torch.nn.Linear:
    """nn.Linear with the case's initial weights, in the case's dtype or another that holds them."""
    of_case = getattr(torch, data.case.dtype)
    model = torch.nn.Linear(data.case.inputs, data.case.outputs, dtype=dtype or of_case)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(data.weight).to(of_case))
        model.bias.copy_(torch.from_numpy(data.bias).to(of_case))
    return model


def linear_parameters(model: torch.nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    def as_array(t: torch.Tensor) -> np.ndarray:
        t = t.detach()
        return (t.float() if t.element_size() == 2 else t).numpy().copy()

    return as_array(model.weight), as_array(model.bias)


def two_products(data: Data) -> None:
    """The products of a step, for the buffers that a BLAS keeps for them."""
    x, target = data.tensors
    weight = torch.from_numpy(data.weight).to(x.dtype)
    torch.mm(x, weight.T)
    torch.mm(target.T, x)


class TorchStep(PerCall):
    """A step made of torch's operations."""

    def touch_libraries(self, data: Data) -> None:
        two_products(data)


class Eager(TorchStep):
    """The five lines, as every tutorial writes them."""

    def __init__(self, key: str, label: str, note: str = "", **sgd_options: Any):
        super().__init__(key, label, note)
        self._sgd_options = sgd_options

    def build(self, data: Data) -> Callable[[Any, Any], Any]:
        model = self._model = make_linear(data)
        loss_function = torch.nn.MSELoss()
        optimizer = torch.optim.SGD(
            model.parameters(), lr=data.case.learning_rate, **self._sgd_options
        )

        def step(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            output = model(x)
            loss = loss_function(output, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return step

    def parameters(self) -> tuple[np.ndarray, np.ndarray]:
        return linear_parameters(self._model)

    def release(self) -> None:
        super().release()
        self._model = None


class _WithoutAutograd(TorchStep):
    """A step in torch operations on tensors that do not require grad.

    Grad mode is switched off once around a batch of steps, not in every step, as someone who
    writes such a loop would do.
    """

    def build(self, data: Data) -> Callable[[Any, Any], Any]:
        self._weight = torch.from_numpy(data.weight).clone()  # [O, I]
        self._bias = torch.from_numpy(data.bias).clone()  # [O]
        self._alpha = -2.0 * data.case.learning_rate / (data.case.batch * data.case.outputs)
        return self.make_step(data)

    def make_step(self, data: Data) -> Callable[[Any, Any], Any]:
        """`step(x, target)` that changes weight and bias and returns the loss."""
        raise NotImplementedError

    def trajectory(self, steps: int):
        with torch.no_grad():
            return super().trajectory(steps)

    def sample(self, steps: int) -> float:
        with torch.no_grad():
            return super().sample(steps)

    def parameters(self) -> tuple[np.ndarray, np.ndarray]:
        return self._weight.numpy().copy(), self._bias.numpy().copy()

    def release(self) -> None:
        super().release()
        self._weight = self._bias = None


class HandWritten(_WithoutAutograd):
    """With the fewest operations and no memory but the loss's: views and buffer are made once, the
    updates are products into weight and bias."""

    def make_step(self, data: Data) -> Callable[[Any, Any], Any]:
        weight, bias, alpha = self._weight, self._bias, self._alpha
        B, O = data.case.batch, data.case.outputs
        error = torch.empty(B, O)
        weight_t, error_t, flat = weight.t(), error.t(), error.view(-1)
        ones = torch.ones(B)

        def step(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            torch.addmm(bias, x, weight_t, out=error)
            error.sub_(target)
            loss = torch.dot(flat, flat).div_(B * O)
            weight.addmm_(error_t, x, alpha=alpha)
            bias.addmv_(error_t, ones, alpha=alpha)
            return loss

        return step


class Compiled(_WithoutAutograd):
    """By torch.compile's default backend, which fuses what can be and plans its own buffers."""

    imports = ("torch._inductor.compile_fx",)

    def make_step(self, data: Data) -> Callable[[Any, Any], Any]:
        torch.compiler.reset()  # each case is compiled for its own sizes
        weight, bias, alpha = self._weight, self._bias, self._alpha

        def update(
            weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, target: torch.Tensor
        ) -> torch.Tensor:
            error = torch.addmm(bias, x, weight.T) - target
            loss = error.square().mean()
            weight.addmm_(error.T, x, alpha=alpha)
            bias.add_(error.sum(0), alpha=alpha)
            return loss

        compiled = torch.compile(update, fullgraph=True, dynamic=False)
        # On copies: compiling is no part of a step, neither of its time nor of its memory.
        with torch.no_grad():
            compiled(weight.clone(), bias.clone(), *data.tensors)
        return lambda x, target: compiled(weight, bias, x, target)
