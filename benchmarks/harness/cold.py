# SPDX-License-Identifier: MIT
"""Empties the caches of the processor between steps, for runs with --cold."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

# A buffer of twice the last cache leaves nothing else in it, whatever line it chooses to drop.
_TIMES_LAST_CACHE = 2
_UNKNOWN_CACHE = 32 << 20
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_CPUS = Path("/sys/devices/system/cpu")


def bytes_to_write(cpu: int, used: Iterable[int], system: Path = _CPUS) -> int:
    """What `cpu` has to write if each of the `used` that shares its last cache writes as much."""
    caches = []
    for folder in (system / f"cpu{cpu}" / "cache").glob("index*"):
        size = re.fullmatch(r"(\d+)([KMG]?)", (folder / "size").read_text().strip())
        if size is not None:
            sharing = _members((folder / "shared_cpu_list").read_text())
            caches.append((int(size[1]) * _UNITS[size[2]], sharing))
    size, sharing = max(caches, key=lambda cache: cache[0], default=(_UNKNOWN_CACHE, set(used)))
    return _TIMES_LAST_CACHE * size // max(1, len(sharing.intersection(used)))


def _members(cpu_list: str) -> set[int]:
    """Reads `0-3,8`."""
    ends = [[int(n) for n in part.split("-")] for part in cpu_list.strip().split(",") if part]
    return {cpu for first, *last in ends for cpu in range(first, (last or [first])[0] + 1)}


class Evict:
    """A call writes a buffer of twice the last cache, on all CPUs that this process may use.

    On each of them, because its first caches are its own. The threads are Python's and sleep in
    between: those of a contestant's pool would go on spinning.
    """

    def __init__(self) -> None:
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
        self._work = [(cpu, np.zeros(bytes_to_write(cpu, cpus) // 8)) for cpu in cpus]
        self._pool = ThreadPoolExecutor(len(cpus))
        self._together = threading.Barrier(len(cpus))

    def _write(self, work: tuple[int, np.ndarray]) -> None:
        cpu, buffer = work
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {cpu})  # of this thread alone
        self._together.wait()  # so that no thread does the work of two
        np.add(buffer, 1.0, out=buffer)

    def __call__(self) -> None:
        list(self._pool.map(self._write, self._work))
