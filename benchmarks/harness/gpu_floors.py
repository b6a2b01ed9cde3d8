# SPDX-License-Identifier: MIT
"""The least that each part of a step can cost on a GPU: a launch, moving x, two bare GEMMs."""

from __future__ import annotations

from typing import Any

import torch

from harness.gpu_case import GpuData
from harness.gpu_steps import GpuContestant, StepOf, captured


class GpuFloor(GpuContestant):
    """What a part of a step costs in a straightforward way; no loss, and so no trajectory."""

    role = "floor"

    def parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._data.weight, self._data.bias

    def trajectory(self, steps: int) -> Any:
        return None

    def last_loss(self) -> float | None:
        return None


class Launch(GpuFloor):
    """torch's smallest operation: one element, in place."""

    def build(self, data: GpuData) -> StepOf:
        one = torch.zeros((), device=data.case.device)
        return lambda k: one.add_(1.0)


class Replay(GpuFloor):
    """The same as a CUDA graph."""

    def build(self, data: GpuData) -> StepOf:
        one = torch.zeros((), device=data.case.device)
        return captured(lambda x, target: one.add_(1.0), data)


class Copy(GpuFloor):
    """x copied on the device: its bytes read, and as many written."""

    def build(self, data: GpuData) -> StepOf:
        to = torch.empty_like(data.batches[0][0])
        return lambda k: to.copy_(data.batches[k][0])


class Gemms(GpuFloor):
    """x Wᵀ and Rᵀ x, each into a buffer that exists already: the arithmetic, and nothing else."""

    def build(self, data: GpuData) -> StepOf:
        weight_t = data.weight.T  # [I, O]
        output = torch.empty_like(data.batches[0][1])  # [B, O]
        gradient = torch.empty_like(data.weight)  # [O, I]

        def two_gemms(k: int) -> torch.Tensor:
            x, target = data.batches[k]
            torch.mm(x, weight_t, out=output)
            # The target stands for R: as large, and as random.
            return torch.mm(target.T, x, out=gradient)

        return two_gemms
