# SPDX-License-Identifier: MIT
"""Optimizers as contestants on a GPU: on the device's clock, and what the host spends on a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch

from harness.contestant import Contestant, collector_off
from harness.gpu_case import Span
from harness.optim_case import OptimData
from harness.optim_steps import OptimStep

# So many steps wait in the queue at most while the host is timed: it holds 1024 launches, and who
# finds it full waits for the device.
_QUEUED = 16


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


class GpuOptimStep(OptimStep):
    """`optimizer.step()` from one event on the device to another."""

    def prepare(self, data: OptimData) -> None:
        super().prepare(data)
        self._device = data.case.device

    def sample(self, steps: int) -> float:
        step, span = self._optimizer.step, Span(self._device)
        with collector_off(), span.measured():
            for _ in repeat(None, steps):
                step()
        return span.seconds

    def release(self) -> None:
        super().release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class HostSide(GpuOptimStep):
    """The host's time in the same calls; the device catches up in between, unmeasured."""

    def sample(self, steps: int) -> float:
        step, device = self._optimizer.step, self._device
        seconds = 0.0
        with collector_off():
            while steps > 0:
                now = min(steps, _QUEUED)
                _synchronize(device)
                start = time.perf_counter()
                for _ in repeat(None, now):
                    step()
                seconds += time.perf_counter() - start
                steps -= now
            _synchronize(device)
        return seconds


class CopyFloor(Contestant):
    """All parameters, as one tensor, copied on the device: 4 bytes read and 4 written for each."""

    role = "floor"

    def prepare(self, data: OptimData) -> None:
        self._from = torch.cat([t.reshape(-1) for t in data.start])
        self._to = torch.empty_like(self._from)
        self._device = data.case.device

    def trajectory(self, steps: int) -> Any:
        return None

    def sample(self, steps: int) -> float:
        copy: Callable[..., Any] = self._to.copy_
        source, span = self._from, Span(self._device)
        with collector_off(), span.measured():
            for _ in repeat(None, steps):
                copy(source)
        return span.seconds

    def release(self) -> None:
        self._from = self._to = None
