# SPDX-License-Identifier: MIT
"""linear_mse_loss computes the loss and the gradients that PyTorch computes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from device import DEVICE
from hypothesis import given, settings
from loss_oracle import (
    HEAD,
    NAMES,
    NEEDS,
    REDUCTIONS,
    TRAINING,
    LossFunction,
    LossProblem,
    assert_loss_like_torch,
    fused_loss,
    torch_loss,
)
from oracle import DTYPES, same_bits, thinned
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_step._extension import _C

# Every size around vectors of 4, 8 and 16 elements: 0 … 2 · 16 + 1.
VECTOR_SIZES = range(2 * 16 + 2)
# One problem of each way to compute it: one-pass for one and for several outputs, gemm.
SHAPES = [(37, 13, 1), (41, 21, 6), (45, 19, 131)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@pytest.fixture(params=_C.isa_levels(True) if DEVICE.type == "cpu" else [_C.isa_used()])
def isa(request) -> Iterator[str]:
    """Each instruction set of this processor in turn."""
    used = _C.isa_used()
    _C.use_isa(request.param)
    yield request.param
    _C.use_isa(used)


# --- sizes --------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("B", VECTOR_SIZES)
def test_equals_torch_at_every_size_around_vector_widths(B, dtype, isa):
    outputs = itertools.cycle((1, 2, 1, 3, 4, 1, 5, 8, 1, 7, 9, 1, 17, 33))
    needs = itertools.cycle((HEAD, TRAINING, frozenset({"input"}), HEAD, frozenset({"weight"})))
    for I in VECTOR_SIZES:
        problem = LossProblem.random(
            B,
            I,
            next(outputs),
            dtype=dtype,
            bias=(B + I) % 3 != 0,
            reduction=("mean", "sum")[I // 2 % 2],
            needs=next(needs),
        )
        if not thinned(dtype, B, I):
            assert_loss_like_torch(problem)


@each_dtype
@pytest.mark.parametrize("O", (*range(10), 15, 16, 17, 31, 32, 33, 64, 65, 129))
def test_equals_torch_at_every_number_of_outputs(O, dtype):
    for B, I in itertools.product((1, 5, 32, 67), (1, 4, 13, 16, 33)):
        for reduction, bias in itertools.product(REDUCTIONS, (True, False)):
            if thinned(dtype, B, I, bias, REDUCTIONS.index(reduction)):
                continue
            problem = LossProblem.random(B, I, O, dtype=dtype, bias=bias, reduction=reduction)
            assert_loss_like_torch(problem)


@each_dtype
@pytest.mark.parametrize(
    "needs", [HEAD, TRAINING, frozenset({"input"})], ids=lambda n: "+".join(sorted(n))
)
@pytest.mark.parametrize(
    ("B", "I", "O"),
    [
        (1, 1000, 1),
        (1000, 1, 1),
        (1, 1000, 8),
        (1, 300, 130),
        (300, 1, 130),
        (4099, 257, 1),
        (4099, 257, 3),
        (2051, 129, 8),
        (1027, 129, 16),
        (4099, 65, 32),
        (515, 131, 131),
        (5, 5003, 4),
        (9, 20_011, 1),
    ],
)
def test_equals_torch_at_larger_and_odd_sizes(B, I, O, needs, dtype, isa):
    assert_loss_like_torch(LossProblem.random(B, I, O, dtype=dtype, needs=needs))


# On CUDA the units that multiply matrices take these, by a warp for each row and by several.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("needs", [TRAINING, HEAD], ids=lambda names: "+".join(sorted(names)))
@pytest.mark.parametrize(
    "shape", [(1_003, 72, 5), (1_003, 520, 8), (515, 264, 13), (515, 136, 29)], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_16_bit_of_rows_in_eights_equals_torch(reduction, shape, needs, dtype):
    problem = LossProblem.random(*shape, reduction=reduction, dtype=dtype, needs=needs)
    assert_loss_like_torch(problem)


def test_equals_torch_on_many_rows():
    """In float64 PyTorch's own sum over so many rows is too far off to be an oracle."""
    assert_loss_like_torch(LossProblem.random(70_001, 7, 2))
    problem = LossProblem.random(70_001, 7, 2, dtype=torch.float64, needs=TRAINING)
    x, W, b, t = (
        tensor.cpu().numpy().astype(np.longdouble)
        for tensor in (problem.input, problem.weight, problem.bias, problem.target)
    )
    dy = 2 * problem.grad_output.item() / t.size * (x @ W.T + b - t)
    exact = dy.T @ x

    def error(function: LossFunction) -> float:
        return float(np.abs(problem.evaluate(function)["weight"].cpu().numpy() - exact).max())

    assert error(fused_loss) <= error(torch_loss)


@pytest.mark.parametrize("O", [1, 5, 130])
def test_equals_torch_on_constant_data(O):
    problem = LossProblem.random(200, 11, O)
    x, t = torch.full_like(problem.input, 0.7), torch.full_like(problem.target, -1.3)
    assert_loss_like_torch(problem.with_layout(input=x, target=t))


@each_dtype
@each_reduction
@pytest.mark.parametrize(
    "shape",
    [(0, 5, 3), (0, 5, 40), (4, 0, 3), (4, 0, 40), (4, 5, 0), (0, 0, 3), (0, 0, 0)],
    ids=str,
)
def test_sizes_of_zero_equal_torch(shape, reduction, dtype):
    for needs in (HEAD, frozenset(NAMES)):
        problem = LossProblem.random(*shape, dtype=dtype, reduction=reduction, needs=needs)
        assert_loss_like_torch(problem)


def test_empty_batch_has_zero_gradients_whatever_comes_back():
    problem = LossProblem.random(0, 5, 3)
    for factor in (float("inf"), float("nan")):
        found = problem.with_layout(grad_output=torch.tensor(factor)).evaluate(fused_loss)
        assert found["loss"].isnan()
        assert torch.equal(found["weight"], torch.zeros(3, 5))
        assert torch.equal(found["bias"], torch.zeros(3))


# --- what is asked for --------------------------------------------------------------------------


@each_dtype
@each_reduction
@each_shape
def test_every_set_of_gradients_equals_torch(shape, reduction, dtype):
    for needs, bias in itertools.product(NEEDS, (True, False)):
        if thinned(dtype, len(needs), bias):
            continue
        problem = LossProblem.random(
            *shape, dtype=dtype, reduction=reduction, needs=needs, bias=bias
        )
        assert_loss_like_torch(problem)


class Log(TorchDispatchMode):
    """Notes what calls of fused_step's functional operator give."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[tuple[Tensor, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.fused_step.linear_mse.default:
            self.results.append(result)
        return result


@each_reduction
@each_shape
def test_only_needed_gradients_are_made(shape, reduction):
    B, I, O = shape
    for needs in NEEDS:
        problem = LossProblem.random(*shape, reduction=reduction, needs=needs)
        with Log() as log:
            problem.evaluate(fused_loss)
        (result,) = log.results
        sizes = dict(zip(("loss", *NAMES), (tuple(t.shape) for t in result), strict=True))
        full = {"input": (B, I), "weight": (O, I), "bias": (O,), "target": (B, O)}
        for name in NAMES:
            made = name in needs and (reduction != "none" or name == "target")
            if name == "target" and reduction == "none":
                made = bool(needs)  # all gradients are made from the residual
            assert sizes[name] == (full[name] if made else (0,)), (name, needs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
@each_reduction
@each_shape
def test_without_grad_mode_nothing_is_stashed(shape, reduction, mode):
    problem = LossProblem.random(*shape, reduction=reduction)
    tensors = [problem.input, problem.weight, problem.bias, problem.target]
    with_grad = [t.clone().requires_grad_() for t in tensors]
    with mode(), Log() as log:
        loss = fused_loss(*with_grad, reduction)
    assert not loss.requires_grad
    if mode is torch.no_grad:  # in inference mode a dispatch mode sees the outer operator only
        assert [t.numel() for t in log.results[0][1:]] == [0] * 4
    assert same_bits(loss.clone(), problem.evaluate(fused_loss)["loss"])


@each_shape
def test_arguments_are_left_alone(shape):
    problem = LossProblem.random(*shape, needs=frozenset(NAMES))
    tensors = [problem.input, problem.weight, problem.bias, problem.target]
    kept = [(t.clone(), t._version) for t in tensors]
    problem.evaluate(fused_loss)
    for t, (values, version) in zip(tensors, kept, strict=True):
        assert torch.equal(t, values)
        assert t._version == version


# --- layouts ------------------------------------------------------------------------------------


def apart(t: Tensor) -> Tensor:
    """The same with other data between the rows and in front."""
    table = torch.full((t.shape[0], t.shape[1] + 5), float("nan"), dtype=t.dtype)
    table[:, 3:-2] = t
    return table[:, 3:-2]


def transposed(t: Tensor) -> Tensor:
    return t.T.contiguous().T


def every_other(t: Tensor) -> Tensor:
    table = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
    table[..., ::2] = t
    return table[..., ::2]


def repeated_rows(t: Tensor) -> Tensor:
    return t[:1].expand_as(t)


def repeated_columns(t: Tensor) -> Tensor:
    return t[:, :1].expand_as(t)


def overlapping_rows(t: Tensor) -> Tensor:
    rows, columns = t.shape
    return t.reshape(-1)[: rows + columns - 1].as_strided((rows, columns), (1, 1))


LAYOUTS = (apart, transposed, every_other, repeated_rows, repeated_columns, overlapping_rows)


@each_dtype
@each_reduction
@each_shape
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_every_layout_equals_torch(layout, shape, reduction, dtype):
    problem = LossProblem.random(*shape, dtype=dtype, reduction=reduction)
    for name in ("input", "weight", "target"):
        assert_loss_like_torch(problem.with_layout(**{name: layout(getattr(problem, name))}))
    assert_loss_like_torch(problem.with_layout(bias=every_other(problem.bias)))


@each_reduction
@pytest.mark.parametrize("O", [1, 6, 131])
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (3, 1, 4), (2, 0, 3)], ids=str)
def test_leading_dimensions_are_rows(leading, O, reduction):
    problem = LossProblem.random(7, 13, O, reduction=reduction, needs=frozenset(NAMES))
    x, t = torch.randn(*leading, 13), torch.randn(*leading, O)
    assert_loss_like_torch(problem.with_layout(input=x, target=t))
    if len(leading) > 1:
        x, t = x.transpose(0, 1), t.transpose(0, 1)
        assert_loss_like_torch(problem.with_layout(input=x, target=t))


@settings(max_examples=200)
@given(data=st.data())
def test_any_call_equals_torch(data):
    size = st.one_of(st.integers(0, 5), st.integers(6, 80))
    problem = LossProblem.random(
        data.draw(size),
        data.draw(size),
        data.draw(size),
        dtype=data.draw(st.sampled_from(DTYPES)),
        bias=data.draw(st.booleans()),
        reduction=data.draw(st.sampled_from(REDUCTIONS)),
        needs=data.draw(st.sampled_from(NEEDS)),
        seed=data.draw(st.integers(0, 1000)),
    )
    name = data.draw(st.sampled_from(("input", "weight", "target")))
    tensor = getattr(problem, name)
    if tensor.numel():
        layout = data.draw(st.sampled_from(LAYOUTS))
        problem = problem.with_layout(**{name: layout(tensor)})
    assert_loss_like_torch(problem)


# --- the same bits ------------------------------------------------------------------------------


@pytest.mark.cpu_only("threads of torch")
@pytest.mark.parametrize("shape", [(4099, 257, 1), (4099, 65, 8), (37, 13, 1)], ids=str)
def test_one_pass_has_the_same_bits_on_any_number_of_threads(shape):
    problem = LossProblem.random(*shape)
    torch.set_num_threads(1)
    expected = problem.evaluate(fused_loss)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for name, value in problem.evaluate(fused_loss).items():
            assert torch.equal(value, expected[name]), name


def test_gradients_do_not_depend_on_which_others_are_made():
    for shape in ((4099, 257, 1), (41, 21, 6)):
        expected = LossProblem.random(*shape).evaluate(fused_loss)
        for needs in NEEDS:
            if "target" in needs:
                continue  # its gradient asks for the residual, and for another plan
            found = LossProblem.random(*shape, needs=needs).evaluate(fused_loss)
            for name, value in found.items():
                assert torch.equal(value, expected[name]), (name, needs)


def test_nan_and_infinity_reach_the_results_that_torch_puts_them_in():
    for value in (float("nan"), float("inf")):
        for O in (1, 6, 131):
            problem = LossProblem.random(21, 13, O)
            x = problem.input.clone()
            x[4, 7] = value
            ours = problem.with_layout(input=x).evaluate(fused_loss)
            theirs = problem.with_layout(input=x).evaluate(torch_loss)
            for name in ours:
                assert torch.equal(ours[name].isfinite(), theirs[name].isfinite()), name


def test_gradients_have_their_tensors_dtype_also_where_grad_dtype_is_none():
    weight = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    weight.grad_dtype = None
    x, t = torch.randn(5, 3).bfloat16(), torch.randn(5, 2).bfloat16()
    fused_loss(x, weight, None, t, "mean").backward()
    assert weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_near_the_end_of_the_range_are_finite_where_torchs_are(reduction):
    """The sum over all rows without the mean's factor would be beyond it."""
    rows, large = 4096, 1.7e18 if reduction == "mean" else 1e16
    x = torch.full((rows, 1), large)
    found = []
    for function in (fused_loss, torch_loss):
        weight = torch.full((1, 1), 0.5, requires_grad=True)
        function(x, weight, None, torch.zeros(rows, 1), reduction).backward()
        found.append(weight.grad)
    assert torch.isfinite(found[1]).all()
    # A sum of equal terms, of which torch may round each addition.
    rtol = rows * torch.finfo(torch.float32).eps / 2
    torch.testing.assert_close(*found, rtol=rtol, atol=0.0)
