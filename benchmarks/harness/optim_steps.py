# SPDX-License-Identifier: MIT
"""Optimizers as contestants, and the floor of an update."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch

from harness.contestant import Contestant, Unavailable, collector_off
from harness.floors import load_extension
from harness.optim_case import OptimData


class OptimStep(Contestant):
    """`optimizer.step()` with gradients that are there; where the case wants new ones, they are put
    in place of the last ones outside of the time."""

    def __init__(self, key: str, label: str, make: Callable[..., Any], note: str = "", **options):
        super().__init__(key, label, note)
        self.ours = make.__module__.startswith("fused_step")
        self._make, self._options = make, options

    def prepare(self, data: OptimData) -> None:
        self._params = data.parameters()
        case = data.case
        self._grads = [[p.grad for p in self._params], data.other_grads] if case.new_grads else []
        self._optimizer = self._make(
            self._params, lr=case.learning_rate, momentum=case.momentum, **self._options
        )

    def trajectory(self, steps: int) -> list[torch.Tensor]:
        for _ in range(steps):
            self._optimizer.step()
        return [p.detach() for p in self._params]

    def sample(self, steps: int) -> float:
        step = self._optimizer.step
        if self._grads:
            with collector_off():
                return sum(self._step_with_other_grads(step, k) for k in range(steps))
        with collector_off():
            start = time.perf_counter_ns()
            for _ in repeat(None, steps):
                step()
            stop = time.perf_counter_ns()
        return (stop - start) * 1e-9

    def _step_with_other_grads(self, step: Callable[[], Any], k: int) -> float:
        for parameter, grad in zip(self._params, self._grads[k % 2], strict=True):
            parameter.grad = grad
        start = time.perf_counter_ns()
        step()
        return (time.perf_counter_ns() - start) * 1e-9

    def release(self) -> None:
        self._params = self._optimizer = None
        self._grads = []


class _Floor(Contestant):
    role = "floor"

    def trajectory(self, steps: int) -> None:
        return None

    def prepare(self, data: OptimData) -> None:
        extension = load_extension()
        if isinstance(extension, str):
            raise Unavailable(extension)
        self._call = self.build(extension, data)

    def build(self, extension: Any, data: OptimData) -> Callable[[], Any]:
        raise NotImplementedError

    def sample(self, steps: int) -> float:
        call = self._call
        with collector_off():
            start = time.perf_counter_ns()
            for _ in repeat(None, steps):
                call()
            stop = time.perf_counter_ns()
        return (stop - start) * 1e-9

    def release(self) -> None:
        self._call = None


class TriadFloor(_Floor):
    """p += a * g in place on all threads, over all elements as one tensor."""

    def build(self, extension: Any, data: OptimData) -> Callable[[], Any]:
        p = torch.cat([t.reshape(-1) for t in data.start])
        g = torch.cat([t.reshape(-1) for t in data.grads])
        expected = p + g * 0.5
        extension.triad(p, g, 0.5)
        if not torch.allclose(p, expected):
            raise AssertionError("the triad floor made another sum")
        del expected
        return lambda: extension.triad(p, g, 1e-4)


class CallFloor(_Floor):
    """One pybind11 call with two tensors that returns a new 0-dim tensor."""

    def build(self, extension: Any, data: OptimData) -> Callable[[], Any]:
        x, t = data.start[0], data.grads[0]
        return lambda: extension.call(x, t)
