# SPDX-License-Identifier: MIT
"""Peak memory of a contestant's step beyond its data and parameters, in a process of its own.

- `aten_bytes`: the peak of ATen's CPU allocator during a step, from torch.profiler's allocation
  events. Exact to the byte, but blind to a plain malloc, and to all that is not torch.
- `resident_bytes`: growth of the resident set's high-water mark over the first steps, from
  /proc/self. Sees every page that is touched, also of what is kept for later, to within about
  0.3 MiB.

For the second to be sound, the process asks malloc to take every block of 64 KiB or more fresh from
the system and to give it back at once, has no huge pages, and before the baseline is taken lets
the libraries allocate what they keep: steps of a tiny case, compilation, and the two bare products
of this case.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Pages of code touched for the first time, and the kernel's counting of pages in batches per CPU:
# allocations of 1, 2, 6 and 20 MiB were seen as 0.7, 1.8, 5.7 and 19.7.
RESIDENT_SLACK = 1 << 20
# The loss and other 0-dim tensors, rounded up to malloc's 64-byte blocks, and per-thread sums.
ATEN_SLACK = 4096

_STEPS = 3
_PR_SET_THP_DISABLE = 41
# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


def used(contestant: Any, case: Any, seed: int) -> dict[str, int | None]:
    """Measures `contestant` in this process, which is good for nothing else afterwards."""
    _give_back_at_once()
    contestant.prepare(case.tiny.make_data(seed))
    contestant.ready(_STEPS)
    contestant.sample(_STEPS)
    contestant.release()

    data = case.make_data(seed)
    contestant.touch_libraries(data)
    contestant.prepare(data)
    del data
    contestant.ready(_STEPS)
    gc.collect()
    resident = _resident_growth(lambda: contestant.sample(_STEPS))
    aten = _aten_peak(lambda: contestant.sample(1)) if contestant.of_torch else None
    return {"aten_bytes": aten, "resident_bytes": resident}


def judge_step(case: Any, entries: Mapping[str, Any]) -> dict:
    """Holds `step` to its limit: B*O floats, or for one-pass up to 1/8 of x's bytes."""
    plan = entries["step"].facts["plan"]
    limit = case.output_bytes
    if plan == "one-pass":
        limit = max(limit, case.input_bytes // 8)
    return _judge(case, plan, limit, entries["step"].memory)


def judge_loss(case: Any, entries: Mapping[str, Any]) -> dict:
    """Holds `loss` to the larger of those, its gradients, and the sums of 64 chunks of rows."""
    if case.dtype != "float32":
        return {"error": "the limit is one of float32"}
    sums = 64 * 8 * (case.outputs + 1)
    gradients = case.weight_bytes + case.element_bytes * case.outputs
    if case.input_grad:
        gradients += case.input_bytes
    limit = max(case.output_bytes, case.input_bytes // 8) + gradients + sums
    return _judge(case, "loss", limit, entries["loss"].memory)


def _judge(case: Any, plan: str, limit: int, measured: dict) -> dict:
    if "error" in measured:
        return measured
    reached = measured["aten_bytes"] <= limit + ATEN_SLACK
    if measured["resident_bytes"] is not None:
        reached = reached and measured["resident_bytes"] <= limit + RESIDENT_SLACK
    return {
        "plan": plan,
        **measured,
        "output_bytes": case.output_bytes,
        "limit_bytes": limit,
        "reached": reached,
    }


def _give_back_at_once() -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    if not hasattr(libc, "mallopt"):
        return
    for parameter, value in (
        (_M_MMAP_THRESHOLD, 65536),
        (_M_TRIM_THRESHOLD, 65536),
        (_M_TOP_PAD, 0),
        (_M_ARENA_MAX, 1),
    ):
        libc.mallopt(parameter, value)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # what was freed before


def _status_bytes(field: str) -> int | None:
    try:
        match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        return None
    return int(match.group(1)) * 1024 if match else None


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_growth(call: Callable[[], Any]) -> int | None:
    if not _reset_high_water_mark():
        return None
    before = _status_bytes("VmRSS")
    call()
    peak = _status_bytes("VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The profiler says on standard error that it starts, ends, and what it has not seen begin."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _aten_peak(call: Callable[[], Any]) -> int:
    """The most that ATen's CPU allocator held at once beyond what it held when `call` began."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    profiled = torch.profiler.profile(activities=activities, profile_memory=True)
    with _silent(), profiled as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        peak = max(peak, held)
    return peak
