# SPDX-License-Identifier: MIT
"""A plain training loop under torch.optim.SGD, and the same loop under fused_step.SGD.

Run it with ``python examples/plain_loop.py``. A small network is trained on scikit-learn's diabetes
data from the same weights; the optimizer's class is the only line that differs. Every figure it
prints is measured in that run.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diabetes import Data, load_data, r2
from torch import Tensor, nn

import fused_step

HIDDEN = 32
BATCH_SIZE = 64


@dataclass(frozen=True)
class Result:
    """What a training left behind."""

    name: str
    losses: Tensor  # [steps]
    r2: float  # on the validation rows
    seconds_in_step: float


def train(
    name: str,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    model: nn.Module,
    data: Data,
    epochs: int,
) -> Result:
    """Trains in the same order of rows at each call."""
    loss_function = nn.MSELoss()
    optimizer = make_optimizer(model.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    losses, seconds = [], 0.0
    for _ in range(epochs):
        order = torch.randperm(len(data.x), generator=generator)
        for rows in order.split(BATCH_SIZE):
            output = model(data.x[rows])
            loss = loss_function(output, data.t[rows])
            loss.backward()
            start = time.perf_counter()
            optimizer.step()
            seconds += time.perf_counter() - start
            optimizer.zero_grad()
            losses.append(loss.detach())
    with torch.no_grad():
        output = model(data.x_validation)
    return Result(name, torch.stack(losses), r2(output, data.t_validation), seconds)


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Trains both; returns what it prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=50)
    options = parser.parse_args(arguments)
    data = load_data()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(data.x.shape[1], HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
    start = copy.deepcopy(model.state_dict())
    results = []
    for name, make_optimizer in (
        ("torch.optim.SGD", torch.optim.SGD),
        ("fused_step.SGD", fused_step.SGD),
    ):
        model.load_state_dict(start)
        results.append(train(name, make_optimizer, model, data, options.epochs))
    print(f"{'':16}{'first loss':>12}{'last loss':>12}{'R²':>9}{'µs in a step()':>16}")
    for result in results:
        first, final = result.losses[0].item(), result.losses[-1].item()
        microseconds = 1e6 * result.seconds_in_step / len(result.losses)
        print(f"{result.name:16}{first:12.6f}{final:12.6f}{result.r2:9.4f}{microseconds:16.1f}")
    same = torch.equal(results[0].losses, results[1].losses)
    words = "the same bits" if same else "not the same bits"
    print(f"The losses of all {len(results[0].losses)} steps are {words}.")
    return results


if __name__ == "__main__":
    main()
