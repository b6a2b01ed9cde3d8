# SPDX-License-Identifier: MIT
"""How the time of a step grows with the rows, the inputs, the outputs, and with the steps of a run.

Usage: python benchmarks/bench_sweep.py [--quick] [--cases NAME,...] [--rounds N] [--out DIR]
"""

from __future__ import annotations

from harness import driver, floors, fused_steps, torch_steps
from harness.case import Case
from harness.contestant import Contestant
from harness.protocol import Protocol

# The note says which curve a case belongs to: harness/curves.py draws one panel for each.
ROWS = tuple(Case(4**k, 64, 1, note="rows") for k in range(9))
INPUTS = tuple(Case(4096, 4**k, 1, note="inputs") for k in range(1, 7))
OUTPUTS = tuple(Case(2048, 512, 4**k, note="outputs") for k in range(6))
RUNS = (1, 10, 100, 1000)  # steps in one call of run()


def contestants() -> list[Contestant]:
    return [
        torch_steps.Eager("eager", "eager"),
        torch_steps.HandWritten("hand", "torch by hand"),
        fused_steps.Step("step", "fused_step step()"),
        fused_steps.Step("step_again", "fused_step step(), again", note="A/A"),
        *(fused_steps.RunOf(f"run_{n}", f"fused_step run(), {n} steps a call", n) for n in RUNS),
        floors.CallFloor("floor_call", "floor: a call"),
        floors.ReadFloor("floor_read", "floor: one read of x"),
        floors.GemmFloor("floor_gemm", "floor: two GEMMs"),
    ]


BENCHMARK = driver.Benchmark(
    kind="sweep",
    description=__doc__,
    cases=ROWS + INPUTS + OUTPUTS,
    contestants=contestants,
    subject="step",
    again="step_again",
    with_memory=False,
    full=Protocol(rounds=12, case_seconds=6.0, budget_seconds=130.0),
)

if __name__ == "__main__":
    driver.run(BENCHMARK)
