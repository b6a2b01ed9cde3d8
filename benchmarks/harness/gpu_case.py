# SPDX-License-Identifier: MIT
"""A case on a GPU: its data, made there, and how a span of its time is measured.

Data that would stay in the L2 cache from one step to the next are there several times over, and the
steps go through the copies in turn: every step reads its rows from memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from harness.case import Case

# The copies together are that many times as large as the L2 cache.
_TIMES_L2 = 4
_MAX_COPIES = 128


@dataclasses.dataclass(frozen=True)
class GpuCase(Case):
    """A case whose data live on `device`."""

    cold: bool = False  # memory-bound: no step may find its rows in L2
    peak_memory: bool = False  # compare the peak memory of a step with that of an eager one
    device: str = "cuda"  # "cpu" for a rehearsal

    def make_data(self, seed: int) -> GpuData:
        return GpuData(self, seed)

    def make_oracle(self, data: GpuData) -> Any:
        from harness.gpu_oracle import GpuOracle

        return GpuOracle(data)

    @property
    def copies(self) -> int:
        if not self.cold or self.device == "cpu":
            return 1
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        return copies_beyond(l2, self.input_bytes)


def copies_beyond(cache_bytes: int, input_bytes: int) -> int:
    """How many copies of the data it takes that none is left in the cache when its turn comes."""
    return min(_MAX_COPIES, max(1, math.ceil(_TIMES_L2 * cache_bytes / input_bytes)))


class GpuData:
    """Random rows and parameters; the same numbers for every contestant."""

    def __init__(self, case: GpuCase, seed: int):
        self.case = case
        self.seed = seed
        self.dtype = getattr(torch, case.dtype)
        generator = torch.Generator(case.device).manual_seed(seed)
        B, I, O, n = case.batch, case.inputs, case.outputs, case.copies

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=self.dtype, device=case.device)

        self.inputs, self.targets = randn(n * B, I), randn(n * B, O)
        # Views of all rows; step k takes batch k modulo their number.
        self.batches = list(zip(self.inputs.split(B), self.targets.split(B), strict=True))
        bound = 1.0 / math.sqrt(I)
        self.weight, self.bias = randn(O, I) * (bound / 2), randn(O) * (bound / 2)

    def model(self, dtype: torch.dtype | None = None) -> torch.nn.Linear:
        """nn.Linear with the case's initial weights."""
        model = torch.nn.Linear(
            self.case.inputs,
            self.case.outputs,
            dtype=dtype or self.dtype,
            device=self.case.device,
        )
        with torch.no_grad():
            model.weight.copy_(self.weight)
            model.bias.copy_(self.bias)
        return model


class Span:
    """Seconds between the begin and the end of a block, on the device's own clock."""

    def __init__(self, device: str, make_event: Callable[[], Any] | None = None):
        self._on_gpu = device != "cpu"
        self._make_event = make_event or functools.partial(torch.cuda.Event, enable_timing=True)
        self.seconds = 0.0

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        if not self._on_gpu:
            start = time.perf_counter()
            yield
            self.seconds = time.perf_counter() - start
            return
        begin, end = self._make_event(), self._make_event()
        begin.record()
        yield
        end.record()
        end.synchronize()
        self.seconds = begin.elapsed_time(end) * 1e-3
