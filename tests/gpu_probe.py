# SPDX-License-Identifier: MIT
"""What tests ask of a GPU: to be busy, to say what it did, to object when the host waits."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch

_emulated = sys.modules.get("emulated_gpu")  # tests/emulation/gpu/
IS_EMULATED = _emulated is not None
# About 50 ms on a GPU of 2 GHz: long against the enqueuing of a step.
BUSY_CYCLES = 100_000_000


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Raises where the host would wait for the device."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launches_of(call: Callable[[], object]) -> list[str]:
    """Everything that the device does for a call, by name: kernels, copies, fills."""
    torch.cuda.synchronize()
    if _emulated is not None:
        names: list[str] = _emulated.launches_of(call)
        return names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == on_device]
