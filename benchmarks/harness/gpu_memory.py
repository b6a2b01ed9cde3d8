# SPDX-License-Identifier: MIT
"""Peak of a GPU's allocator while a contestant is prepared and takes its first steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

_STEPS = 3


class Allocator(Protocol):
    def held(self) -> int:
        """Bytes that are allocated now."""

    def reset_peak(self) -> None: ...

    def peak(self) -> int:
        """The most that was allocated at once since reset_peak()."""


class TorchAllocator:
    """torch's, on the current GPU."""

    def held(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def used(contestant: Any, case: Any, seed: int, allocator: Allocator | None = None) -> dict:
    """Bytes beyond data and parameters. Preparing belongs to it: what a CUDA graph uses is
    allocated when it is captured, and its replay allocates nothing."""
    if case.device == "cpu" and allocator is None:
        return {"error": "a rehearsal has no GPU's memory"}
    allocator = allocator or TorchAllocator()
    data = case.make_data(seed)
    before = allocator.held()
    allocator.reset_peak()
    try:
        contestant.prepare(data)
        contestant.sample(_STEPS)
        peak = contestant.own_peak()
        if peak is None:
            parameters = case.weight_bytes + case.element_bytes * case.outputs
            peak = allocator.peak() - before - parameters
    finally:
        contestant.release()
    return {"aten_bytes": max(0, peak), "resident_bytes": None}


def judge(case: Any, entries: Mapping[str, Any]) -> dict | None:
    """Where the case says so, `step` does with what `eager` takes less the weight's gradient."""
    if not case.peak_memory:
        return None
    if "eager" not in entries:
        return {"error": "eager, which sets the limit, was not measured"}
    eager, step = entries["eager"].memory, entries["step"].memory
    for measured in (eager, step):
        if measured is None or "error" in measured:
            return measured
    limit = eager["aten_bytes"] - case.weight_bytes
    return {
        "plan": entries["step"].facts["plan"],
        **step,
        "output_bytes": case.output_bytes,
        "limit_bytes": limit,
        "reached": step["aten_bytes"] <= limit,
    }
