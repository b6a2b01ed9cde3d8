# SPDX-License-Identifier: MIT
"""Time of a step of SGD on the CPU, against torch.optim.SGD's three implementations.

Usage: python benchmarks/bench_optim.py [--quick] [--cases NAME,...] [--rounds N] [--out DIR]
"""

from __future__ import annotations

import torch
from harness import driver
from harness.contestant import Contestant
from harness.optim_case import OptimCase, resnet50_shapes
from harness.optim_steps import CallFloor, OptimStep, TriadFloor
from harness.protocol import Protocol

import fused_step

TORCHS = ("forloop", "foreach", "fused")


def _at_least(limit: float, *others: str) -> tuple[str, ...]:
    return tuple(f"ours >= {limit}x {other}" for other in others)


# The targets name contestants by key: see contestants() below, and Target in harness/case.py.
CASES = (
    OptimCase(
        "resnet50",
        "ResNet-50, momentum",
        resnet50_shapes(),
        momentum=0.9,
        targets=(*_at_least(0.97, "fused"), *_at_least(1.5, "forloop", "foreach")),
        note="161 tensors; the triad moves 3 values an element, a step with momentum 5.",
    ),
    OptimCase("1000x64", "1000 tensors of 64", ((64,),) * 1000, targets=_at_least(40, *TORCHS)),
    OptimCase(
        "1000x64-new",
        "1000 tensors of 64, new gradients",
        ((64,),) * 1000,
        new_grads=True,
        targets=_at_least(40, *TORCHS),
        note="At each step other gradients than at the last, as after zero_grad() and backward().",
    ),
    OptimCase(
        "64M",
        "one tensor of 64 M",
        ((64 * 2**20,),),
        # 90 % of the triad's bandwidth.
        targets=(*_at_least(0.97, "fused"), "ours <= 1.111x floor_triad"),
    ),
    OptimCase("linear", "Linear(2, 1)", ((1, 2), (1,)), targets=_at_least(8, *TORCHS)),
)


def contestants() -> list[Contestant]:
    torchs = torch.optim.SGD
    return [
        OptimStep("forloop", "torch, for-loop", torchs, foreach=False, fused=False),
        OptimStep("foreach", "torch, foreach", torchs, foreach=True),
        OptimStep("fused", "torch, fused", torchs, fused=True),
        OptimStep("ours", "fused_step.SGD", fused_step.SGD),
        OptimStep("ours_again", "fused_step.SGD, again", fused_step.SGD, "A/A"),
        CallFloor("floor_call", "floor: a call"),
        TriadFloor("floor_triad", "floor: a triad in place"),
    ]


BENCHMARK = driver.Benchmark(
    kind="optim",
    description=__doc__,
    cases=CASES,
    contestants=contestants,
    subject="ours",
    again="ours_again",
    full=Protocol(case_seconds=12.0, budget_seconds=90.0),
)

if __name__ == "__main__":
    driver.run(BENCHMARK)
