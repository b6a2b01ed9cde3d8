# SPDX-License-Identifier: MIT
"""What the protocol asks of a contestant. Imports neither torch nor fused_step."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from itertools import repeat
from typing import Any

import numpy as np

from harness.case import Data


class Unavailable(Exception):
    """The contestant cannot take part here; the message is the reason, shown in the report."""


@dataclasses.dataclass
class Trajectory:
    """What a contestant computed from the initial weights: its losses and its final parameters."""

    losses: np.ndarray  # [steps]
    weight: np.ndarray  # [O, I]
    bias: np.ndarray  # [O]


class Contestant:
    """One way to do the step, or (role `floor`) the least that a part of it can cost."""

    role = "contestant"
    ours = False  # True: held to the stricter tolerance, see oracle.py
    isolated = False  # True: lives in another process, so the protocol lets thread pools settle

    def __init__(self, key: str, label: str, note: str = ""):
        self.key = key
        self.label = label
        self.note = note

    def prepare(self, data: Data) -> None:
        """Takes fresh weights from `data`. May raise Unavailable."""
        raise NotImplementedError

    def trajectory(self, steps: int) -> Trajectory | None:
        """The first `steps` steps; None if there is nothing to compare (a floor)."""
        raise NotImplementedError

    def sample(self, steps: int) -> float:
        """Seconds that `steps` steps take."""
        raise NotImplementedError

    def last_loss(self) -> float | None:
        """The loss of the last step taken; the protocol checks that it is still finite."""
        return None

    def describe(self) -> dict[str, str]:
        """Facts for the report that are known only after a call, such as the plan taken."""
        return {}

    def release(self) -> None:
        """Drops what prepare() made."""


class InProcess(Contestant):
    """A contestant that is a function `step(x, target) -> loss` in this process."""

    def prepare(self, data: Data) -> None:
        self._arguments = self.arguments(data)
        self._call: Callable[[Any, Any], Any] = self.build(data)
        self._loss: Any = None

    def arguments(self, data: Data) -> tuple[Any, Any]:
        """The (x, target) that the step is called with."""
        return data.tensors

    def build(self, data: Data) -> Callable[[Any, Any], Any]:
        raise NotImplementedError

    def parameters(self) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the current (weight, bias)."""
        raise NotImplementedError

    def trajectory(self, steps: int) -> Trajectory | None:
        x, target = self._arguments
        losses = [self._call(x, target).item() for _ in range(steps)]
        return Trajectory(np.array(losses), *self.parameters())

    def sample(self, steps: int) -> float:
        call = self._call
        x, target = self._arguments
        loss = None
        with collector_off():
            start = time.perf_counter_ns()
            for _ in repeat(None, steps):
                loss = call(x, target)
            stop = time.perf_counter_ns()
        self._loss = loss
        return (stop - start) * 1e-9

    def last_loss(self) -> float | None:
        return None if self._loss is None else float(self._loss.item())

    def release(self) -> None:
        self._call = self._arguments = self._loss = None


class collector_off:
    """Keeps Python's garbage collector out of a timed batch, as timeit does."""

    def __enter__(self) -> None:
        self._was_on = gc.isenabled()
        gc.disable()

    def __exit__(self, *exc: object) -> None:
        if self._was_on:
            gc.enable()
