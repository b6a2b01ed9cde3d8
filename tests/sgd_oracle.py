# SPDX-License-Identifier: MIT
"""What the tests of fused_step.SGD compare it with: torch.optim.SGD's for-loop, on copies.

`Twins` holds the same parameters three times: under fused_step.SGD, under torch's for-loop in the
same dtype, and under that in float64. float32 and float64 must have the for-loop's bits; 16-bit
values are held to the one rule of tolerance, `oracle.assert_within_rule`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from oracle import assert_within_rule, same_bits
from torch import Tensor
from torch.nn import Parameter

import fused_step

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EXACT_DTYPES = (torch.float32, torch.float64)
# Lanes of the widest vector: 16 floats, which hold 16-bit values too, or 8 doubles.
WIDEST = 16
# Around every vector width, and where a chunk of 32 k elements ends.
SIZES = (*range(2 * WIDEST + 2), 47, 48, 49, 63, 64, 65, 100, 1000)

# Every distinct set of SGD's options but the learning rate.
OPTION_SETS: tuple[dict[str, Any], ...] = tuple(
    {
        "lr": 0.1,
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "maximize": maximize,
    }
    for (momentum, dampening, nesterov), weight_decay, maximize in itertools.product(
        ((0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)),
        (0.0, 0.05),
        (False, True),
    )
)
MOMENTUM = {"lr": 0.1, "momentum": 0.9}


def torch_sgd(params: Iterable[Any], **options: Any) -> torch.optim.SGD:
    """torch's for-loop; the options that only fused_step.SGD has are left out."""
    options = {k: v for k, v in options.items() if k not in ("momentum_dtype", "max_grad_norm")}
    return torch.optim.SGD(params, **{**options, "foreach": False, "fused": False})


def copy_of(t: Tensor, dtype: torch.dtype | None = None) -> Parameter:
    """A parameter of its own memory with t's values and strides."""
    return Parameter(t.detach().clone().to(t.dtype if dtype is None else dtype))


def momentum_of(optimizer: torch.optim.Optimizer, param: Tensor) -> Tensor | None:
    """The momentum buffer of `param`, None if it has none."""
    return optimizer.state.get(param, {}).get("momentum_buffer")


class Twins:
    """The same training by fused_step.SGD, by torch in the same dtype and by torch in float64."""

    def __init__(
        self,
        params: Sequence[Tensor],
        make: Callable[..., torch.optim.Optimizer] = fused_step.SGD,
        **options: Any,
    ) -> None:
        self.ours = [copy_of(p) for p in params]
        self.same_dtype = [copy_of(p) for p in params]
        self.exact = [copy_of(p, torch.float64) for p in params]
        self.optimizer = make(self.ours, **options)
        self.torch_optimizer = torch_sgd(self.same_dtype, **options)
        self.exact_optimizer = torch_sgd(self.exact, **options)
        self.scales = [float(p.detach().abs().max()) if p.numel() else 0.0 for p in params]
        self._generator = torch.Generator().manual_seed(5)

    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        return self.optimizer, self.torch_optimizer, self.exact_optimizer

    def set_grads(self, grads: Sequence[Tensor | None] | None = None) -> None:
        """The same gradients for all three, random ones if none are given."""
        if grads is None:
            grads = [
                torch.randn(p.shape, generator=self._generator, dtype=torch.float64).to(p.dtype)
                for p in self.ours
            ]
        for k, grad in enumerate(grads):
            for params in (self.ours, self.same_dtype, self.exact):
                params[k].grad = None if grad is None else grad.clone().to(params[k].dtype)

    def step(self, grads: Sequence[Tensor | None] | None = None, steps: int = 1) -> None:
        """Sets gradients and steps all three optimizers."""
        for _ in range(steps):
            self.set_grads(grads)
            for optimizer in self.optimizers():
                optimizer.step()

    def check(self, what: str = "") -> None:
        """Parameters and momentum buffers are those of the for-loop."""
        for k, (a, b, c) in enumerate(zip(self.ours, self.same_dtype, self.exact, strict=True)):
            self._check(f"{what} param {k}", a.detach(), b.detach(), c.detach(), self.scales[k])
            bufs = [momentum_of(o, p) for o, p in zip(self.optimizers(), (a, b, c), strict=True)]
            assert (bufs[0] is None) == (bufs[1] is None), f"{what} param {k}: {bufs}"
            if bufs[0] is not None:
                scale = float(bufs[2].abs().max()) if a.numel() else 0.0
                if bufs[0].dtype != bufs[1].dtype:  # momentum_dtype
                    bufs[1] = bufs[1].to(bufs[0].dtype)
                    assert_within_rule(f"{what} buffer {k}", *bufs, scale)
                else:
                    self._check(f"{what} buffer {k}", *bufs, scale)

    @staticmethod
    def _check(name: str, a: Tensor, b: Tensor, c: Tensor, scale: float) -> None:
        if a.dtype in EXACT_DTYPES:
            assert same_bits(a, b), f"{name}: off by {(a - b).abs().max()}"
        else:
            assert_within_rule(name, a, b, c, scale)


def random_params(
    *shapes: int | tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """Random values, one tensor for each shape."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]
