# SPDX-License-Identifier: MIT
"""Peak memory of one step beyond its inputs, measured in a child process, in two ways.

- `aten_bytes`: the peak of ATen's CPU allocator during a step, from torch.profiler's allocation
  events. Exact to the byte, but blind to a plain malloc.
- `resident_bytes`: growth of the resident set's high-water mark over the first steps, from
  /proc/self. Sees every page that is touched, also of what is kept for later, to within about
  0.3 MiB.

For the second to be sound, the child asks malloc to take every block of 64 KiB or more fresh from
the system and to give it back at once, has no huge pages, and before the baseline is taken lets
the libraries allocate what they keep: a step of a tiny case, and the two bare GEMMs of this one.

What is measured is one step of TrainStep, or one call of linear_mse_loss with its backward pass.

Usage: python -m harness.memory B I O THREADS {step,loss}
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from harness.case import Case, Data
from harness.remote import child_environment

# Pages of code touched for the first time, and the kernel's counting of pages in batches per CPU:
# allocations of 1, 2, 6 and 20 MiB were seen as 0.7, 1.8, 5.7 and 19.7.
RESIDENT_SLACK = 1 << 20
# The loss and other 0-dim tensors, rounded up to malloc's 64-byte blocks, and per-thread sums.
ATEN_SLACK = 4096

_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}
_PR_SET_THP_DISABLE = 41


def measure(case: Case, threads: int, of: str = "step") -> dict:
    """Runs the child for `case`; {"error": reason} if it cannot measure."""
    if case.dtype != "float32":
        return {"error": "memory is measured in float32"}
    arguments = [str(n) for n in (case.batch, case.inputs, case.outputs, threads, of)]
    done = subprocess.run(
        [sys.executable, "-m", "harness.memory", *arguments],
        capture_output=True,
        text=True,
        env=child_environment(threads, **_MALLOC),
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit {done.returncode}"}
    return judge(case, json.loads(done.stdout.splitlines()[-1]))


def judge(case: Case, measured: dict) -> dict:
    """Adds the limit: B*O floats, or for one-pass up to 1/8 of x's bytes in partial sums.

    The loss has its gradients on top, once as the forward pass makes them and once as they are
    left; it names no plan, and is allowed the larger of the two.
    """
    limit = case.output_bytes
    if measured["plan"] in ("one-pass", "loss"):
        limit = max(limit, case.input_bytes // 8)
    if measured["plan"] == "loss":
        limit += 2 * (case.weight_bytes + 4 * case.outputs)
    reached = measured["aten_bytes"] <= limit + ATEN_SLACK
    if measured["resident_bytes"] is not None:
        reached = reached and measured["resident_bytes"] <= limit + RESIDENT_SLACK
    return {**measured, "output_bytes": case.output_bytes, "limit_bytes": limit, "reached": reached}


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


def _resident_growth(call) -> int | None:
    if not _reset_high_water_mark():
        return None
    before = _status_bytes("VmRSS")
    call()
    peak = _status_bytes("VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


def _aten_peak(call) -> int:
    """The most that ATen's CPU allocator held at once beyond what it held when `call` began."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
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


def _main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    import torch

    from harness.floors import GemmFloor
    from harness.fused_steps import make_train_step
    from harness.loss_steps import fused_loss, make_step
    from harness.torch_steps import make_linear

    batch, inputs, outputs, threads = (int(text) for text in sys.argv[1:5])
    of_loss = sys.argv[5] == "loss"

    def new_step(data: Data):
        if of_loss:
            return make_step(make_linear(data), fused_loss)
        return make_train_step(data)[1]

    torch.set_num_threads(threads)

    tiny = Data(Case(64, 16, 1))
    tiny_step = new_step(tiny)
    for _ in range(3):
        tiny_step(*tiny.tensors)

    data = Data(Case(batch, inputs, outputs))
    x, target = data.tensors
    with torch.no_grad():
        gemms = GemmFloor("", "")
        gemms.prepare(data)
        gemms.sample(2)
        gemms.release()
    step = new_step(data)

    def steps() -> None:
        for _ in range(3):
            step(x, target)

    resident = _resident_growth(steps)
    aten = _aten_peak(lambda: step(x, target))
    plan = "loss" if of_loss else str(step.plan)
    print(json.dumps({"plan": plan, "aten_bytes": aten, "resident_bytes": resident}))


if __name__ == "__main__":
    _main()
