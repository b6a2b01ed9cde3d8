# SPDX-License-Identifier: MIT
"""What the tests of linear_mse_loss compare it with, and by how much it may differ.

A `LossProblem` is one call of the function: its tensors, its options, which gradients are wanted
and the gradient that comes back to the loss. `assert_loss_like_torch` evaluates it by fused_step,
by PyTorch in the same dtype and by PyTorch in float64, and holds the first to the one rule of
tolerance of `oracle.assert_within_rule`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from oracle import assert_within_rule, rows_of
from torch import Tensor

import fused_step

NAMES = ("input", "weight", "bias", "target")
# Every set of tensors that gradients may be wanted of.
NEEDS = tuple(frozenset(names) for n in range(5) for names in itertools.combinations(NAMES, n))
TRAINING = frozenset({"weight", "bias"})
HEAD = frozenset({"input", "weight", "bias"})
REDUCTIONS = ("mean", "sum", "none")

LossFunction = Callable[[Tensor, Tensor, Tensor | None, Tensor, str], Tensor]


def torch_loss(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, reduction: str
) -> Tensor:
    """The composition that the function stands for."""
    return F.mse_loss(F.linear(input, weight, bias), target, reduction=reduction)


def fused_loss(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, reduction: str
) -> Tensor:
    """The function under test, with PyTorch's order of arguments."""
    return fused_step.linear_mse_loss(input, weight, target, linear_bias=bias, reduction=reduction)


@dataclass(frozen=True, repr=False)
class LossProblem:
    """One call. Tensors are in the dtype under test; none of them is written."""

    input: Tensor  # [..., I]
    weight: Tensor  # [O, I]
    bias: Tensor | None  # [O]
    target: Tensor  # [..., O]
    reduction: str
    needs: frozenset[str]
    grad_output: Tensor  # [], or [..., O] for "none"

    def __repr__(self) -> str:
        return (
            f"x {list(self.input.shape)} strides {self.input.stride()} -> "
            f"{list(self.weight.shape)} strides {self.weight.stride()}, {self.weight.dtype}, "
            f"bias {self.bias is not None}, {self.reduction}, gradients of {sorted(self.needs)}"
        )

    @classmethod
    def random(
        cls,
        B: int,
        I: int,
        O: int,
        *,
        dtype: torch.dtype = torch.float32,
        bias: bool = True,
        reduction: str = "mean",
        needs: frozenset[str] = HEAD,
        seed: int = 0,
    ) -> LossProblem:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + B * 10_007 + I * 101 + O)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        return cls(
            input=randn(B, I),
            weight=randn(O, I),
            bias=randn(O) if bias else None,
            target=randn(B, O),
            reduction=reduction,
            needs=needs,
            grad_output=randn(B, O) if reduction == "none" else randn() + 3,
        )

    def with_layout(self, **tensors: Tensor) -> LossProblem:
        """The same with other tensors, whatever shape or strides they have."""
        changed = dataclasses.replace(self, **tensors)
        if self.reduction == "none":
            like = torch.randn(changed.target.shape, dtype=torch.float64).to(self.weight.dtype)
            changed = dataclasses.replace(changed, grad_output=like)
        return changed

    def evaluate(
        self, function: LossFunction, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The loss and the wanted gradients, by name."""
        tensors = {}
        for name in NAMES:
            t = getattr(self, name)
            if t is not None:
                # detach() keeps the strides under test.
                t = t.detach() if dtype is None else t.to(dtype, copy=True)
                t.requires_grad_(name in self.needs)
            tensors[name] = t
        loss = function(*tensors.values(), self.reduction)
        found = {"loss": loss.detach()}
        wanted = [n for n in NAMES if n in self.needs and tensors[n] is not None]
        assert loss.requires_grad == bool(wanted)
        if wanted:
            gradients = torch.autograd.grad(
                loss, [tensors[n] for n in wanted], self.grad_output.to(loss.dtype)
            )
            found.update(zip(wanted, gradients, strict=True))
        return found

    def scales(self) -> dict[str, float]:
        """The magnitude of what is added up to make each result, see `oracle.scales`.

        A gradient counts twice: for the rounding of its sums, and for that of the factor
        s·grad_output and of the product with it.
        """
        O, I = self.weight.shape
        x, W = rows_of(self.input.double(), I).abs(), self.weight.double().abs()
        t = rows_of(self.target.double(), O).abs()
        b = torch.zeros(O).double() if self.bias is None else self.bias.double().abs()
        a = x @ W.T + b + t  # [B, O] terms of a residual
        s_l = 1 / max(t.numel(), 1) if self.reduction == "mean" else 1.0
        g = self.grad_output.double().abs()
        dy = 2 * s_l * a * (rows_of(g, O) if self.reduction == "none" else g)

        def largest(values: Tensor) -> float:
            return float(values.max()) if values.numel() else 0.0

        return {
            "loss": largest(a * a) if self.reduction == "none" else s_l * float((a * a).sum()),
            "input": 2 * largest(dy @ W),
            "weight": 2 * largest(dy.T @ x),
            "bias": 2 * largest(dy.sum(dim=0)),
            "target": 2 * largest(dy),
        }


def assert_loss_like_torch(problem: LossProblem) -> dict[str, Tensor]:
    """Evaluates by fused_step and holds loss and gradients to PyTorch's, by the rule."""
    ours = problem.evaluate(fused_loss)
    same_dtype = problem.evaluate(torch_loss)
    exact = problem.evaluate(torch_loss, torch.float64)
    scale = problem.scales()
    assert ours.keys() == same_dtype.keys()
    for name, value in ours.items():
        assert_within_rule(f"{problem}: {name}", value, same_dtype[name], exact[name], scale[name])
    return ours
