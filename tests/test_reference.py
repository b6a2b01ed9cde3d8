# SPDX-License-Identifier: MIT
"""reference.py against torch's autograd and torch.optim.SGD, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import OPTION_SETS, describe
from torch import Tensor

from fused_step import reference

# One row, one input and one output; more of each than any of the others; leading dimensions.
SHAPES = [((1,), 1, 1), ((7,), 3, 1), ((3,), 5, 4), ((2,), 2, 9), ((2, 3), 4, 2), ((), 3, 2)]


def problem(rows: tuple[int, ...], I: int, O: int, bias: bool = True) -> list[Tensor | None]:
    """x [*rows, I], W [O, I], b [O] or None, t [*rows, O], all float64."""
    shapes = [(*rows, I), (O, I), (O,), (*rows, O)]
    x, W, b, t = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [x, W, b if bias else None, t]


def assert_same_to_rounding(actual: Tensor, expected: Tensor, *, terms: int, scale: Tensor) -> None:
    """Two orders of the same sum: each rounds at most `terms` times, values up to `scale`."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert scale > 0
    bound = 2 * terms * torch.finfo(expected.dtype).eps * scale
    assert (actual - expected).abs().max() <= bound


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("rows", "I", "O"), SHAPES)
def test_loss_and_gradients_equal_autograd(rows, I, O, bias, reduction):
    x, W, b, t = problem(rows, I, O, bias)
    leaves = [v.clone().requires_grad_() for v in (x, W, b) if v is not None]
    expected_loss = F.mse_loss(F.linear(*leaves), t, reduction=reduction)
    expected = torch.autograd.grad(expected_loss, leaves)

    actual = reference.linear_mse(x, W, b, t, reduction)

    # Each value is a chain of three sums, over I, over O or B, and over both for the loss.
    B = math.prod(rows)
    terms = I + O + B * O + 4
    largest = 1 + max(v.abs().max() for v in (x, W, t) if v is not None)
    scale = (I + 2) * largest**2 * 2 * (B + O) * largest
    assert_same_to_rounding(actual.loss, expected_loss, terms=terms, scale=expected_loss.detach())
    assert_same_to_rounding(actual.dx, expected[0], terms=terms, scale=scale)
    assert_same_to_rounding(actual.dW, expected[1], terms=terms, scale=scale)
    if bias:
        assert_same_to_rounding(actual.db, expected[2], terms=terms, scale=scale)
    else:
        assert actual.db is None


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("B", "O"), [(0, 2), (3, 0)], ids=["no-rows", "no-outputs"])
def test_empty_output_gives_pytorch_loss_and_zero_gradients(B, O, reduction):
    x, W, b, t = problem((B,), 3, O)
    step = reference.linear_mse(x, W, b, t, reduction)
    expected = F.mse_loss(F.linear(x, W, b), t, reduction=reduction)
    torch.testing.assert_close(step.loss, expected, rtol=0, atol=0, equal_nan=True)
    for gradient, like in ((step.dx, x), (step.dW, W), (step.db, b)):
        assert torch.equal(gradient, torch.zeros_like(like))


def test_mean_divides_by_rows_and_outputs_by_hand():
    # y = [1·1 + 2·1 + 0.5, 1·0 + 2·2 + 0] = [3.5, 4]; r = [0.5, 2]; s_l = 1/2
    x, W = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    b, t = torch.tensor([0.5, 0.0]), torch.tensor([[3.0, 2.0]])
    step = reference.linear_mse(x, W, b, t)
    assert step.loss.item() == 2.125
    assert step.dW.tolist() == [[0.5, 1.0], [2.0, 4.0]]
    assert step.db.tolist() == [0.5, 2.0]
    assert step.dx.tolist() == [[0.5, 4.5]]


def test_linear_mse_refuses_unknown_reduction():
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'none'"):
        reference.linear_mse(*problem((2,), 3, 1), "none")


def test_linear_mse_refuses_target_that_would_broadcast():
    x, W, b, t = problem((2,), 3, 1)
    with pytest.raises(ValueError, match=r"shape of the output \[2, 1\], got \[2\]"):
        reference.linear_mse(x, W, b, t.squeeze(1))


@pytest.mark.parametrize(
    "lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["float", "tensor"]
)
@pytest.mark.parametrize("options", [*OPTION_SETS, {"dampening": 0.3}], ids=describe)
def test_updates_equal_torch_sgd_over_five_steps(options, lr):
    param = torch.randn(4, 3, dtype=torch.float64)
    theirs = torch.nn.Parameter(param.clone())
    optimizer = torch.optim.SGD([theirs], lr=lr, **options, foreach=False, fused=False)
    buf = None
    for count in range(1, 6):
        grad = torch.randn(4, 3, dtype=torch.float64)
        theirs.grad = grad.clone()
        optimizer.step()
        param, buf = reference.sgd_update(param, grad, buf, lr=lr, **options)

        # About eight roundings a step, of values no larger than a few gradients.
        scale = theirs.detach().abs().max() + 4 * grad.abs().max()
        assert_same_to_rounding(param, theirs.detach(), terms=8 * count, scale=scale)
        expected_buf = optimizer.state[theirs].get("momentum_buffer")
        if expected_buf is None:
            assert buf is None
        else:
            assert_same_to_rounding(buf, expected_buf, terms=8 * count, scale=scale)


def test_update_without_momentum_keeps_a_buffer_as_it_is():
    param, grad, buf = torch.ones(2), torch.ones(2), torch.full((2,), 7.0)
    update = reference.sgd_update(param, grad, buf, lr=0.5)
    assert update.buf is buf
    assert update.param.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("options", OPTION_SETS, ids=describe)
def test_whole_steps_equal_the_plain_loop(options, bias, reduction):
    lr = 0.01
    x, W, b, t = problem((6,), 3, 2, bias)
    model = torch.nn.Linear(3, 2, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(W)
        if bias:
            model.bias.copy_(b)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, **options, foreach=False, fused=False)
    W_buf = b_buf = None
    for count in range(1, 4):
        expected_loss = F.mse_loss(model(x), t, reduction=reduction)
        expected_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step = reference.linear_mse_sgd(
            x, W, b, t, W_buf, b_buf, reduction=reduction, lr=lr, **options
        )

        terms, scale = 64 * count, 1 + expected_loss.detach()
        assert_same_to_rounding(step.loss, expected_loss.detach(), terms=terms, scale=scale)
        W, W_buf = step.W
        assert_same_to_rounding(W, model.weight.detach(), terms=terms, scale=scale)
        if bias:
            b, b_buf = step.b
            assert_same_to_rounding(b, model.bias.detach(), terms=terms, scale=scale)
        else:
            assert step.b is None
