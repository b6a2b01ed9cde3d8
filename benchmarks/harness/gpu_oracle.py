# SPDX-License-Identifier: MIT
"""oracle.py's rule for a case on a GPU: the float64 trajectory is made there, too."""

from __future__ import annotations

import dataclasses
import math

import torch

from harness.gpu_case import GpuData
from harness.oracle import STEPS, Check

_PARTS = ("losses", "weight", "bias")


@dataclasses.dataclass
class GpuTrajectory:
    """What a contestant computed from the initial weights, on the device."""

    losses: torch.Tensor  # [steps]
    weight: torch.Tensor  # [O, I]
    bias: torch.Tensor  # [O]


def _plain_loop(
    data: GpuData, dtype: torch.dtype, scale: dict[str, float] | None = None
) -> GpuTrajectory:
    """The five lines in `dtype`; adds to `scale` what the values of each step are sums of."""
    x, target = (t.to(dtype) for t in data.batches[0])
    model = data.model(dtype)
    rate = data.case.learning_rate
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, foreach=False, fused=False)
    losses = []
    for _ in range(STEPS):
        output = model(x)
        if scale is not None:
            y, weight, bias = (t.detach() for t in (output, model.weight, model.bias))
            factor = rate * 2.0 / y.numel()
            error = (y - target).abs()
            terms = float(y.square().mean() + target.square().mean())
            scale["losses"] = max(scale["losses"], terms)
            scale["weight"] += float((weight.abs() + factor * (error.T @ x.abs())).max())
            scale["bias"] += float((bias.abs() + factor * error.sum(0)).max())
        loss = torch.nn.functional.mse_loss(output, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return GpuTrajectory(torch.stack(losses), model.weight.detach(), model.bias.detach())


class GpuOracle:
    """Holds the float64 trajectory of one case, and what the tolerance is made of."""

    def __init__(self, data: GpuData):
        scale = dict.fromkeys(_PARTS, 0.0)
        self._exact = _plain_loop(data, torch.float64, scale)
        self._eager = self._error(_plain_loop(data, data.dtype))
        self._scale = scale
        self._eps = torch.finfo(data.dtype).eps
        self._walk = math.sqrt(data.case.batch + data.case.inputs)

    def _error(self, got: GpuTrajectory) -> dict[str, float]:
        return {
            part: float((getattr(got, part).double() - getattr(self._exact, part)).abs().max())
            for part in _PARTS
        }

    def check(self, trajectory: GpuTrajectory, ours: bool) -> Check:
        """Judges a trajectory of STEPS steps; `ours` by the strict rule."""
        factor = self._eps if ours else self._eps * self._walk
        allowed = {part: 2.0 * self._eager[part] + factor * self._scale[part] for part in _PARTS}
        return Check(self._error(trajectory), allowed)
