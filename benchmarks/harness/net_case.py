# SPDX-License-Identifier: MIT
"""What is measured of a network that ends in a linear layer: its layers, their data, the check."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from harness.case import Target
from harness.oracle import STEPS, Check

LEARNING_RATE = 1e-2
_EPS = float(np.finfo(np.float32).eps)


class Network(nn.Module):
    """Linear layers with tanh between them, in a class as users write it."""

    def __init__(self, layers: list[nn.Linear]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


def squared_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean squared error as users write it."""
    return ((output - target) ** 2).mean()


@dataclasses.dataclass(frozen=True)
class NetCase:
    """One step of linear layers with tanh between them, mean squared error and SGD, float32."""

    name: str
    title: str
    batch: int
    widths: tuple[int, ...]  # of the input, and of each layer's output
    trains_all: bool = True  # False: the last layer alone
    own_code: bool = False  # a class and a function instead of nn.Sequential and nn.MSELoss
    targets: tuple[str, ...] = ()
    note: str = ""

    learning_rate = LEARNING_RATE
    dtype = "float32"

    @property
    def sizes(self) -> dict[str, int]:
        return {"batch": self.batch, "inputs": self.widths[0], "outputs": self.widths[-1]}

    @property
    def parsed_targets(self) -> list[Target]:
        return [Target.parse(text) for text in self.targets]

    @property
    def minimal_bytes(self) -> int:
        """x, t and all parameters read once, what is trained written once."""
        data = self.batch * (self.widths[0] + self.widths[-1])
        layers = [I * O + O for I, O in self._layers()]
        trained = layers if self.trains_all else layers[-1:]
        return 4 * (data + sum(layers) + sum(trained))

    @property
    def flops(self) -> int:
        """A multiply and an add for each element of a layer's product: forward, dW and dx."""
        first, *later = (2 * self.batch * I * O for I, O in self._layers())
        if self.trains_all:
            return 2 * first + 3 * sum(later)
        return first + sum(later) + (later or [first])[-1]

    def _layers(self) -> Iterator[tuple[int, int]]:
        return zip(self.widths, self.widths[1:], strict=False)

    @property
    def loss_function(self) -> Callable[[torch.Tensor, torch.Tensor], Any]:
        return squared_error if self.own_code else nn.MSELoss()

    def make_model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        layers = [nn.Linear(I, O) for I, O in self._layers()]
        for layer in layers[:-1]:
            layer.requires_grad_(self.trains_all)
        if self.own_code:
            return Network(layers).to(dtype)
        modules = [module for layer in layers for module in (layer, nn.Tanh())]
        return nn.Sequential(*modules[:-1]).to(dtype)

    @property
    def tiny(self) -> NetCase:
        """A case that loads and starts all that this one needs, and holds next to nothing."""
        return dataclasses.replace(self, batch=8, widths=(4,) * len(self.widths), targets=())

    def make_data(self, seed: int) -> NetData:
        return NetData(self, seed)

    def make_oracle(self, data: NetData) -> NetOracle:
        return NetOracle(data)


class NetData:
    """The same start and the same batch for every contestant, in whatever process it runs."""

    def __init__(self, case: NetCase, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.case = case
        self.seed = seed
        self.tensors = (
            torch.randn(case.batch, case.widths[0], generator=generator),
            torch.randn(case.batch, case.widths[-1], generator=generator),
        )
        # Initial weights come from the default generator alone, which nobody else is to notice.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._start = case.make_model().state_dict()

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A model at the start, of its own tensors."""
        model = self.case.make_model()
        model.load_state_dict(self._start)
        return model.to(dtype)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@dataclasses.dataclass
class NetTrajectory:
    """The losses of the first steps, and the parameters that they led to."""

    losses: np.ndarray  # [steps]
    parameters: list[torch.Tensor]


def plain_trajectory(data: NetData, dtype: torch.dtype) -> NetTrajectory:
    """The five lines, by the loop form of SGD."""
    model, loss_function = data.model(dtype), data.case.loss_function
    x, target = (t.to(dtype) for t in data.tensors)
    optimizer = torch.optim.SGD(
        trained_parameters(model), lr=LEARNING_RATE, foreach=False, fused=False
    )
    losses = []
    for _ in range(STEPS):
        output = model(x)
        loss = loss_function(output, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return NetTrajectory(np.array(losses), [p.detach() for p in model.parameters()])


class NetOracle:
    """Holds what the plain loop comes to in float64 and in float32.

    error <= 2 * error(plain loop in float32) + eps * scale, for the losses and for all parameters.
    The scale is the largest magnitude among them, times the random walk of the longest sum for
    those that are not ours, as in oracle.py.
    """

    def __init__(self, data: NetData):
        self._exact = plain_trajectory(data, torch.float64)
        self._plain = self._error(plain_trajectory(data, torch.float32))
        self._scale = {
            "losses": float(np.max(self._exact.losses)),
            "parameters": max(float(p.abs().max()) for p in self._exact.parameters),
        }
        self._walk = math.sqrt(data.case.batch + max(data.case.widths))

    def _error(self, got: NetTrajectory) -> dict[str, float]:
        pairs = zip(got.parameters, self._exact.parameters, strict=True)
        return {
            "losses": float(np.max(np.abs(got.losses - self._exact.losses))),
            "parameters": float(np.max([float((a.double() - b).abs().max()) for a, b in pairs])),
        }

    def check(self, trajectory: NetTrajectory, ours: bool) -> Check:
        """Judges a trajectory of STEPS steps; `ours` by the strict rule."""
        factor = _EPS if ours else _EPS * self._walk
        allowed = {part: 2.0 * e + factor * self._scale[part] for part, e in self._plain.items()}
        return Check(self._error(trajectory), allowed)
