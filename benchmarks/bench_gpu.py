# SPDX-License-Identifier: MIT
"""Time of a training step of a linear model on a GPU, against PyTorch, JAX, and the floors.

Usage: python benchmarks/bench_gpu.py [--quick] [--cases NAME,...] [--rounds N] [--out DIR]
       python benchmarks/bench_gpu.py --rehearse    (small, on the CPU; nothing is written)
"""

from __future__ import annotations

import dataclasses

from harness import driver, gpu_floors, gpu_memory, gpu_steps, places
from harness.contestant import Absent, Contestant
from harness.gpu_case import GpuCase
from harness.protocol import Protocol

_CAPTURED = ("eager_graph", "compiled", "hand_graph")
_ALL = ("eager", "eager_fused", *_CAPTURED, "hand", "jax")


def _against(limit: float, others: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"step >= {limit:g}x {other}" for other in others)


# The targets name contestants by key: see contestants() below, and Target in harness/case.py.
# A copy moves twice the bytes of x: one read of x at 85 % of its bandwidth takes 1 / (2 * 0.85) of
# its time.
CASES = (
    GpuCase(
        3,
        2,
        1,
        ("step >= 20x eager", "step >= 1.5x hand_graph", "run <= 2 us"),
        note="The size of the tutorial's sample.",
    ),
    GpuCase(4096, 256, 1, ("step >= 8x eager", *_against(1.5, _CAPTURED)), cold=True),
    *(
        GpuCase(
            1_048_576,
            1024,
            1,
            ("step <= 0.588x floor_copy", *_against(1.7, _ALL)),
            dtype=dtype,
            cold=True,
        )
        for dtype in ("float32", "bfloat16")
    ),
    GpuCase(262_144, 4096, 8, _against(1.0, _ALL), dtype="bfloat16", cold=True),
    GpuCase(65_536, 4096, 64, _against(1.0, _ALL), dtype="bfloat16", cold=True),
    GpuCase(
        8192,
        8192,
        8192,
        ("step <= 1.05x floor_gemm", "step >= 1.05x eager"),
        dtype="bfloat16",
        peak_memory=True,
    ),
)


def contestants() -> list[Contestant]:
    return [
        gpu_steps.Eager("eager", "eager", note="foreach, as it comes"),
        gpu_steps.Eager("eager_forloop", "eager, SGD(foreach=False)", foreach=False, fused=False),
        gpu_steps.Eager("eager_fused", "eager, SGD(fused=True)", fused=True),
        gpu_steps.EagerInGraph("eager_graph", "eager in a CUDA graph"),
        gpu_steps.Compiled("compiled", "torch.compile, reduce-overhead"),
        gpu_steps.Hand("hand", "torch by hand", note="no autograd, GEMM into the weight"),
        gpu_steps.HandInGraph("hand_graph", "torch by hand in a CUDA graph"),
        gpu_steps.Jax("jax", "JAX jit, donated parameters", note="timed by the host's clock"),
        gpu_steps.JaxScan("jax_scan", "JAX, lax.scan", note="timed by the host's clock"),
        Absent("numpy", "NumPy", "it has no GPU: bench_cpu.py has it"),
        Absent("sklearn", "scikit-learn partial_fit", "it has no GPU: bench_cpu.py has it"),
        gpu_steps.Step("step", "fused_step step()"),
        gpu_steps.Step("step_again", "fused_step step(), again", note="A/A"),
        gpu_steps.StepInGraph("step_graph", "fused_step step() in a CUDA graph"),
        gpu_steps.Run("run", "fused_step run()", note="many steps a call"),
        gpu_floors.Launch("floor_launch", "floor: a torch operation"),
        gpu_floors.Replay("floor_replay", "floor: a graph of one kernel"),
        gpu_floors.Copy("floor_copy", "floor: a copy of x"),
        gpu_floors.Gemms("floor_gemm", "floor: two GEMMs"),
    ]


def _rehearsal(case: GpuCase) -> GpuCase:
    """The same of a size that a CPU does in no time."""
    return dataclasses.replace(
        case,
        batch=min(case.batch, 128),
        inputs=min(case.inputs, 64),
        outputs=min(case.outputs, 48),
        targets=(),
        device="cpu",
    )


BENCHMARK = driver.Benchmark(
    kind="gpu",
    description=__doc__,
    cases=CASES,
    contestants=contestants,
    subject="step",
    again="step_again",
    judge_memory=gpu_memory.judge,
    place=places.Gpu(),
    full=Protocol(budget_seconds=480.0),
    quick=Protocol(rounds=8, case_seconds=4.0, budget_seconds=120.0),
    rehearsed=_rehearsal,
)

if __name__ == "__main__":
    driver.run(BENCHMARK)
