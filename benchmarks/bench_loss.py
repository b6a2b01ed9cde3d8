# SPDX-License-Identifier: MIT
"""Time of the loss and the gradients of a linear layer on the CPU, against PyTorch.

Usage: python benchmarks/bench_loss.py [--quick] [--cases NAME,...] [--rounds N] [--out DIR]
"""

from __future__ import annotations

from harness import driver, floors, memory
from harness.case import Case
from harness.contestant import Contestant
from harness.loss_steps import Compiled, LossAndGradients, fused_loss, torch_loss
from harness.protocol import Protocol

# The targets name contestants by key: see contestants() below, and Target in harness/case.py.
CASES = tuple(
    Case(*sizes, (f"loss >= {limit}x eager", f"loss >= {limit}x compiled"))
    for sizes, limit in (
        ((64, 13, 1), 1.5),
        ((4096, 1024, 1), 2),
        ((65536, 256, 1), 1.6),
        ((8192, 1024, 16), 1.4),
        ((1024, 1024, 1024), 1.0),
    )
)
CASES += tuple(
    Case(*sizes, (f"loss >= {limit}x eager",), dtype="bfloat16")
    for sizes, limit in (((4096, 1024, 1), 2), ((1024, 1024, 256), 1.5))
)
# Behind a body that is trained: dx is written, too, half of the bytes where x is read once.
CASES += tuple(
    Case(*sizes, ("loss >= 1x eager", "loss >= 1x compiled"), input_grad=True)
    for sizes in ((64, 32, 1), (4096, 1024, 1), (8192, 1024, 16), (1024, 1024, 1024))
)


def contestants() -> list[Contestant]:
    return [
        LossAndGradients("eager", "F.mse_loss(F.linear)", torch_loss),
        Compiled("compiled", "F.mse_loss(F.linear), compiled", torch_loss),
        LossAndGradients("loss", "linear_mse_loss", fused_loss, ours=True),
        LossAndGradients("loss_again", "linear_mse_loss, again", fused_loss, "A/A", ours=True),
        Compiled("loss_compiled", "linear_mse_loss, compiled", fused_loss),
        floors.CallFloor("floor_call", "floor: a call"),
        floors.ReadFloor("floor_read", "floor: one read of x"),
        floors.GemmFloor("floor_gemm", "floor: two GEMMs"),
    ]


BENCHMARK = driver.Benchmark(
    kind="loss",
    description=__doc__,
    cases=CASES,
    contestants=contestants,
    subject="loss",
    again="loss_again",
    judge_memory=memory.judge_loss,
    full=Protocol(case_seconds=12.0, budget_seconds=155.0),
)

if __name__ == "__main__":
    driver.run(BENCHMARK)
