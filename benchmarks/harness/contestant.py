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


class Unavailable(Exception):
    """The contestant cannot take part here; the message is the reason, shown in the report."""


@dataclasses.dataclass
class Trajectory:
    """What a contestant computed from the initial weights: its losses and its final parameters."""

    losses: np.ndarray  # [steps]
    weight: np.ndarray  # [O, I]
    bias: np.ndarray  # [O]


class Contestant:
    """One way to do the step, or (role `floor`) the least that a part of it can cost.

    Until prepare() it is its arguments alone and can be pickled: isolated.py sends it to a process
    of its own.
    """

    role = "contestant"
    ours = False  # True: held to the stricter tolerance, see oracle.py
    of_torch = True  # its buffers are those of torch's allocator, its threads torch's
    own_process = False
    # What takes long to import, done once for all processes. torch.optim imports the compiler.
    imports: tuple[str, ...] = ("torch._dynamo",)
    # How long its threads may spin after a turn. OpenMP's spin for a few ms after their last
    # region, OpenBLAS's for about 30 ms; meanwhile they would take a core from who is next.
    settle_seconds = 0.010

    def __init__(self, key: str, label: str, note: str = ""):
        self.key = key
        self.label = label
        self.note = note

    def prepare(self, data: Any) -> None:
        """Takes fresh weights from `data`, and compiles. May raise Unavailable."""
        raise NotImplementedError

    def trajectory(self, steps: int) -> Any:
        """The first `steps` steps; None if there is nothing to compare (a floor)."""
        raise NotImplementedError

    def sample(self, steps: int) -> float:
        """Seconds that `steps` steps take."""
        raise NotImplementedError

    def cold_sample(self, steps: int) -> float:
        """The same, each step with empty caches."""
        raise NotImplementedError(f"{self.key}: not in a process whose caches may be emptied")

    def last_loss(self) -> float | None:
        """The loss of the last step taken; the protocol checks that it is still finite."""
        return None

    def describe(self) -> dict[str, str]:
        """Facts for the report that are known only after a call, such as the plan taken."""
        return {}

    def touch_libraries(self, data: Any) -> None:
        """Lets a library allocate what it keeps for products of this size: that is not a step's."""

    def ready(self, steps: int) -> None:
        """Compiles what sample(steps) runs, where that depends on their number."""

    def release(self) -> None:
        """Drops what prepare() made."""


class Absent(Contestant):
    """One that cannot take part in this benchmark: it is listed with the reason."""

    def __init__(self, key: str, label: str, reason: str):
        super().__init__(key, label)
        self._reason = reason

    def prepare(self, data: Any) -> None:
        raise Unavailable(self._reason)


class PerCall(Contestant):
    """A contestant that is a function `step(x, target) -> loss`."""

    def prepare(self, data: Any) -> None:
        self._arguments = self.arguments(data)
        self._call: Callable[[Any, Any], Any] = self.build(data)
        self._loss: Any = None

    def arguments(self, data: Any) -> tuple[Any, Any]:
        """The (x, target) that the step is called with."""
        return data.tensors

    def build(self, data: Any) -> Callable[[Any, Any], Any]:
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
