# SPDX-License-Identifier: MIT
"""What is measured of an optimizer: the shapes of its parameters, their data, the check."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from harness.case import Target
from harness.oracle import STEPS, Check

LEARNING_RATE = 1e-4
_EPS = float(np.finfo(np.float32).eps)


def resnet50_shapes() -> tuple[tuple[int, ...], ...]:
    """The 161 parameters of torchvision's resnet50, in its order."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            outputs = 4 * width
            for shape in ((width, inputs, 1, 1), (width, width, 3, 3), (outputs, width, 1, 1)):
                shapes += [shape, shape[:1], shape[:1]]  # a convolution, then a normalisation
            if block == 0:
                shapes += [(outputs, inputs, 1, 1), (outputs,), (outputs,)]
            inputs = outputs
    return (*shapes, (1000, 2048), (1000,))


@dataclasses.dataclass(frozen=True)
class OptimCase:
    """One step of SGD over parameters of given shapes, in float32."""

    name: str
    title: str
    shapes: tuple[tuple[int, ...], ...]
    momentum: float = 0.0
    new_grads: bool = False  # at each step other tensors than at the last, as backward() makes them
    targets: tuple[str, ...] = ()
    note: str = ""
    device: str = "cpu"
    peak_memory: bool = False  # never: a step takes none

    learning_rate = LEARNING_RATE
    dtype = "float32"

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def sizes(self) -> dict[str, int]:
        return {"tensors": len(self.shapes), "elements": self.elements}

    @property
    def parsed_targets(self) -> list[Target]:
        return [Target.parse(text) for text in self.targets]

    @property
    def minimal_bytes(self) -> int:
        """The gradient read once; parameter and momentum buffer read once and written once."""
        return 4 * self.elements * (5 if self.momentum else 3)

    @property
    def flops(self) -> int:
        return self.elements * (4 if self.momentum else 2)

    @property
    def tiny(self) -> OptimCase:
        """A case that loads and starts all that this one needs, and holds next to nothing."""
        return dataclasses.replace(self, shapes=((4, 4), (4,)), targets=())

    def make_data(self, seed: int) -> OptimData:
        return OptimData(self, seed)

    def make_oracle(self, data: OptimData) -> OptimOracle:
        return OptimOracle(data)


class OptimData:
    """Parameters to start from, and gradients that all contestants share."""

    def __init__(self, case: OptimCase, seed: int):
        device = case.device
        generator = torch.Generator(device).manual_seed(seed)

        def randn(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.case = case
        self.seed = seed
        self.start = [randn(shape) for shape in case.shapes]
        self.grads = [randn(shape) for shape in case.shapes]
        self.other_grads = [g.clone() for g in self.grads] if case.new_grads else []

    def parameters(self, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
        """Copies of the start with their gradients."""
        made = [torch.nn.Parameter(t.to(dtype, copy=True)) for t in self.start]
        for parameter, grad in zip(made, self.grads, strict=True):
            parameter.grad = grad.to(dtype)
        return made


def _largest(values: list[float]) -> float:
    return float(np.max(values))  # NaN stays NaN


class OptimOracle:
    """Holds the parameters of torch's for-loop after STEPS steps in float64 and in float32.

    error <= 2 * error(for-loop in float32) + eps * scale; the scale is the largest parameter.
    """

    def __init__(self, data: OptimData):
        self._exact = self._train(data, torch.float64)
        self._scale = _largest([float(t.abs().max()) for t in self._exact])
        self._allowed = 2.0 * self._error(self._train(data, torch.float32)) + _EPS * self._scale

    @staticmethod
    def _train(data: OptimData, dtype: torch.dtype) -> list[torch.Tensor]:
        params = data.parameters(dtype)
        optimizer = torch.optim.SGD(
            params, lr=LEARNING_RATE, momentum=data.case.momentum, foreach=False, fused=False
        )
        for _ in range(STEPS):
            optimizer.step()
        return [p.detach() for p in params]

    def _error(self, params: list[torch.Tensor]) -> float:
        pairs = zip(params, self._exact, strict=True)
        return _largest([float((a.double() - b).abs().max()) for a, b in pairs])

    def check(self, params: list[torch.Tensor], ours: bool) -> Check:
        """Judges parameters after STEPS steps."""
        return Check({"parameters": self._error(params)}, {"parameters": self._allowed})
