# SPDX-License-Identifier: MIT
"""A contestant in a process of its own, with its own thread pool and its own copy of the data.

The processes are forked from a server that has imported torch and has no threads of it, so that a
fresh one for each case costs no start-up. Samples are timed in the contestant's own process; the
pipe is outside every measured interval.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from harness import BENCHMARKS, cold, memory
from harness.contestant import Contestant, Unavailable

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = ("torch", "harness.isolated", "harness.oracle")
_PATIENCE = 2.0
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
)


def start_server(threads: int, imports: Iterable[str] = ()) -> None:
    """Starts the server whose children use `threads` threads each. Once in a process, at first.

    It imports `imports`, or leaves out what is not installed: a contestant will say so.
    """
    path = os.pathsep.join(filter(None, [str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]))
    pinned = dict.fromkeys(_THREAD_VARIABLES, str(threads))
    # One compiler: a pool of them would outlive the compilation, beside what is timed.
    pinned |= {"PYTHONPATH": path, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    before = dict(os.environ)
    # Ctrl-C is the parent's to handle: the server and its children inherit that they ignore it.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(pinned)
    try:
        _CONTEXT.set_forkserver_preload([*_PRELOADED, *imports])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
        signal.signal(signal.SIGINT, handler)


class Isolated(Contestant):
    """Forwards everything to `contestant` in a process of its own, a new one at each prepare()."""

    own_process = True

    def __init__(self, contestant: Contestant):
        super().__init__(contestant.key, contestant.label, contestant.note)
        self.role, self.ours = contestant.role, contestant.ours
        self.of_torch, self.settle_seconds = contestant.of_torch, contestant.settle_seconds
        self._contestant = contestant
        self._child: _Child | None = None

    def _ask(self, method: str, *arguments: Any) -> Any:
        if self._child is None:
            raise RuntimeError(f"{self.key}: asked for {method} before prepare")
        return self._child.ask(method, *arguments)

    def prepare(self, data: Any) -> None:
        """The child makes its own data, from the same case and seed."""
        self.release()
        self._child = _Child(self._contestant)
        self._ask("prepare", data.case, data.seed)

    def trajectory(self, steps: int) -> Any:
        return self._ask("trajectory", steps)

    def sample(self, steps: int) -> float:
        return self._ask("sample", steps)

    def cold_sample(self, steps: int) -> float:
        return self._ask("cold_sample", steps)

    def last_loss(self) -> float | None:
        return self._ask("last_loss")

    def describe(self) -> dict[str, str]:
        return self._ask("describe")

    def memory(self, case: Any, seed: int) -> dict[str, int | None]:
        """What a step takes beyond its data and parameters (memory.used), in one more process."""
        child = _Child(self._contestant)
        try:
            return child.ask("memory", case, seed)
        finally:
            child.end()

    def release(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


class _Child:
    """The parent's end of one process."""

    def __init__(self, contestant: Contestant):
        self._key = contestant.key
        self._connection, far_end = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(far_end, contestant), daemon=True)
        self._process.start()
        far_end.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        try:
            self._connection.send((method, arguments))
            status, result = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            raise RuntimeError(f"{self._key}: its process ended, exit {code}") from None
        if status == "ok":
            return result
        raised = {"unavailable": Unavailable, "wrong": AssertionError}
        raise raised.get(status, RuntimeError)(result)

    def end(self) -> None:
        self._connection.close()
        self._process.join(_PATIENCE)  # it ends by itself, unless it is amid a long sample
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _serve(connection: Connection, contestant: Contestant) -> None:
    """The child: answers each (method, arguments) until the parent closes the pipe."""
    served = _Served(contestant)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            method, arguments = connection.recv()
            try:
                answer = ("ok", getattr(served, method)(*arguments))
            except Unavailable as reason:
                answer = ("unavailable", str(reason))
            except AssertionError as error:
                answer = ("wrong", str(error))
            except Exception as error:
                answer = ("error", f"{type(error).__name__}: {error}")
            connection.send(answer)


class _Served:
    """A contestant with what it needs of its process."""

    def __init__(self, contestant: Contestant):
        self._contestant = contestant
        self._evict: cold.Evict | None = None

    def __getattr__(self, method: str) -> Any:
        return getattr(self._contestant, method)

    def prepare(self, case: Any, seed: int) -> None:
        # The data are not kept: only what the contestant takes of them.
        self._contestant.prepare(case.make_data(seed))

    def cold_sample(self, steps: int) -> float:
        if self._evict is None:
            self._evict = cold.Evict()
        seconds = 0.0
        for _ in range(steps):
            self._evict()
            seconds += self._contestant.sample(1)
        return seconds

    def describe(self) -> dict[str, str]:
        facts = {"threads": self._threads(), **self._contestant.describe()}
        if hasattr(os, "sched_getaffinity"):
            facts["cpus"] = ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)))
        return facts

    def _threads(self) -> str:
        if not self._contestant.of_torch:
            return os.environ["OMP_NUM_THREADS"]
        import torch

        return str(torch.get_num_threads())

    def memory(self, case: Any, seed: int) -> dict[str, int | None]:
        return memory.used(self._contestant, case, seed)
