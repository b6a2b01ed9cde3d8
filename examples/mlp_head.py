# SPDX-License-Identifier: MIT
"""A small network whose last layer and loss are fused, beside the same network in plain PyTorch.

Run it with ``python examples/mlp_head.py``. All are trained on scikit-learn's diabetes data from
the same weights, with any optimizer (here AdamW). A ``LinearMSELoss`` as the head changes two lines
of the loop; ``TrainStep`` finds the head of the network, a class of one's own, by itself. Every
figure printed is measured in that run.
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


class Network(nn.Module):
    """As anybody would write it: TrainStep reads where its forward() ends."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, HIDDEN)
        self.last = nn.Linear(HIDDEN, 1)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.hidden(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


@dataclass(frozen=True)
class Result:
    """What a training left behind."""

    name: str
    losses: Tensor  # [steps]
    r2: float  # on the validation rows
    seconds: float


def make_optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3)


def five_lines(
    loss_of: Callable[[Tensor, Tensor], Tensor], optimizer: torch.optim.Optimizer
) -> Callable[[Tensor, Tensor], Tensor]:
    """A step of the plain loop; the first two lines are `loss_of`."""

    def step(input: Tensor, target: Tensor) -> Tensor:
        loss = loss_of(input, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def train(
    name: str,
    step: Callable[[Tensor, Tensor], Tensor],
    predict: Callable[[Tensor], Tensor],
    data: Data,
    epochs: int,
) -> Result:
    """Trains in the same order of rows at each call."""
    generator = torch.Generator().manual_seed(1)
    losses = []
    start = time.perf_counter()
    for _ in range(epochs):
        order = torch.randperm(len(data.x), generator=generator)
        for rows in order.split(BATCH_SIZE):
            losses.append(step(data.x[rows], data.t[rows]))
    seconds = time.perf_counter() - start
    with torch.no_grad():
        output = predict(data.x_validation)
    return Result(name, torch.stack(losses), r2(output, data.t_validation), seconds)


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Trains all; returns what it prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=50)
    options = parser.parse_args(arguments)
    data = load_data()

    torch.manual_seed(0)
    net = Network(data.x.shape[1])
    with_head, whole = copy.deepcopy(net), copy.deepcopy(net)
    head = fused_step.LinearMSELoss(HIDDEN, 1)
    head.load_state_dict(net.last.state_dict())  # that of a bare nn.Linear loads
    with_head.last = head.linear  # for the optimizer, and to predict

    mse = nn.MSELoss()
    whole_step = fused_step.TrainStep(whole, mse, make_optimizer(whole))
    results = [
        train(
            "plain PyTorch",
            five_lines(lambda x, t: mse(net(x), t), make_optimizer(net)),
            net,
            data,
            options.epochs,
        ),
        train(
            "LinearMSELoss",
            five_lines(lambda x, t: head(with_head.features(x), t), make_optimizer(with_head)),
            with_head,
            data,
            options.epochs,
        ),
        train("TrainStep", whole_step, whole, data, options.epochs),
    ]
    plain = results[0]
    print(f"{'':14}{'first loss':>12}{'last loss':>12}{'R²':>9}{'seconds':>9}")
    for result in results:
        first, final = result.losses[0].item(), result.losses[-1].item()
        print(f"{result.name:14}{first:12.6f}{final:12.6f}{result.r2:9.4f}{result.seconds:9.2f}")
    differences = [((r.losses - plain.losses) / plain.losses).abs().max() for r in results]
    print(
        f"Largest relative difference of a loss over {len(plain.losses)} steps: "
        f"{max(differences).item():.1e}; the plan of TrainStep: {whole_step.plan}"
    )
    return results


if __name__ == "__main__":
    main()
