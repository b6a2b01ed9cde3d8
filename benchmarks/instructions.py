# SPDX-License-Identifier: MIT
"""Counts the instructions of small steps by callgrind, and holds them against baseline.json.

Usage: python benchmarks/instructions.py [--update]

Small steps are call overhead, and time on a busy machine cannot guard it: the same step takes
1.5 to 3 µs here from one minute to the next, while its instruction count moves by less than 1 %.
One thread, the AVX2 loops (valgrind 3.19 knows no AVX-512). Exit status 1 if a count is more than
5 % above the baseline, which is that of one combination of versions: with others there is nothing
to compare, and the counts are printed alone. `--update` writes them as the new baseline.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
BASELINE = BENCHMARKS / "baseline.json"
ALLOWED = 1.05

Steps = Callable[[int], None]  # does that many steps


def step(B: int, I: int, O: int, momentum: float = 0.0) -> Steps:
    import torch

    import fused_step

    x, target = torch.randn(B, I), torch.randn(B, O)
    model = torch.nn.Linear(I, O)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=momentum)
    train_step = fused_step.TrainStep(model, torch.nn.MSELoss(), optimizer)

    def steps(count: int) -> None:
        for _ in repeat(None, count):
            train_step(x, target)

    return steps


def run(B: int, I: int, O: int) -> Steps:
    import torch

    import fused_step

    x, target = torch.randn(B, I), torch.randn(B, O)
    model = torch.nn.Linear(I, O)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train_step = fused_step.TrainStep(model, torch.nn.MSELoss(), optimizer)
    return lambda count: train_step.run(x, target, epochs=count, batch_size=B)


def loss(B: int, I: int, O: int) -> Steps:
    import torch

    import fused_step

    x, target = torch.randn(B, I), torch.randn(B, O)
    weight, bias = torch.randn(O, I, requires_grad=True), torch.randn(O, requires_grad=True)

    def steps(count: int) -> None:
        for _ in repeat(None, count):
            fused_step.linear_mse_loss(x, weight, target, linear_bias=bias).backward()
            weight.grad = bias.grad = None

    return steps


def sgd(count: int, momentum: float) -> Steps:
    import torch

    import fused_step

    params = [torch.nn.Parameter(torch.randn(64)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn(64)
    optimizer = fused_step.SGD(params, lr=0.01, momentum=momentum)

    def steps(count: int) -> None:
        for _ in repeat(None, count):
            optimizer.step()

    return steps


# Name, what is counted, how many steps are counted.
CASES: tuple[tuple[str, Callable[[], Steps], int], ...] = (
    ("step() 3x2x1", lambda: step(3, 2, 1), 200),
    ("step() 3x2x1, momentum", lambda: step(3, 2, 1, momentum=0.9), 200),
    ("step() 64x13x1", lambda: step(64, 13, 1), 200),
    ("step() 32x16x4", lambda: step(32, 16, 4), 200),
    ("run() 3x2x1", lambda: run(3, 2, 1), 2000),
    ("run() 64x13x1", lambda: run(64, 13, 1), 500),
    ("run() 512x64x1", lambda: run(512, 64, 1), 100),
    ("linear_mse_loss 64x13x1, forward and backward", lambda: loss(64, 13, 1), 100),
    ("SGD, 1 tensor of 64", lambda: sgd(1, 0.0), 200),
    ("SGD, 1000 tensors of 64", lambda: sgd(1000, 0.0), 20),
    ("SGD, 1000 tensors of 64, momentum", lambda: sgd(1000, 0.9), 20),
)


def count_all(library: str) -> None:
    """In the process that callgrind watches: dumps the counts of each case."""
    import torch

    requests = ctypes.CDLL(library)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gc.disable()
    for number, (_, make, count) in enumerate(CASES):
        steps = make()
        steps(50)  # caches of types, attributes and kernels
        requests.count_begin()
        steps(count)
        requests.count_end(str(number).encode())


def count_by_callgrind() -> dict[str, float]:
    """Instructions of one step of each case."""
    with tempfile.TemporaryDirectory() as folder:
        library, out = f"{folder}/requests.so", f"{folder}/callgrind.out"
        source = str(BENCHMARKS / "callgrind.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
        callgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--quiet"]
        child = [sys.executable, __file__, "--count", library]
        # A fixed seed of Python's hashes, and one thread in every pool: spinning is counted, too.
        quiet = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "FUSED_STEP_ISA": "avx2"}
        done = subprocess.run(
            [*callgrind, f"--callgrind-out-file={out}", *child],
            env=os.environ | quiet,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"callgrind ended with status {done.returncode}:\n{done.stderr}")
        counts = {}
        for dump in Path(folder).glob("callgrind.out.*"):
            text = dump.read_text()
            request = re.search(r"^desc: Trigger: Client Request: (\d+)$", text, re.MULTILINE)
            total = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
            if request and total:
                name, _, count = CASES[int(request[1])]
                counts[name] = round(int(total[1]) / count, 1)
    if missing := [name for name, _, _ in CASES if name not in counts]:
        raise SystemExit(f"callgrind counted nothing for: {', '.join(missing)}")
    return {name: counts[name] for name, _, _ in CASES}


def versions() -> dict[str, str]:
    """What a count depends on beside the sources."""

    import torch

    from fused_step import _C

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": _C.compiler,
    }


def compare(counts: dict[str, float], baseline: dict[str, float]) -> bool:
    """Prints a row for each case; whether all are within the allowance."""
    good = True
    for name, count in counts.items():
        before = baseline.get(name)
        if before is None:
            print(f"{name:48} {count:12,.0f}  no baseline yet")
            continue
        fits = count <= ALLOWED * before
        good &= fits
        verdict = "ok" if fits else "MORE THAN 5 % ABOVE"
        print(f"{name:48} {count:12,.0f}  {100 * (count / before - 1):+6.1f} %  {verdict}")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the counts as the baseline")
    parser.add_argument("--count", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.count:
        count_all(arguments.count)
        return 0
    for tool in ("valgrind", "cc"):
        if shutil.which(tool) is None:
            print(f"instruction counts: skipped, {tool} is not installed")
            return 0
    here = versions()
    print("instructions of one step, one thread, AVX2:")
    counts = count_by_callgrind()
    baseline = json.loads(BASELINE.read_text()) if BASELINE.is_file() else None
    if arguments.update or baseline is None or baseline["versions"] != here:
        compare(counts, {})
        if arguments.update:
            BASELINE.write_text(json.dumps({"versions": here, "counts": counts}, indent=2) + "\n")
            print(f"written: {os.path.relpath(BASELINE)}")
        else:
            of = baseline["versions"] if baseline else "nothing"
            print(f"not compared: the baseline is of {of}, here are {here}")
        return 0
    return 0 if compare(counts, baseline["counts"]) else 1


if __name__ == "__main__":
    sys.exit(main())
