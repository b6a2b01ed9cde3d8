# SPDX-License-Identifier: MIT
"""Time of a step of SGD on a GPU, against torch.optim.SGD's three implementations and a copy.

Usage: python benchmarks/bench_gpu_optim.py [--quick] [--cases NAME,...] [--rounds N] [--out DIR]
       python benchmarks/bench_gpu_optim.py --rehearse    (small, on the CPU; nothing is written)
"""

from __future__ import annotations

import dataclasses

import torch
from harness import driver, places
from harness.contestant import Contestant
from harness.gpu_optim_steps import CopyFloor, GpuOptimStep, HostSide
from harness.optim_case import OptimCase, resnet50_shapes
from harness.protocol import Protocol

import fused_step

TORCHS = ("forloop", "foreach", "fused")


def _at_least(limit: float) -> tuple[str, ...]:
    return tuple(f"ours >= {limit}x {other}" for other in TORCHS)


def _of_bandwidth(share: float, values: int) -> str:
    """A step that moves `values` numbers an element at `share` of what a copy, of 2, reaches."""
    return f"ours <= {values / 2 / share:.3f}x floor_copy"


# The targets name contestants by key: see contestants() below, and Target in harness/case.py.
CASES = (
    OptimCase(
        "resnet50",
        "ResNet-50, momentum",
        resnet50_shapes(),
        momentum=0.9,
        targets=(_of_bandwidth(0.85, 5), "host <= 40 us"),
        note="161 tensors; a copy moves 2 values an element, a step with momentum 5.",
        device="cuda",
    ),
    OptimCase(
        "1000x64", "1000 tensors of 64", ((64,),) * 1000, targets=_at_least(5), device="cuda"
    ),
    OptimCase(
        "64M",
        "one tensor of 64 M",
        ((64 * 2**20,),),
        targets=(_of_bandwidth(0.9, 3),),
        note="Without momentum a step moves 3 values an element.",
        device="cuda",
    ),
    OptimCase("linear", "Linear(2, 1)", ((1, 2), (1,)), targets=_at_least(4), device="cuda"),
)


def contestants() -> list[Contestant]:
    torchs = torch.optim.SGD
    return [
        GpuOptimStep("forloop", "torch, for-loop", torchs, foreach=False, fused=False),
        GpuOptimStep("foreach", "torch, foreach", torchs, foreach=True),
        GpuOptimStep("fused", "torch, fused", torchs, fused=True),
        GpuOptimStep("ours", "fused_step.SGD", fused_step.SGD),
        GpuOptimStep("ours_again", "fused_step.SGD, again", fused_step.SGD, "A/A"),
        HostSide("host", "fused_step.SGD, the host's part", fused_step.SGD),
        HostSide("host_fused", "torch, fused, the host's part", torchs, fused=True),
        CopyFloor("floor_copy", "floor: a copy"),
    ]


def _rehearsal(case: OptimCase) -> OptimCase:
    """The same of a size that a CPU does in no time."""
    shapes = tuple(tuple(min(n, 40) for n in shape) for shape in case.shapes[:20])
    return dataclasses.replace(case, shapes=shapes, targets=(), device="cpu")


BENCHMARK = driver.Benchmark(
    kind="gpu_optim",
    description=__doc__,
    cases=CASES,
    contestants=contestants,
    subject="ours",
    again="ours_again",
    place=places.Gpu(),
    with_memory=False,  # an update takes none
    full=Protocol(case_seconds=16.0, budget_seconds=80.0),
    quick=Protocol(rounds=8, case_seconds=4.0, budget_seconds=30.0),
    rehearsed=_rehearsal,
)

if __name__ == "__main__":
    driver.run(BENCHMARK)
