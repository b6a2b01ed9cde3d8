# SPDX-License-Identifier: MIT
"""A step of a network as contestants: the five lines by several optimizers, and TrainStep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import fused_step
from harness.contestant import PerCall
from harness.net_case import LEARNING_RATE, NetData, NetTrajectory, trained_parameters


class FiveLines(PerCall):
    """The five lines, by an optimizer of the SGD kind."""

    def __init__(
        self, key: str, label: str, make: Callable[..., Any], note: str = "", **options: Any
    ):
        super().__init__(key, label, note)
        self._make, self._options = make, options

    def build(self, data: NetData) -> Callable[[Any, Any], Any]:
        model = self._model = data.model()
        optimizer = self._make(trained_parameters(model), lr=LEARNING_RATE, **self._options)
        return self.step_of(model, data.case.loss_function, optimizer)

    def step_of(self, model: nn.Module, loss_function: Any, optimizer: Any) -> Any:
        """`step(x, target)` that returns the loss."""
        loss_of = self.loss_of(model, loss_function)

        def step(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            loss = loss_of(x, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return step

    def loss_of(self, model: nn.Module, loss_function: Any) -> Any:
        return lambda x, target: loss_function(model(x), target)

    def trajectory(self, steps: int) -> NetTrajectory:
        x, target = self._arguments
        losses = [self._call(x, target).item() for _ in range(steps)]
        return NetTrajectory(np.array(losses), [p.detach() for p in self._model.parameters()])

    def release(self) -> None:
        super().release()
        self._model = None


class Compiled(FiveLines):
    """The five lines, model and loss by torch.compile's default backend."""

    imports = ("torch._inductor.compile_fx",)

    def loss_of(self, model: nn.Module, loss_function: Any) -> Any:
        torch._dynamo.reset()
        compiled = torch.compile(super().loss_of(model, loss_function), dynamic=False)
        compiled(*self._arguments).backward()  # compiling is no part of a step
        model.zero_grad()
        return compiled


class Step(FiveLines):
    """`loss = step(input, target)`."""

    ours = True
    imports = ("torch._dynamo", "fused_step")

    def step_of(self, model: nn.Module, loss_function: Any, optimizer: Any) -> Any:
        self._step = fused_step.TrainStep(model, loss_function, optimizer)
        return self._step

    def describe(self) -> dict[str, str]:
        return {"plan": str(self._step.plan)}
