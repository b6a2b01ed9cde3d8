# SPDX-License-Identifier: MIT
"""Counts what a training step of a linear model moves: the operators of PyTorch's five lines, with
the bytes that each has to read and write.

Usage: python benchmarks/traffic.py [BxIxO] [--momentum M]

An operator reads its tensor arguments and writes its results, each once: that is the least it can
move, whatever the caches hold. Views move nothing. The fused step's lines are what its plan for
this size moves by the same rule; a panel of dW is used up in cache and moves nothing.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_step import TrainStep


class Operator(NamedTuple):
    name: str
    read: int  # bytes
    written: int  # bytes


class CountOperators(TorchDispatchMode):
    """Records every operator that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if op.namespace == "aten" and not op.is_view:
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            only_written = ("aten::empty", "aten::zero_", "aten::ones_like", "aten::fill_")
            read = 0 if op.name().startswith(only_written) else sum(map(size, given))
            written = 0 if op.name().startswith("aten::empty") else sum(map(size, made))
            self.operators.append(Operator(op.name().removeprefix("aten::"), read, written))
        return result


def size(t: Tensor) -> int:
    """Bytes of its elements; those that an expanded tensor repeats count once."""
    distinct = [n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n == 0]
    count = 1
    for n in distinct:
        count *= n
    return count * t.element_size()


def plain_step(B: int, I: int, O: int, momentum: float = 0.0) -> list[Operator]:
    """The operators of a step after the first, in their order."""
    model = nn.Linear(I, O)
    loss_function = nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=momentum, foreach=False)
    x, target = torch.randn(B, I), torch.randn(B, O)

    def step() -> None:
        output = model(x)
        loss = loss_function(output, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with CountOperators() as count:
        step()
    return count.operators


def fused_step(B: int, I: int, O: int, momentum: float = 0.0) -> list[Operator]:
    """The passes of the plan that TrainStep takes."""
    model = nn.Linear(I, O)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=momentum)
    step = TrainStep(model, nn.MSELoss(), optimizer)
    step(torch.randn(B, I), torch.randn(B, O))
    x, y, W, b = 4 * B * I, 4 * B * O, 4 * O * I, 4 * O
    update = (2 if momentum else 1) * (W + b)
    if step.plan == "one-pass":
        return [Operator("one-pass", x + y + update, update + 4)]
    return [
        Operator("mm: y = x W^T", x + W, y),
        Operator("bias, target, loss, db, R", 2 * y + b, y + 4),
        Operator("mm: R^T x by panels, update", x + y + update, update),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", nargs="?", default="4096x1024x1", help="BxIxO")
    parser.add_argument("--momentum", type=float, default=0.0)
    arguments = parser.parse_args()
    B, I, O = (int(n) for n in arguments.size.split("x"))
    plain = plain_step(B, I, O, arguments.momentum)
    fused = fused_step(B, I, O, arguments.momentum)
    print(f"{'':40} {'reads (bytes)':>16} {'writes (bytes)':>16}")
    for title, operators in (("five lines", plain), ("fused step", fused)):
        read, written = sum(o.read for o in operators), sum(o.written for o in operators)
        for operator in (*operators, Operator(f"{title}: {len(operators)}", read, written)):
            print(f"{operator.name:40} {operator.read:16,} {operator.written:16,}")


if __name__ == "__main__":
    main()
