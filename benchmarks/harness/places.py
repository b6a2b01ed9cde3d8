# SPDX-License-Identifier: MIT
"""Where contestants run: on the CPU each in a process of its own, on a GPU all in this one."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

import torch

from harness import floors, gpu_memory, isolated, machine, tables
from harness.contestant import Contestant
from harness.protocol import failure


class Cpu:
    """Processes of their own, so that every thread pool is there alone."""

    can_be_cold = True  # between any two steps

    def missing(self) -> str | None:
        """Why nothing can be measured here, if so."""
        return None

    def lost(self) -> str | None:
        """Why nothing more can be measured in this process, if so."""
        return None

    def start(self, threads: int, contestants: Sequence[Contestant]) -> str:
        """Builds and starts what they need, once; returns a line for the reader."""
        with_floors = any(contestant.role == "floor" for contestant in contestants)
        said = floors.build() if with_floors else "without the floors"
        imports = [module for contestant in contestants for module in contestant.imports]
        isolated.start_server(threads, dict.fromkeys(imports))
        return said

    def enter(self, contestant: Contestant) -> Contestant:
        return isolated.Isolated(contestant)

    def memory(self, contestant: Any, case: Any, seed: int) -> dict:
        """Bytes of a step beyond its data and parameters."""
        return contestant.memory(case, seed)

    def machine(self) -> dict:
        return machine.machine()

    def versions(self) -> dict[str, str]:
        return machine.versions()


class Gpu:
    """One process: nobody's step here uses a pool of CPU threads, so nobody has to be kept from
    another's, while 15 contexts with 4 GiB of data each would not fit a GPU."""

    can_be_cold = False  # cold are the cases that say so, by turns of several copies: gpu_case.py

    def missing(self) -> str | None:
        return None if torch.cuda.is_available() else "no GPU: torch finds none here"

    def lost(self) -> str | None:
        # A kernel that fails ends the CUDA context: from then on every call raises, this one too.
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return failure(error)
        return None

    def start(self, threads: int, contestants: Sequence[Contestant]) -> str:
        return tables.gpu_words(gpu_facts())

    def enter(self, contestant: Contestant) -> Contestant:
        return contestant

    def memory(self, contestant: Any, case: Any, seed: int) -> dict:
        return gpu_memory.used(contestant, case, seed)

    def machine(self) -> dict:
        return {**machine.machine(), "gpu": gpu_facts()}

    def versions(self) -> dict[str, str]:
        return {**machine.versions(), "cuda": str(torch.version.cuda)}


class Rehearsal(Gpu):
    """The GPU's contestants on the CPU: shows that the harness runs, and nothing else."""

    def missing(self) -> str | None:
        return None

    def lost(self) -> str | None:
        return None

    def start(self, threads: int, contestants: Sequence[Contestant]) -> str:
        return "a rehearsal on the CPU: small cases, nothing below says anything about a GPU"

    def machine(self) -> dict:
        return machine.machine()


def gpu_facts() -> dict:
    """Facts about the current GPU."""
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "l2_mib": round(p.L2_cache_size / 2**20, 1),
        "memory_gib": round(p.total_memory / 2**30, 1),
        "driver": _driver_version(),
    }


def _driver_version() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.splitlines()[0].strip() if answer.strip() else "unknown"
