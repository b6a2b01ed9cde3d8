# SPDX-License-Identifier: MIT
"""Runs benchmarks one after the other.

Usage: python benchmarks/run.py [NAME|all] [--quick] [--out DIR] ...
NAME: cpu, cold, loss, head, optim, sweep, gpu or gpu_optim

Everything after the name goes to the script bench_NAME.py; `cold` is bench_cpu.py --cold. `all` is
all that this machine can run: `gpu` and `gpu_optim` only where torch finds a GPU. Ctrl-C ends the
current one, which keeps what is done, and leaves out the rest.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
# The script of each, and what it is given first.
SCRIPTS = {
    "cpu": ("bench_cpu.py",),
    "cold": ("bench_cpu.py", "--cold"),
    "loss": ("bench_loss.py",),
    "head": ("bench_head.py",),
    "optim": ("bench_optim.py",),
    "sweep": ("bench_sweep.py",),
    "gpu": ("bench_gpu.py",),
    "gpu_optim": ("bench_gpu_optim.py",),
    "gpu_plans": ("bench_gpu_plans.py",),
}


def available() -> list[str]:
    """The benchmarks that this machine can run."""
    import torch

    on_gpu = torch.cuda.is_available()
    return [name for name in SCRIPTS if on_gpu or not name.startswith("gpu")]


def main() -> int:
    name, *options = sys.argv[1:] or ["all"]
    if name.startswith("-"):
        name, options = "all", [name, *options]
    if name not in (*SCRIPTS, "all"):
        print(f"run.py: expected one of {', '.join((*SCRIPTS, 'all'))}, got {name!r}")
        return 2
    began = time.monotonic()
    for chosen in available() if name == "all" else [name]:
        script, *first = SCRIPTS[chosen]
        print(f"== {script} {' '.join([*first, *options])}", flush=True)
        try:
            command = [sys.executable, str(BENCHMARKS / script), *first, *options]
            status = subprocess.run(command).returncode
        except KeyboardInterrupt:
            status = 130
        if status:
            return status
    print(f"== {time.monotonic() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
