# SPDX-License-Identifier: MIT
"""A contestant in a process of its own, with its own thread pool, driven over a pipe.

Its batches are timed in its own process; the pipe is outside every measured interval.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness.case import Data
from harness.contestant import Contestant, Trajectory, Unavailable

BENCHMARKS = Path(__file__).resolve().parent.parent

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
)


def child_environment(threads: int, **extra: str) -> dict[str, str]:
    """The environment of a child that imports the harness and uses `threads` threads."""
    path = os.pathsep.join(filter(None, [str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]))
    pinned = {variable: str(threads) for variable in _THREAD_VARIABLES}
    return {**os.environ, **pinned, "PYTHONPATH": path, **extra}


class Remote(Contestant):
    """Forwards everything to `target` ("module:class") in a child process, one per case."""

    isolated = True

    def __init__(self, key: str, label: str, target: str, threads: int, note: str = ""):
        super().__init__(key, label, note)
        self._target = target
        self._threads = threads
        self._process: subprocess.Popen[bytes] | None = None

    def _ask(self, method: str, *arguments: Any) -> Any:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RuntimeError(f"{self.key}: asked for {method} before prepare")
        try:
            pickle.dump((method, arguments), process.stdin)
            process.stdin.flush()
            status, result = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError):
            raise RuntimeError(f"{self.key}: its process ended, exit {process.wait()}") from None
        if status == "unavailable":
            raise Unavailable(result)
        if status != "ok":
            raise RuntimeError(f"{self.key}: {result}")
        return result

    def prepare(self, data: Data) -> None:
        self.release()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.worker", self._target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(self._threads),
        )
        self._ask("prepare", data.case.batch, data.case.inputs, data.case.outputs)

    def trajectory(self, steps: int) -> Trajectory | None:
        return self._ask("trajectory", steps)

    def sample(self, steps: int) -> float:
        return self._ask("sample", steps)

    def last_loss(self) -> float | None:
        return self._ask("last_loss")

    def describe(self) -> dict[str, str]:
        return self._ask("describe")

    def release(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it may have ended already
                process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
