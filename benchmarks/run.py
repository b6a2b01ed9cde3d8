# SPDX-License-Identifier: MIT
"""Runs benchmarks one after the other.

Usage: python benchmarks/run.py [cpu|loss|optim|sweep|gpu|gpu_optim|all] [--quick] [--out DIR] ...

Everything after the name goes to the script bench_NAME.py. `all` is all that this machine can run:
`gpu` and `gpu_optim` only where torch finds a GPU. Ctrl-C ends the current one, which keeps what is
done, and leaves out the rest.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
ON_GPU = ("gpu", "gpu_optim")
NAMES = ("cpu", "loss", "optim", "sweep", *ON_GPU)


def available() -> list[str]:
    """The benchmarks that exist and that this machine can run."""
    import torch

    names = [name for name in NAMES if (BENCHMARKS / f"bench_{name}.py").is_file()]
    return [name for name in names if name not in ON_GPU or torch.cuda.is_available()]


def main() -> int:
    name, *options = sys.argv[1:] or ["all"]
    if name.startswith("-"):
        name, options = "all", [name, *options]
    if name not in (*NAMES, "all"):
        print(f"run.py: expected one of {', '.join((*NAMES, 'all'))}, got {name!r}")
        return 2
    for chosen in available() if name == "all" else [name]:
        script = BENCHMARKS / f"bench_{chosen}.py"
        print(f"== {script.name} {' '.join(options)}", flush=True)
        try:
            status = subprocess.run([sys.executable, str(script), *options]).returncode
        except KeyboardInterrupt:
            status = 130
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
