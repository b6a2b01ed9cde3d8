# SPDX-License-Identifier: MIT
"""Time of a training step of networks that end in a linear layer, on the CPU, against PyTorch.

Usage: python benchmarks/bench_head.py [--quick] [--cases NAME,...] [--rounds N] [--out DIR]
"""

from __future__ import annotations

import torch
from harness import driver
from harness.contestant import Contestant
from harness.net_case import NetCase
from harness.net_steps import Compiled, FiveLines, Step
from harness.protocol import Protocol

import fused_step

_NOT_SLOWER = ("step >= 1x eager", "step >= 1x eager_fused")

# The targets name contestants by key: see contestants() below, and Target in harness/case.py.
CASES = (
    NetCase("small", "64×13→32→1", 64, (13, 32, 1), targets=_NOT_SLOWER),
    NetCase(
        "own",
        "64×13→32→1, own code",
        64,
        (13, 32, 1),
        own_code=True,
        targets=_NOT_SLOWER,
        note="The same layers in a class of the user's own; the loss is ((y - t) ** 2).mean().",
    ),
    NetCase("deep", "64×13→32→32→32→1", 64, (13, 32, 32, 32, 1), targets=_NOT_SLOWER),
    NetCase("wide", "4096×64→1024→1", 4096, (64, 1024, 1), targets=_NOT_SLOWER),
    NetCase("square", "1024×512→512→512", 1024, (512, 512, 512), targets=_NOT_SLOWER),
    NetCase("large", "16×64→4096→4096", 16, (64, 4096, 4096), targets=_NOT_SLOWER),
    NetCase(
        "frozen",
        "4096×64→1024→1, frozen body",
        4096,
        (64, 1024, 1),
        trains_all=False,
        targets=_NOT_SLOWER,
        note="The last layer alone is trained: its update is in place, no gradient is made.",
    ),
)


def contestants() -> list[Contestant]:
    torchs = torch.optim.SGD
    return [
        FiveLines("eager", "eager", torchs),
        FiveLines("eager_fused", "eager, SGD fused", torchs, fused=True),
        FiveLines("eager_ours", "eager, fused_step.SGD", fused_step.SGD),
        Compiled("compiled", "eager, model and loss compiled", torchs),
        Compiled("compiled_fused", "the same, SGD fused", torchs, fused=True),
        Step("step", "fused_step step()", torchs),
        Step("step_again", "fused_step step(), again", torchs, "A/A"),
    ]


BENCHMARK = driver.Benchmark(
    kind="head",
    description=__doc__,
    cases=CASES,
    contestants=contestants,
    subject="step",
    again="step_again",
    full=Protocol(case_seconds=10.0, budget_seconds=100.0),
)

if __name__ == "__main__":
    driver.run(BENCHMARK)
