# SPDX-License-Identifier: MIT
"""LinearMSEFunction: the derivative of door 2 under torch.func, and by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from loss_oracle import NAMES, REDUCTIONS, LossProblem
from torch import Tensor, nn

import fused_step
from fused_step.autograd import LinearMSEFunction

each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
grad, jacrev, vmap = torch.func.grad, torch.func.jacrev, torch.func.vmap
ALL = frozenset(NAMES)


def fused(reduction: str) -> Callable[..., Tensor]:
    def function(x: Tensor, weight: Tensor, target: Tensor, *bias: Tensor) -> Tensor:
        return fused_step.linear_mse_loss(
            x, weight, target, linear_bias=bias[0] if bias else None, reduction=reduction
        )

    return function


def composed(reduction: str) -> Callable[..., Tensor]:
    def function(x: Tensor, weight: Tensor, target: Tensor, *bias: Tensor) -> Tensor:
        return F.mse_loss(F.linear(x, weight, *bias), target, reduction=reduction)

    return function


def operands(problem: LossProblem) -> tuple[Tensor, ...]:
    given = (problem.input, problem.weight, problem.target, problem.bias)
    return tuple(t for t in given if t is not None)


def curved(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A scalar whose second and third derivatives do not vanish."""
    return lambda *tensors: (0.1 * function(*tensors)).tanh().sum()


def second(function: Callable[..., Tensor], inner: int, outer: int | tuple[int, ...]):
    return grad(curved(grad(curved(function), argnums=inner)), argnums=outer)


TRANSFORMS = {
    "grad": lambda f, n: grad(curved(f), argnums=tuple(range(n))),
    "grad of the target alone": lambda f, n: grad(curved(f), argnums=2),
    "vjp": lambda f, n: lambda *t: torch.func.vjp(f, *t)[1](torch.ones_like(f(*t))),
    "jacrev": lambda f, n: jacrev(f, argnums=tuple(range(n))),
    "second": lambda f, n: second(f, 1, tuple(range(n))),
    "mixed": lambda f, n: second(f, 0, 1),
    "third": lambda f, n: grad(curved(second(f, 1, 1)), argnums=0),
    "jacrev twice": lambda f, n: jacrev(jacrev(curved(f), argnums=1), argnums=tuple(range(n))),
}


@each_reduction
@each_bias
@pytest.mark.parametrize("shape", [(7, 5, 1), (4, 3, 3), (3, 2, 35)], ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform_equals_torch(name, shape, reduction, bias):
    problem = LossProblem.random(
        *shape, dtype=torch.float64, reduction=reduction, bias=bias, needs=frozenset()
    )
    tensors = operands(problem)

    ours, theirs = (
        TRANSFORMS[name](function(reduction), len(tensors))(*tensors)
        for function in (fused, composed)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_gradients_of_an_empty_batch_are_zeros():
    problem = LossProblem.random(0, 5, 3, needs=frozenset())
    found = grad(fused("mean"), argnums=(0, 1, 2, 3))(*operands(problem))
    for gradient, t in zip(found, operands(problem), strict=True):
        assert torch.equal(gradient, torch.zeros_like(t))


def test_grad_of_a_functional_module_goes_through_the_function(monkeypatch):
    calls = []
    forward = LinearMSEFunction.forward
    monkeypatch.setattr(
        LinearMSEFunction,
        "forward",
        staticmethod(lambda *args: (calls.append(args[4:]), forward(*args))[1]),
    )
    head = fused_step.LinearMSELoss(5, 3)
    x, target = torch.randn(7, 5), torch.randn(7, 3)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(head, parameters, (x, target))

    found = grad(loss)(dict(head.named_parameters()))
    assert calls == [("mean", False, True, True, False)]
    nn.MSELoss()(head.linear(x), target).backward()
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def apply(problem: LossProblem, needs: frozenset[str] = ALL) -> Callable[..., Tensor]:
    flags = [name in needs and getattr(problem, name) is not None for name in NAMES]
    flags[3] |= problem.reduction == "none"

    def function(*tensors: Tensor | None) -> Tensor:
        return LinearMSEFunction.apply(*tensors, problem.reduction, *flags)[0]

    return function


@each_reduction
@each_bias
@pytest.mark.parametrize("shape", [(3, 2, 1), (2, 2, 34)], ids=str)
def test_gradcheck_and_gradgradcheck_without_torch_func(shape, reduction, bias):
    problem = LossProblem.random(*shape, dtype=torch.float64, bias=bias, reduction=reduction)
    tensors = [getattr(problem, name) for name in NAMES]
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    fast = shape[2] > 2
    assert torch.autograd.gradcheck(apply(problem), leaves, fast_mode=fast)
    assert torch.autograd.gradgradcheck(apply(problem), leaves, fast_mode=fast)


@each_reduction
def test_function_gives_the_gradients_of_the_operator(reduction):
    for needs in (frozenset({"weight"}), frozenset({"weight", "bias"}), ALL):
        problem = LossProblem.random(20, 13, 3, reduction=reduction, needs=needs)
        function = apply(problem, needs)
        operator = problem.evaluate(lambda *t: torch.ops.fused_step.linear_mse_loss(*t))
        for name, value in problem.evaluate(lambda *t, f=function: f(*t[:4])).items():
            torch.testing.assert_close(value, operator[name], rtol=1e-6, atol=1e-7)


def test_function_says_that_it_has_no_rule_for_vmap():
    problem = LossProblem.random(7, 5, 3, needs=frozenset())
    tensors = [getattr(problem, name) for name in NAMES]
    with pytest.raises(RuntimeError, match=r"LinearMSEFunction.*does not have vmap support"):
        vmap(apply(problem), in_dims=(0, None, None, 0))(*tensors)
