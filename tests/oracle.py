# SPDX-License-Identifier: MIT
"""What the tests compare a fused step with, and by how much it may differ.

A `Problem` is one linear regression with its data, parameters and options. `train_plain` trains it
by the plain PyTorch loop, in the problem's own dtype or in float64; `train_fused` by TrainStep.
`assert_trains_like_plain` runs all three and holds them to the one rule of tolerance,
`assert_within_rule`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from device import DEVICE
from torch import Tensor, nn

import fused_step

# The plans of small problems: on CUDA those that fit one block are "tiny".
ONE_PASS = ("one-pass",) if DEVICE.type == "cpu" else ("tiny", "one-pass")
GEMM = ("gemm",)
FUSED_PLANS = (*ONE_PASS, *GEMM)
# Of 5 to 8 outputs: CUDA's one-pass ends before, and beyond one block the GEMMs follow.
FEW_OUTPUTS = ONE_PASS if DEVICE.type == "cpu" else FUSED_PLANS
# Those that go through the five lines, with some of them fused or none.
LOOP_PLANS = ("head", "optimizer", "plain")
ANY_PLAN = (*FUSED_PLANS, *LOOP_PLANS)

# Every distinct set of SGD's options. Dampening without momentum does nothing and nesterov asks
# for no dampening: those are left to the tests that edit param_groups.
OPTION_SETS: tuple[dict[str, Any], ...] = tuple(
    {
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

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def thinned(dtype: torch.dtype, *numbers: int) -> bool:
    """Whether a 16-bit dtype leaves out this case of a sweep: most of them, others for each type.

    They run through the loops of float32, which the sweep goes through in full; what is theirs, the
    conversions, tests/cpp/widening_test.cpp holds to all sizes bit by bit.
    """
    if dtype.itemsize > 2:
        return False
    return (sum(n * k for k, n in enumerate(numbers, 1)) + 2 * (dtype == torch.float16)) % 4 != 0


def describe(options: dict[str, Any]) -> str:
    """A short name of a set of options, for test ids."""
    return "-".join(f"{k}={v}" for k, v in options.items() if v) or "bare"


def plain_step(
    model: nn.Module,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    input: Tensor,
    target: Tensor,
) -> Tensor:
    """The five lines."""
    output = model(input)
    loss = loss_function(output, target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def plain_run(
    model: nn.Module,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    *,
    epochs: int = 1,
    batch_size: int | None = None,
    shuffle: bool = False,
    generator: torch.Generator | None = None,
    step: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The loop that `TrainStep.run` stands for; each batch by `step`, or by the five lines."""
    if step is None:
        step = functools.partial(plain_step, model, loss_function, optimizer)
    n = inputs.shape[0]
    batch_size = n if batch_size is None else batch_size
    losses = []
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
        for first in range(0, n, batch_size):
            rows = order[first : first + batch_size]
            losses.append(step(inputs[rows], targets[rows]))
    return torch.stack(losses)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every element, NaN equal to NaN."""
    return (
        a.dtype == b.dtype
        and torch.equal(torch.nan_to_num(a, nan=0.0), torch.nan_to_num(b, nan=0.0))
        and torch.equal(a.isnan(), b.isnan())
    )


@dataclass(frozen=True, repr=False)
class Problem:
    """One linear regression. Tensors are in the dtype under test; none of them is written."""

    input: Tensor  # [..., I]
    target: Tensor  # [..., O]
    weight: Tensor  # [O, I]
    bias: Tensor | None  # [O]
    reduction: str
    options: dict[str, Any]
    # Options of a param group of the bias's own; None: one group for both.
    bias_options: dict[str, Any] | None = None
    # Written into every param group after SGD's constructor, which refuses some of them.
    edits: dict[str, Any] = field(default_factory=dict)
    # Momentum buffers that earlier steps have left; None: there were none.
    weight_buffer: Tensor | None = None  # [O, I]
    bias_buffer: Tensor | None = None  # [O]

    def __repr__(self) -> str:
        return (
            f"x {list(self.input.shape)} strides {self.input.stride()} -> "
            f"{self.weight.shape[0]}, target strides {self.target.stride()}, {self.dtype}, "
            f"bias {self.bias is not None}, {self.reduction}, {self.options}, "
            f"bias options {self.bias_options}, edits {self.edits}"
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
        options: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> Problem:
        """Random data and parameters, and a learning rate at which descent is stable."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + B * 10_007 + I * 101 + O)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        # The largest eigenvalue of the Hessian s·xᵀx is about s·(√B + √I)²; half of 1/that is a
        # step along which plain descent contracts.
        s = 2.0 / max(B * O, 1) if reduction == "mean" else 2.0
        lr = 0.5 / (s * max((math.sqrt(B) + math.sqrt(I)) ** 2, 1.0))
        return cls(
            input=randn(B, I),
            target=randn(B, O),
            weight=randn(O, I),
            bias=randn(O) if bias else None,
            reduction=reduction,
            options={"lr": lr, **(options or {})},
        )

    def stable(self) -> Problem:
        """The same at a learning rate that suits its data, when they are not the random ones."""
        lr = 0.5 / max(largest_curvature(self), 1e-3)
        return dataclasses.replace(self, options={**self.options, "lr": lr})

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def build(
        self, dtype: torch.dtype | None = None
    ) -> tuple[nn.Linear, nn.MSELoss, torch.optim.SGD]:
        """A fresh model holding copies of the parameters, its loss and its optimizer."""
        dtype = self.dtype if dtype is None else dtype
        # Not nn.Linear(I, O): it initialises the weight, and warns when that has no elements.
        model = nn.Linear(1, 1, bias=self.bias is not None)
        model.out_features, model.in_features = self.weight.shape
        model.weight = nn.Parameter(self.weight.to(dtype, copy=True))
        if self.bias is not None:
            model.bias = nn.Parameter(self.bias.to(dtype, copy=True))
        groups: list[dict[str, Any]] = [{"params": [model.weight]}]
        if self.bias is not None and self.bias_options is None:
            groups[0]["params"].append(model.bias)
        elif self.bias is not None:
            groups.append({"params": [model.bias], **self.bias_options})
        # foreach=False: one tensor after the other, the rule as torch.optim writes it down.
        optimizer = torch.optim.SGD(groups, foreach=False, fused=False, **self.options)
        for group in optimizer.param_groups:
            group.update(self.edits)
        for parameter, buffer in (
            (model.weight, self.weight_buffer),
            (model.bias, self.bias_buffer),
        ):
            if parameter is not None and buffer is not None:
                optimizer.state[parameter]["momentum_buffer"] = buffer.to(dtype, copy=True)
        return model, nn.MSELoss(reduction=self.reduction), optimizer


@dataclass
class Trained:
    """What training left behind."""

    losses: list[Tensor] = field(default_factory=list)
    weight: Tensor | None = None
    bias: Tensor | None = None
    weight_buffer: Tensor | None = None
    bias_buffer: Tensor | None = None
    plans: list[str | None] = field(default_factory=list)

    def take(self, model: nn.Linear, optimizer: torch.optim.Optimizer) -> Trained:
        """Copies parameters and momentum buffers from the live objects."""

        def buffer(parameter: Tensor | None) -> Tensor | None:
            state = optimizer.state.get(parameter, {}) if parameter is not None else {}
            found = state.get("momentum_buffer")
            return None if found is None else found.detach().clone()

        self.weight = model.weight.detach().clone()
        self.bias = None if model.bias is None else model.bias.detach().clone()
        self.weight_buffer = buffer(model.weight)
        self.bias_buffer = buffer(model.bias)
        return self

    def tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        for number, loss in enumerate(self.losses):
            yield f"loss of step {number}", loss
        for name in ("weight", "bias", "weight_buffer", "bias_buffer"):
            yield name, getattr(self, name)


def train_plain(problem: Problem, steps: int, dtype: torch.dtype | None = None) -> Trained:
    """Trains by the plain loop, in `dtype` if given (torch.float64 makes it the oracle)."""
    model, loss_function, optimizer = problem.build(dtype)
    input, target = problem.input.to(model.weight.dtype), problem.target.to(model.weight.dtype)
    trained = Trained()
    for _ in range(steps):
        trained.losses.append(plain_step(model, loss_function, optimizer, input, target))
    return trained.take(model, optimizer)


def train_fused(problem: Problem, steps: int) -> Trained:
    """Trains by TrainStep."""
    model, loss_function, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    trained = Trained()
    for _ in range(steps):
        trained.losses.append(step(problem.input, problem.target))
        trained.plans.append(step.plan)
    for parameter in model.parameters():
        assert parameter.grad is None
    return trained.take(model, optimizer)


def largest_curvature(problem: Problem) -> float:
    """The largest eigenvalue of the loss's second derivative by one output's weights and bias."""
    x = rows_of(problem.input.double(), problem.weight.shape[1]).nan_to_num(0.0, 0.0, 0.0)
    if problem.bias is not None:
        x = torch.cat([x, torch.ones(x.shape[0], 1, dtype=x.dtype)], dim=1)
    if x.numel() == 0:
        return 0.0
    gram = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T
    s = 2.0 / max(problem.target.numel(), 1) if problem.reduction == "mean" else 2.0
    return s * float(torch.linalg.eigvalsh(gram)[-1])


def rows_of(a: Tensor, columns: int) -> Tensor:
    """`a` [..., columns] as [rows, columns], also where one of them is 0."""
    return a.reshape(math.prod(a.shape[:-1]), columns)


def scales(problem: Problem, steps: int) -> dict[str, float]:
    """The magnitude of what is added up to make each result: one number per tensor.

    A sum of terms in floating point, in whatever order, is off by about eps · Σ|term|, however
    small the sum itself is. So every formula of the step is evaluated once more with absolute
    values for its terms, on the float64 trajectory. Each step rounds anew and works on weights that
    are already off, which the largest curvature turns into an error of the gradient: `off` carries
    those, in units of eps, from step to step. NaN and infinity in the data count as zeros.
    """

    def finite(a: Tensor) -> Tensor:
        return a.nan_to_num(0.0, 0.0, 0.0)

    problem = dataclasses.replace(
        problem,
        input=finite(problem.input).double(),
        target=finite(problem.target).double(),
        weight=finite(problem.weight).double(),
        bias=None if problem.bias is None else finite(problem.bias).double(),
    )
    model, loss_function, optimizer = problem.build()
    O, I = problem.weight.shape
    x = rows_of(problem.input, I).abs()  # [B, I]
    # [B, O], or more columns where a target has made one output broadcast.
    t = rows_of(problem.target, problem.target.shape[-1]).abs()
    s_l = 1.0 / max(t.numel(), 1) if problem.reduction == "mean" else 1.0
    curvature = largest_curvature(problem)
    groups = {"weight": optimizer.param_groups[0], "bias": optimizer.param_groups[-1]}
    # Of gradients, where nothing clears them: what all steps have added.
    names = ("weight.grad", "bias.grad", "input.grad", "target.grad")
    found: dict[str, float] = dict.fromkeys(names, 0.0)

    def largest(a: Tensor) -> float:
        return float(a.max()) if a.numel() else 0.0

    off = {"weight": 0.0, "bias": 0.0}
    for name in ("weight_buffer", "bias_buffer"):
        buffer = getattr(problem, name)
        off[name] = 0.0 if buffer is None else largest(finite(buffer).double().abs())

    for number in range(steps):
        W = model.weight.detach().abs()
        b = torch.zeros(O) if model.bias is None else model.bias.detach().abs()
        a = x @ W.T + b + t  # [B, O] terms of a residual
        moved = x.sum(dim=1, keepdim=True) * off["weight"] + off["bias"]  # [B, 1] by earlier steps
        found[f"loss of step {number}"] = s_l * float((a * (a + 2 * moved)).sum())
        gradients = {
            "weight": (2 * s_l * largest(a.T @ x), largest(W)),
            "bias": (2 * s_l * largest(a.sum(dim=0)), largest(b)),
        }
        propagated = curvature * (off["weight"] + off["bias"])
        a_off = 2 * s_l * (a + moved)  # [B, O]
        found["target.grad"] += largest(a_off)
        found["input.grad"] += largest(a_off @ (W + off["weight"]).expand(t.shape[1], I))
        for name, (terms, size) in gradients.items():
            lr, momentum, dampening, decay = (
                abs(float(groups[name][key]))
                for key in ("lr", "momentum", "dampening", "weight_decay")
            )
            found[f"{name}.grad"] += terms + propagated
            gradient = terms + propagated + decay * (size + off[name])
            buffer = momentum * off[f"{name}_buffer"] + (1 + dampening) * gradient
            off[f"{name}_buffer"] = buffer
            move = gradient + momentum * buffer if groups[name]["nesterov"] else buffer
            off[name] += size + lr * move
        plain_step(model, loss_function, optimizer, problem.input, problem.target)
    return {**found, **off}


def assert_within_rule(
    name: str, ours: Tensor, same_dtype: Tensor, exact: Tensor, scale: float
) -> None:
    """error(ours) ≤ 2 · error(PyTorch in the same dtype) + eps · scale, both against float64.

    The error of a tensor is that of its worst element. The factor 2 lets another order of summation
    be unlucky; eps · scale (`scales` says of what) is there for when PyTorch is lucky, at one row
    or one column. In float64 PyTorch is the oracle, and its error is not known: it is taken to be
    that of the scale at least. NaN and infinity have to stand where PyTorch has them, but for
    float16: where only PyTorch's intermediate results leave its range, ours may have left it, too,
    or float64 is the only judge.
    """
    assert ours.dtype == same_dtype.dtype, f"{name}: dtype {ours.dtype}, not {same_dtype.dtype}"
    assert ours.shape == same_dtype.shape, f"{name}: shape {ours.shape}, not {same_dtype.shape}"
    rounding = torch.finfo(ours.dtype).eps * scale
    if ours.dtype == torch.float16:
        overflown = ~same_dtype.isfinite() & (exact.abs() <= torch.finfo(ours.dtype).max)
        judged = overflown & ours.isfinite()
        same_dtype = torch.where(judged, exact.to(ours.dtype), same_dtype)
    finite = same_dtype.isfinite()
    assert torch.equal(ours.isfinite(), finite), f"{name}: not finite elsewhere than in PyTorch"
    held = ~finite
    if ours.dtype == torch.float16:
        # Beyond its range: infinity, or NaN where an intermediate result has left it before.
        held &= exact.isnan()
    assert same_bits(ours[held], same_dtype[held]), f"{name}: another NaN or infinity"
    if not finite.any():
        return

    def error(a: Tensor) -> float:
        return float((a.double() - exact)[finite].abs().max())

    theirs = error(same_dtype)
    if ours.dtype == torch.float64:
        theirs = max(theirs, rounding)
    allowed = 2 * theirs + rounding
    assert error(ours) <= allowed, (
        f"{name}: off by {error(ours):.3e} from float64, allowed {allowed:.3e} "
        f"(PyTorch in {same_dtype.dtype} is off by {error(same_dtype):.3e}, scale {scale:.3e})"
    )


def assert_trains_like_plain(
    problem: Problem, steps: int = 3, plans: tuple[str, ...] = FUSED_PLANS
) -> Trained:
    """Trains by TrainStep and holds all it leaves behind to the plain loop's, by the rule.

    Args:
        problem: what is trained.
        steps: how many steps.
        plans: those that a step may take.
    """
    exact = train_plain(problem, steps, torch.float64)
    same_dtype = train_plain(problem, steps)
    ours = train_fused(problem, steps)
    for taken in ours.plans:
        assert taken in plans, f"{problem}: plan {taken}, not {plans}"
    scale = scales(problem, steps)
    for (name, a), (_, b), (_, c) in zip(
        ours.tensors(), same_dtype.tensors(), exact.tensors(), strict=True
    ):
        assert (a is None) == (b is None), f"{problem}: {name} is {a}, in the plain loop {b}"
        if a is not None:
            assert_within_rule(f"{problem}: {name}", a, b, c, scale[name])
    return ours
