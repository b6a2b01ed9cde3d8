# SPDX-License-Identifier: MIT
"""Time of a GPU's step by each plan that serves it: where policy.h's borders between them belong.

Usage: python benchmarks/bench_gpu_plans.py [--quick] [--cases NAME,...] [--rounds N] [--out DIR]
       python benchmarks/bench_gpu_plans.py --rehearse    (small, on the CPU; nothing is written)
"""

from __future__ import annotations

import dataclasses

from harness import driver, gpu_floors, gpu_steps, places
from harness.contestant import Contestant
from harness.gpu_case import GpuCase
from harness.protocol import Protocol

PLANS = {"tiny": "tiny", "one_pass": "one-pass", "gemm": "gemm"}  # by the contestant's key
# None may be much faster than the one that is chosen.
_TARGETS = tuple(f"step >= 0.95x {key}" for key in PLANS)


def _cases(dtype: str, *shapes: tuple[int, int, int]) -> tuple[GpuCase, ...]:
    return tuple(GpuCase(*shape, _TARGETS, dtype=dtype, cold=True) for shape in shapes)


# Around the borders: what one block does, few chunks, outputs of either one-pass, short rows.
CASES = (
    *_cases("float32", (512, 16, 1), (2048, 16, 1), (8192, 16, 1)),
    *_cases("float32", (4096, 1024, 4), (65_536, 1024, 2), (65_536, 1024, 4)),
    *_cases("bfloat16", (1_048_576, 64, 8), (1_048_576, 128, 32), (262_144, 512, 3)),
    *_cases("bfloat16", (262_144, 1024, 8), (262_144, 1024, 16), (262_144, 1024, 32)),
    *_cases("bfloat16", (16_384, 1024, 8), (65_536, 4096, 3), (131_072, 2048, 16)),
)


def contestants() -> list[Contestant]:
    return [
        *(gpu_steps.StepOfPlan(key, f"fused_step, {plan}", plan) for key, plan in PLANS.items()),
        gpu_steps.Step("step", "fused_step, as it chooses"),
        gpu_steps.Step("step_again", "fused_step, as it chooses, again", note="A/A"),
        gpu_floors.Copy("floor_copy", "floor: a copy of x"),
        gpu_floors.Gemms("floor_gemm", "floor: two GEMMs"),
    ]


def _rehearsal(case: GpuCase) -> GpuCase:
    """The same of a size that a CPU does in no time."""
    return dataclasses.replace(case, batch=64, inputs=16, targets=(), device="cpu")


BENCHMARK = driver.Benchmark(
    kind="gpu_plans",
    description=__doc__,
    cases=CASES,
    contestants=contestants,
    subject="step",
    again="step_again",
    with_memory=False,
    place=places.Gpu(),
    full=Protocol(budget_seconds=240.0),
    quick=Protocol(rounds=8, case_seconds=3.0, budget_seconds=60.0),
    rehearsed=_rehearsal,
)

if __name__ == "__main__":
    driver.run(BENCHMARK)
