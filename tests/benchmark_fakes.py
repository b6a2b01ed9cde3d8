# SPDX-License-Identifier: MIT
"""Contestants whose times and mistakes are known, for the tests of the benchmarks' harness."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import torch
from harness.case import Case
from harness.contestant import Contestant, Trajectory, Unavailable
from harness.protocol import Protocol
from harness.torch_steps import Eager

CASE = Case(8, 3, 2)
SECOND_CASE = Case(16, 3, 2)
QUICK = Protocol(rounds=6, batch_seconds=1e-6, case_seconds=60.0)


def quiet(what: str, done: int, total: int) -> None:
    """In the place of a display."""


class Timed(Contestant):
    """Computes what the plain loop does; takes the times that it is told, one for each turn."""

    settle_seconds = 0.0

    def __init__(self, key: str, times: list[float], role: str = "contestant"):
        super().__init__(key, key)
        self.role = role
        self._times = times
        self.turns = 0  # timed or not
        self.cold_turns = 0

    def prepare(self, data):
        self._eager = Eager(self.key, self.key, foreach=False, fused=False)
        self._eager.prepare(data)

    def trajectory(self, steps: int):
        return None if self.role == "floor" else self._eager.trajectory(steps)

    def sample(self, steps: int) -> float:
        self.turns += 1
        return self._times[self.turns % len(self._times)] * steps

    def cold_sample(self, steps: int) -> float:
        self.cold_turns += 1
        return 1.0 * steps

    def release(self) -> None:
        self._eager = None


class Wrong(Eager):
    """Forgets the bias once in all its steps: off by 1e-3, as a real mistake may be."""

    settle_seconds = 0.0

    def trajectory(self, steps: int) -> Trajectory:
        found = super().trajectory(steps)
        found.bias[0] += 1e-3
        return found

    def sample(self, steps: int) -> float:
        raise AssertionError("a contestant that is wrong was timed")


class Missing(Contestant):
    def prepare(self, data):
        raise Unavailable("it is not installed here")


class Breaks(Timed):
    """Fails in the middle of its rounds."""

    def sample(self, steps: int) -> float:
        if self.turns > 8:
            raise RuntimeError("its device was lost\nsecond line")
        return super().sample(steps)


class Diverges(Timed):
    def last_loss(self) -> float:
        return float("nan")


class Interrupted(Timed):
    """Ctrl-C comes in its turn."""

    def __init__(self, key: str, after: int):
        super().__init__(key, [1e-3])
        self._after = after

    def sample(self, steps: int) -> float:
        if self.turns > self._after:
            raise KeyboardInterrupt
        return super().sample(steps)


WARM_UP = 3  # samples of a fake that always takes as long; then there are two a round


class Device:
    """Shared by contestants; once one of them has broken it, every use of it raises."""

    def __init__(self):
        self.broken = False

    def use(self) -> None:
        if self.broken:
            raise RuntimeError("unspecified launch failure\nsecond line")

    def lost(self) -> str | None:
        return "the device is silent" if self.broken else None


class OnDevice(Timed):
    """Breaks the device in its method `breaks_in`; a number is that of a sample, from 1."""

    def __init__(self, key: str, device: Device, breaks_in: str | int = ""):
        super().__init__(key, [1e-3])
        self._device, self._breaks_in = device, breaks_in

    def _use(self, where: str | int) -> None:
        if where == self._breaks_in:
            self._device.broken = True
        self._device.use()

    def prepare(self, data):
        super().prepare(data)
        self._use("prepare")

    def sample(self, steps: int) -> float:
        seconds = super().sample(steps)
        self._use(self.turns)
        return seconds

    def last_loss(self) -> float:
        self._use("last_loss")
        return 0.0

    def release(self) -> None:
        self._use("release")


class BreaksUnseen(OnDevice):
    """Breaks it by what it only launches: no call of its own fails."""

    def prepare(self, data):
        super().prepare(data)
        self._device.broken = True


class SaysWhere(Contestant):
    """Tells of the process it runs in."""

    def prepare(self, data):
        self._seed = data.seed

    def trajectory(self, steps: int) -> dict:
        return {
            "pid": os.getpid(),
            "threads": torch.get_num_threads(),
            "seed": self._seed,
            "ignores_interrupts": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
        }

    def sample(self, steps: int) -> float:
        os._exit(7)


class Takes(Contestant):
    """A step that holds so many bytes: of torch's allocator, and of nobody's."""

    def __init__(self, key: str, of_torch: int, of_numpy: int):
        super().__init__(key, key)
        self._of_torch, self._of_numpy = of_torch, of_numpy

    def prepare(self, data):
        np.ones(64 << 20, dtype=np.uint8)  # more than a step takes, and before it

    def sample(self, steps: int) -> float:
        for _ in range(steps):
            torch.ones(self._of_torch, dtype=torch.uint8)
            np.ones(self._of_numpy, dtype=np.uint8)
        return 1e-3 * steps


class SlowInTheSecondCase(Contestant):
    """Gives time to interrupt a run whose first case is done."""

    imports = ()

    def prepare(self, data):
        self._seconds = 60.0 if data.case.name == SECOND_CASE.name else 0.0

    def trajectory(self, steps: int):
        return None

    def sample(self, steps: int) -> float:
        time.sleep(self._seconds)
        return 1e-3 * steps
