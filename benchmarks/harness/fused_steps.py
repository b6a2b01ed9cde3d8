# SPDX-License-Identifier: MIT
"""fused_step as contestants: one call per step, and many steps per call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from harness.case import Data
from harness.contestant import Contestant, Trajectory, Unavailable, collector_off
from harness.torch_steps import TorchStep, linear_parameters, make_linear, two_products

_MAX_FLOPS_OF_A_CALL = 5e9  # about 0.1 s


def make_train_step(data: Data) -> tuple[torch.nn.Linear, Any]:
    """A model with the case's initial weights, and its TrainStep."""
    try:
        import fused_step
    except ImportError as error:
        raise Unavailable(f"fused_step cannot be imported: {error}") from None
    model = make_linear(data)
    optimizer = torch.optim.SGD(model.parameters(), lr=data.case.learning_rate)
    return model, fused_step.TrainStep(model, torch.nn.MSELoss(), optimizer)


class Step(TorchStep):
    """`loss = step(input, target)`."""

    ours = True
    imports = ("torch._dynamo", "fused_step")

    def build(self, data: Data) -> Callable[[Any, Any], Any]:
        self._model, self._step = make_train_step(data)
        return self._step

    def parameters(self) -> tuple[np.ndarray, np.ndarray]:
        return linear_parameters(self._model)

    def describe(self) -> dict[str, str]:
        return {"plan": str(self._step.plan)}

    def release(self) -> None:
        super().release()
        self._model = self._step = None


class Run(Contestant):
    """`losses = step.run(inputs, targets, epochs=n, batch_size=B)` on B rows: n steps on B rows."""

    ours = True

    def touch_libraries(self, data: Data) -> None:
        two_products(data)

    def prepare(self, data: Data) -> None:
        self._batch = data.case.batch
        self._tensors = data.tensors
        self._model, self._step = make_train_step(data)
        self._losses: Any = None
        if not hasattr(self._step, "run"):
            raise Unavailable("this build of fused_step has no TrainStep.run")

    def trajectory(self, steps: int) -> Trajectory | None:
        x, target = self._tensors
        losses = self._step.run(x, target, epochs=steps, batch_size=self._batch)
        return Trajectory(losses.numpy().copy(), *linear_parameters(self._model))

    def sample(self, steps: int) -> float:
        x, target = self._tensors
        with collector_off():
            start = time.perf_counter_ns()
            losses = self._step.run(x, target, epochs=steps, batch_size=self._batch)
            stop = time.perf_counter_ns()
        self._losses = losses
        return (stop - start) * 1e-9

    def last_loss(self) -> float | None:
        return None if self._losses is None else float(self._losses[-1])

    def describe(self) -> dict[str, str]:
        return {"plan": str(self._step.plan)}

    def release(self) -> None:
        self._model = self._step = self._tensors = self._losses = None


class RunOf(Run):
    """`run` with a fixed number of steps a call, as often as it takes."""

    def __init__(self, key: str, label: str, steps: int):
        super().__init__(key, label)
        self._steps = steps

    def prepare(self, data: Data) -> None:
        case = data.case
        if case.flops * self._steps > _MAX_FLOPS_OF_A_CALL:
            raise Unavailable(f"{self._steps} steps of this size take longer than a sample should")
        super().prepare(data)

    def sample(self, steps: int) -> float:
        calls = -(-steps // self._steps)
        x, target = self._tensors
        with collector_off():
            start = time.perf_counter_ns()
            for _ in range(calls):
                losses = self._step.run(x, target, epochs=self._steps, batch_size=self._batch)
            stop = time.perf_counter_ns()
        self._losses = losses
        return (stop - start) * 1e-9 * steps / (calls * self._steps)
