# SPDX-License-Identifier: MIT
"""Correctness before speed: every contestant is held against the plain loop in float64.

The rule for fused_step: error <= 2 * error(eager) + eps * scale, where both errors are against
float64, eager has the case's dtype, eps is that dtype's, and scale is the sum of the magnitudes
that the value was made of. Losses, weight and bias are judged each by itself.

For the others eps * scale is multiplied by sqrt(B + I), the random walk of a sum that is rounded
after every term: some library's matrix-vector products are made so (4096x1024x1 by hand: 1.6 times
the strict tolerance), and being less exact is not being wrong. A term left out errs by 1e-2.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from harness.case import Data
from harness.contestant import Trajectory
from harness.torch_steps import linear_parameters, make_linear

STEPS = 4
_PARTS = ("losses", "weight", "bias")


@dataclasses.dataclass
class Check:
    """The largest absolute error of each part, and the most that the rule allows."""

    error: dict[str, float]
    allowed: dict[str, float]

    @property
    def passed(self) -> bool:
        # Written so that a NaN error fails.
        return all(self.error[part] <= allowed for part, allowed in self.allowed.items())

    def as_json(self) -> dict:
        """JSON has no NaN: an error that is not finite becomes null."""
        found = {part: e if math.isfinite(e) else None for part, e in self.error.items()}
        return {part: {"error": found[part], "allowed": self.allowed[part]} for part in found}

    def failures(self) -> str:
        return "; ".join(
            f"{part}: error {self.error[part]:.3g}, allowed {self.allowed[part]:.3g}"
            for part in self.allowed
            if not self.error[part] <= self.allowed[part]
        )


def _plain_loop(
    x: torch.Tensor,  # [B, I]
    target: torch.Tensor,  # [B, O]
    data: Data,
    scale: dict[str, float] | None = None,
) -> Trajectory:
    """The five lines in x's dtype, by the loop form of SGD; adds to `scale` if it is given."""
    model = make_linear(data, x.dtype)
    loss_function = torch.nn.MSELoss()
    rate = data.case.learning_rate
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, foreach=False, fused=False)
    losses = []
    for _ in range(STEPS):
        output = model(x)
        if scale is not None:
            _add_magnitudes(scale, x, output.detach(), target, model, rate)
        loss = loss_function(output, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Trajectory(np.array(losses), *linear_parameters(model))


def _add_magnitudes(
    scale: dict[str, float],
    x: torch.Tensor,  # [B, I]
    output: torch.Tensor,  # [B, O]
    target: torch.Tensor,  # [B, O]
    model: torch.nn.Linear,
    rate: float,
) -> None:
    """What the values of one step are sums of, in absolute terms: rounding scales with it."""
    factor = rate * 2.0 / output.numel()
    error = (output - target).abs()
    weight_sums = error.T @ x.abs()  # [O, I]
    weight, bias = model.weight.detach().abs(), model.bias.detach().abs()
    losses = float(output.square().mean() + target.square().mean())
    scale["losses"] = max(scale["losses"], losses)
    scale["weight"] += float((weight + factor * weight_sums).max())
    scale["bias"] += float((bias + factor * error.sum(0)).max())


def _error(got: Trajectory, exact: Trajectory) -> dict[str, float]:
    return {
        part: float(np.max(np.abs(getattr(got, part).astype(np.float64) - getattr(exact, part))))
        for part in _PARTS
    }


class Oracle:
    """Holds the float64 trajectory of one case, and what the tolerance is made of."""

    def __init__(self, data: Data):
        x, target = data.tensors
        scale = dict.fromkeys(_PARTS, 0.0)
        self._exact = _plain_loop(x.double(), target.double(), data, scale)
        self._eager = _error(_plain_loop(x, target, data), self._exact)
        self._scale = scale
        self._eps = torch.finfo(x.dtype).eps
        self._walk = math.sqrt(data.case.batch + data.case.inputs)

    def check(self, trajectory: Trajectory, ours: bool) -> Check:
        """Judges a trajectory of STEPS steps; `ours` by the strict rule."""
        factor = self._eps if ours else self._eps * self._walk
        allowed = {part: 2.0 * self._eager[part] + factor * self._scale[part] for part in _PARTS}
        return Check(_error(trajectory, self._exact), allowed)
