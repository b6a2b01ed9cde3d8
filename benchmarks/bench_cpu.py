# SPDX-License-Identifier: MIT
"""Time of a training step of a linear model on the CPU, against PyTorch, NumPy, and the floors.

Usage: python benchmarks/bench_cpu.py [--quick] [--cold] [--cases NAME,...] [--rounds N] [--out DIR]
"""

from __future__ import annotations

from harness import (
    driver,
    floors,
    fused_steps,
    jax_step,
    memory,
    numpy_step,
    sklearn_step,
    torch_steps,
)
from harness.case import Case
from harness.contestant import Absent, Contestant
from harness.protocol import Protocol

# The targets name contestants by key: see contestants() below, and Target in harness/case.py.
CASES = (
    Case(
        3,
        2,
        1,
        (
            "step >= 100x eager",
            "step >= 5x numpy",
            "step <= 2.5x floor_call",
            "run <= 0.035x floor_call",
            "run >= 1x jax_scan",
        ),
        note="The size of the tutorial's sample.",
    ),
    Case(64, 13, 1, ("step >= 80x eager", "run <= 0.5x floor_call", "run >= 1x jax_scan")),
    Case(512, 64, 1, ("step >= 40x eager", "run <= 2.5x floor_call", "run >= 1x jax_scan")),
    Case(4096, 1024, 1, ("step >= 2.8x eager", "step >= 1.6x hand")),
    Case(65536, 1024, 1, ("step >= 1.6x eager", "step <= 1.12x floor_read")),
    Case(8192, 1024, 16, ("step >= 1.6x eager", "step >= 1.3x hand")),
    Case(4096, 1024, 128, ("step <= 1.05x floor_gemm",)),
    Case(1024, 1024, 1024, ("step <= 1.05x floor_gemm",)),
)


def contestants() -> list[Contestant]:
    return [
        torch_steps.Eager("eager", "eager", note="SGD as it comes: a for-loop"),
        torch_steps.Eager("eager_foreach", "eager, SGD(foreach=True)", foreach=True),
        torch_steps.Eager("eager_fused", "eager, SGD(fused=True)", fused=True),
        torch_steps.HandWritten("hand", "torch by hand", note="no autograd, GEMM into the weight"),
        torch_steps.Compiled("compiled", "torch by hand, compiled", note="torch.compile"),
        numpy_step.NumPyStep("numpy", "NumPy"),
        jax_step.JaxStep("jax", "JAX, jit"),
        jax_step.JaxScan("jax_scan", "JAX, lax.scan", note="many steps a call"),
        sklearn_step.PartialFit(
            "sklearn",
            "scikit-learn partial_fit",
            note="another algorithm: an update after each row, on one thread",
        ),
        Absent("graph", "CUDA graphs", "there are none on a CPU: bench_gpu.py has them"),
        fused_steps.Step("step", "fused_step step()"),
        fused_steps.Step("step_again", "fused_step step(), again", note="A/A"),
        fused_steps.Run("run", "fused_step run()", note="many steps a call"),
        floors.CallFloor("floor_call", "floor: a call"),
        floors.ReadFloor("floor_read", "floor: one read of x"),
        floors.GemmFloor("floor_gemm", "floor: two GEMMs"),
    ]


BENCHMARK = driver.Benchmark(
    kind="cpu",
    description=__doc__,
    cases=CASES,
    contestants=contestants,
    subject="step",
    again="step_again",
    judge_memory=memory.judge_step,
    full=Protocol(case_seconds=16.0, budget_seconds=285.0),
)

if __name__ == "__main__":
    driver.run(BENCHMARK)
