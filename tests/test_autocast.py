# SPDX-License-Identifier: MIT
"""Autocast: 16-bit inputs beside float32 parameters, fused, and as accurate as PyTorch itself."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE
from loss_oracle import (
    NAMES,
    REDUCTIONS,
    LossProblem,
    assert_loss_like_torch,
    fused_loss,
    torch_loss,
)
from oracle import (
    FUSED_PLANS,
    GEMM,
    ONE_PASS,
    Problem,
    assert_within_rule,
    plain_run,
    plain_step,
    scales,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_step
from fused_step._extension import _C

HALVES = (torch.bfloat16, torch.float16)
CAST = (torch.float32, *HALVES)
SHAPES = [(37, 13, 1), (41, 21, 6), (45, 19, 131)]
# On CUDA the GEMMs are autocast's own.
PLANS = {1: ONE_PASS, 6: ONE_PASS, 131: GEMM if DEVICE.type == "cpu" else ("optimizer",)}
LOSS_IS_FUSED = {1: True, 6: DEVICE.type == "cpu", 131: DEVICE.type == "cpu"}
each_half = pytest.mark.parametrize("half", HALVES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def _large_layers_are_fused_on_every_processor() -> Iterator[None]:
    _C.use_bfloat16_gemm(False)
    yield
    _C.use_bfloat16_gemm(None)


class Log(TorchDispatchMode):
    """Counts the calls of fused_step's functional operator."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.fused_step.linear_mse.default
        return func(*args, **(kwargs or {}))


def of_dtypes(problem: LossProblem, input: torch.dtype, params: torch.dtype, target: torch.dtype):
    return problem.with_layout(
        input=problem.input.to(input),
        weight=problem.weight.to(params),
        bias=None if problem.bias is None else problem.bias.to(params),
        target=problem.target.to(target),
    )


# --- linear_mse_loss ----------------------------------------------------------------------------


@each_half
@pytest.mark.parametrize("reduction", REDUCTIONS)
@each_shape
def test_loss_and_gradients_of_every_mix_of_dtypes_equal_torchs_by_the_rule(shape, reduction, half):
    mixes = tuple(itertools.product(CAST, repeat=3))
    for dtypes in mixes if reduction == "mean" else mixes[::5]:
        problem = of_dtypes(
            LossProblem.random(*shape, reduction=reduction, needs=frozenset(NAMES)), *dtypes
        )
        with torch.autocast(DEVICE.type, dtype=half):
            found = assert_loss_like_torch(problem)
            with Log() as log:
                problem.evaluate(fused_loss)
        assert log.calls == LOSS_IS_FUSED[shape[2]], dtypes
        assert found["loss"].dtype == torch.float32
        for name in NAMES:
            assert found[name].dtype == getattr(problem, name).dtype, (name, dtypes)


@each_half
@pytest.mark.parametrize("O", [1, 2, 5, 8, 33])
def test_16_bit_inputs_of_every_size_around_vector_widths(O, half):
    for B, I in itertools.product((1, 3, 8, 17), range(19)):
        problem = LossProblem.random(B, I, O)
        with torch.autocast(DEVICE.type, dtype=half):
            assert_loss_like_torch(problem.with_layout(input=problem.input.to(half)))


@each_half
@pytest.mark.parametrize("shape", [(4099, 257, 1), (2051, 129, 8), (9003, 300, 40)], ids=str)
def test_16_bit_inputs_of_many_rows(shape, half):
    """The last takes several panels of rows."""
    problem = LossProblem.random(*shape)
    with torch.autocast(DEVICE.type, dtype=half):
        assert_loss_like_torch(problem.with_layout(input=problem.input.to(half)))


@each_shape
def test_float64_is_left_alone(shape):
    problem = LossProblem.random(*shape, dtype=torch.float64)
    outside = problem.evaluate(fused_loss)
    with torch.autocast(DEVICE.type), Log() as log:
        inside = problem.evaluate(fused_loss)
    assert log.calls == 1
    for name, value in inside.items():
        assert torch.equal(value, outside[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_what_autocast_does_not_cast_has_torchs_result(dtype):
    problem = LossProblem.random(7, 5, 3, needs=frozenset())
    problem = problem.with_layout(target=(10 * problem.target).to(dtype))
    with torch.autocast(DEVICE.type):
        ours, theirs = problem.evaluate(fused_loss), problem.evaluate(torch_loss)
    assert ours["loss"].dtype == theirs["loss"].dtype
    assert torch.equal(ours["loss"], theirs["loss"])


def test_a_float64_input_has_torchs_error():
    problem = LossProblem.random(7, 5, 3)
    problem = problem.with_layout(input=problem.input.double())
    with torch.autocast(DEVICE.type):
        for function in (fused_loss, torch_loss):
            with pytest.raises(RuntimeError, match="must have the same dtype"):
                problem.evaluate(function)


@each_half
def test_mixed_dtypes_raise_outside_of_autocast_and_where_it_is_disabled(half):
    problem = LossProblem.random(7, 5, 3)
    problem = problem.with_layout(input=problem.input.to(half))
    for context in (contextlib.nullcontext(), torch.autocast(DEVICE.type, enabled=False)):
        with context, pytest.raises(TypeError, match="input must have the dtype of linear_weight"):
            problem.evaluate(fused_loss)
    with (
        torch.autocast(DEVICE.type, dtype=half),
        torch.autocast(DEVICE.type, enabled=False),
        pytest.raises(TypeError, match="input must have the dtype of linear_weight"),
    ):
        problem.evaluate(fused_loss)


@each_half
def test_disabled_region_has_the_bits_of_no_autocast(half):
    problem = LossProblem.random(37, 13, 3)
    outside = problem.evaluate(fused_loss)
    with torch.autocast(DEVICE.type, dtype=half), torch.autocast(DEVICE.type, enabled=False):
        inside = problem.evaluate(fused_loss)
    for name, value in inside.items():
        assert torch.equal(value, outside[name])


@each_half
def test_the_weight_counts_as_it_is_now_and_not_as_autocasts_copy(half):
    """autocast keeps its copy of a parameter until the region ends, whatever becomes of it."""
    problem = LossProblem.random(37, 13, 3)
    weight = nn.Parameter(problem.weight.clone())
    with torch.autocast(DEVICE.type, dtype=half):
        F.linear(problem.input, weight)  # makes the copy
        fused_step.linear_mse_loss(problem.input, weight, problem.target)  # makes none
        with torch.no_grad():
            weight.zero_()
        loss = fused_step.linear_mse_loss(problem.input, weight, problem.target)
    torch.testing.assert_close(loss.detach(), problem.target.square().mean())


@each_half
def test_backward_inside_of_the_region_is_that_outside_of_it(half):
    for reduction in REDUCTIONS:
        problem = LossProblem.random(37, 13, 3, reduction=reduction)
        found = []
        for inside in (True, False):
            weight = problem.weight.clone().requires_grad_()
            with torch.autocast(DEVICE.type, dtype=half):
                loss = fused_step.linear_mse_loss(
                    problem.input.to(half), weight, problem.target, reduction=reduction
                )
                if inside:
                    loss.sum().backward()
            if not inside:
                loss.sum().backward()
            found.append(weight.grad)
        assert torch.equal(*found)


@each_half
def test_second_derivative_of_a_16_bit_input_beside_float32_parameters(half):
    """By the formula in float32."""
    problem = LossProblem.random(9, 5, 2)
    x = problem.input.to(half)

    def hessian_row(x: Tensor, weight: Tensor, target: Tensor, function) -> Tensor:
        weight = weight.clone().requires_grad_()
        with torch.autocast(DEVICE.type, dtype=half):
            loss = function(x, weight, None, target, "mean")
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        return torch.autograd.grad(first[0, 0], weight)[0]

    ours = hessian_row(x, problem.weight, problem.target, fused_loss)
    exact = hessian_row(x.double(), problem.weight.double(), problem.target.double(), torch_loss)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


def test_head_under_compile_has_the_eager_loss():
    torch._dynamo.reset()
    head = fused_step.LinearMSELoss(13, 3)
    x, t = torch.randn(37, 13, dtype=torch.bfloat16), torch.randn(37, 3)

    def train(function) -> tuple[Tensor, Tensor]:
        head.zero_grad()
        with torch.autocast(DEVICE.type):
            loss = function(x, t)
        loss.backward()
        return loss.detach(), head.linear.weight.grad.clone()

    expected = train(head)
    for a, b in zip(
        train(torch.compile(head, backend="aot_eager", fullgraph=True)), expected, strict=True
    ):
        assert torch.equal(a, b)


# --- GradScaler ---------------------------------------------------------------------------------


def test_scaled_gradients_near_the_optimum_are_as_accurate_as_torchs():
    """B·O = 10⁶, scale 65536: each dL/dy is below what float16 holds until the scale reaches it."""
    B, I, O = 62_500, 64, 16
    torch.manual_seed(0)
    x = torch.randn(B, I).half()
    best = torch.randn(O, I)
    target = x.float() @ best.T
    weight = best + 1e-3 * torch.randn(O, I)

    def gradients(function, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        operands = [t.to(dtype or t.dtype, copy=True) for t in (x, weight, target)]
        for t in operands[:2]:
            t.requires_grad_()
        with torch.autocast(DEVICE.type, dtype=torch.float16, enabled=dtype is None):
            loss = function(operands[0], operands[1], None, operands[2], "mean")
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=65536.0)
        scaler.scale(loss).backward()
        return dict(zip(("input", "weight"), (t.grad.double() for t in operands[:2]), strict=True))

    exact = gradients(torch_loss, torch.float64)
    ours, stock = gradients(fused_loss), gradients(torch_loss)
    for name, value in exact.items():
        error = {
            k: float((g[name] - value).norm() / value.norm())
            for k, g in (("ours", ours), ("stock", stock))
        }
        assert error["ours"] <= 2 * error["stock"], (name, error)


@pytest.mark.parametrize("size", [1e-6, 1e5], ids=["below", "above"])
def test_gradients_whose_unscaled_form_float16_does_not_hold_are_exact(size):
    """r·W leaves float16's range on either side; with the factor it is back within."""
    x = torch.zeros(4, 3, dtype=torch.float16, requires_grad=True)
    weight = torch.full((1, 3), 1.0)
    target = torch.full((4, 1), size)
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        loss = fused_step.linear_mse_loss(x, weight, target)
    loss.backward(torch.tensor(1.0 / size))
    assert torch.equal(x.grad, torch.full((4, 3), -0.5, dtype=torch.float16))


def test_the_factor_of_a_mean_over_a_million_is_not_rounded_to_float16():
    """2 / (B·O) would be 33 units in float16's last place."""
    problem = LossProblem.random(250_001, 2, 4, dtype=torch.float16, needs=frozenset({"weight"}))
    problem = problem.with_layout(grad_output=torch.tensor(1.0, dtype=torch.float16))
    ours = problem.evaluate(fused_loss)["weight"].double()
    exact = problem.evaluate(torch_loss, torch.float64)["weight"]
    assert (ours - exact).abs().max() <= torch.finfo(torch.float16).eps * exact.abs().max()


def test_training_with_a_scaler_reaches_the_loss_of_the_plain_head():
    def train(fused: bool) -> float:
        torch.manual_seed(0)
        body, head = nn.Linear(8, 16), nn.Linear(16, 4)
        optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.05)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
        x, t = torch.randn(64, 8), torch.randn(64, 4)
        for _ in range(20):
            with torch.autocast(DEVICE.type, dtype=torch.float16):
                h = torch.tanh(body(x))
                if fused:
                    loss = fused_step.linear_mse_loss(h, head.weight, t, linear_bias=head.bias)
                else:
                    loss = F.mse_loss(head(h), t)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return float(loss.detach())

    assert train(True) == pytest.approx(train(False), rel=1e-2)


# --- TrainStep ----------------------------------------------------------------------------------


def train(problem: Problem, step_of, half: torch.dtype | None) -> list[Tensor]:
    """Three steps in one region, and what they leave behind."""
    model, loss_function, optimizer = problem.build(None if half else torch.float64)
    x, t = problem.input, problem.target
    if half is None:
        x, t = x.double(), t.double()
    step = step_of(model, loss_function, optimizer)
    with torch.autocast(
        DEVICE.type, dtype=half or torch.bfloat16, enabled=half is not None, cache_enabled=False
    ):
        losses = [step(x, t) for _ in range(3)]
    buffer = optimizer.state[model.weight]["momentum_buffer"]
    return [*losses, model.weight.detach(), model.bias.detach(), buffer]


def plain(model, loss_function, optimizer):
    return lambda x, t: plain_step(model, loss_function, optimizer, x, t)


@each_half
@pytest.mark.parametrize("target", CAST, ids=str)
@pytest.mark.parametrize("input", CAST, ids=str)
@each_shape
def test_step_without_autocasts_cache_is_fused_and_equals_the_plain_loop(
    shape, input, target, half
):
    problem = Problem.random(*shape, options={"momentum": 0.9, "weight_decay": 0.01})
    problem = dataclasses.replace(
        problem, input=problem.input.to(input), target=problem.target.to(target)
    )
    plans = []

    def fused(*objects):
        step = fused_step.TrainStep(*objects)

        def call(x, t):
            loss = step(x, t)
            plans.append(step.plan)
            return loss

        return call

    scale = scales(problem, 3)
    names = [f"loss of step {k}" for k in range(3)] + ["weight", "bias", "weight_buffer"]
    for name, ours, same, exact in zip(
        names,
        train(problem, fused, half),
        train(problem, plain, half),
        train(problem, plain, None),
        strict=True,
    ):
        assert_within_rule(f"{problem}: {name}", ours, same, exact, scale[name])
    assert set(plans) <= set(PLANS[shape[2]])


@each_half
def test_step_with_autocasts_cache_is_not_fused_and_says_why(half):
    problem = Problem.random(37, 13, 3)
    objects, twin = problem.build(), problem.build()
    step = fused_step.TrainStep(*objects)
    with torch.autocast(DEVICE.type, dtype=half):
        assert "cache_enabled=True" in step.explain(problem.input, problem.target)
        for _ in range(3):
            ours = step(problem.input, problem.target)
            assert step.plan == "optimizer"
    with torch.autocast(DEVICE.type, dtype=half):
        for _ in range(3):
            theirs = plain_step(*twin, problem.input, problem.target)
    assert torch.equal(ours, theirs)
    assert torch.equal(objects[0].weight, twin[0].weight)


@each_half
def test_step_of_a_16_bit_model_under_autocast_is_not_fused_and_says_why(half):
    problem = Problem.random(37, 13, 3, dtype=half)
    step = fused_step.TrainStep(*problem.build())
    with torch.autocast(DEVICE.type, dtype=half, cache_enabled=False):
        assert "not float32" in step.explain(problem.input, problem.target)
        assert step(problem.input, problem.target).dtype == torch.float32
        assert step.plan == "optimizer"


def test_step_in_float64_under_autocast_has_the_bits_of_no_autocast():
    problem = Problem.random(37, 13, 3, dtype=torch.float64)
    found = []
    for enabled in (True, False):
        model, loss_function, optimizer = problem.build()
        step = fused_step.TrainStep(model, loss_function, optimizer)
        with torch.autocast(DEVICE.type, enabled=enabled):
            step(problem.input, problem.target)
        assert step.plan in ONE_PASS
        found.append(model.weight.detach())
    assert torch.equal(*found)


@each_half
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("O", [1, 6, 131])
def test_run_without_autocasts_cache_has_the_bits_of_steps(O, shuffle, half):
    problem = Problem.random(101, 13, O, options={"momentum": 0.9})
    problem = dataclasses.replace(problem, input=problem.input.to(half))
    arguments = {"epochs": 2, "batch_size": 32, "shuffle": shuffle}
    found = []
    for by_run in (True, False):
        model, loss_function, optimizer = problem.build()
        step = fused_step.TrainStep(model, loss_function, optimizer)
        arguments["generator"] = torch.Generator().manual_seed(0)
        with torch.autocast(DEVICE.type, dtype=half, cache_enabled=False):
            if by_run:
                losses = step.run(problem.input, problem.target, **arguments)
                assert step.plan in PLANS[O]
            else:
                losses = plain_run(
                    model,
                    loss_function,
                    optimizer,
                    problem.input,
                    problem.target,
                    step=step,
                    **arguments,
                )
        found.append([losses, model.weight.detach(), model.bias.detach()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_16_bit_input_without_autocast_has_the_plain_loops_error():
    problem = Problem.random(37, 13, 3)
    step = fused_step.TrainStep(*problem.build())
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        step(problem.input.bfloat16(), problem.target)


# --- Where the processor multiplies bfloat16 -----------------------------------------------------

# B, I, O and the dtype of x, with 2^24 multiply-adds or just below, and as many outputs.
LEFT = [(1024, 1024, 16, torch.bfloat16), (512, 1024, 32, torch.float32)]
NOT_LEFT = [
    (1023, 1024, 16, torch.bfloat16),
    (2048, 1024, 15, torch.bfloat16),
    (511, 1024, 32, torch.float32),
    (1024, 1024, 31, torch.float32),
]


of_processor = pytest.mark.cpu_only("the processor's GEMMs of bfloat16")


def of_input(problem, dtype: torch.dtype):
    return dataclasses.replace(problem, input=problem.input.to(dtype))


def calls_of_the_operator(problem: LossProblem, half: torch.dtype = torch.bfloat16) -> int:
    with torch.autocast("cpu", dtype=half), Log() as log:
        problem.evaluate(fused_loss)
    return log.calls


@of_processor
@pytest.mark.parametrize(("B", "I", "O", "dtype"), LEFT)
def test_large_layers_are_left_to_torchs_operators(B, I, O, dtype):
    problem = of_input(LossProblem.random(B, I, O), dtype)
    assert calls_of_the_operator(problem) == 1
    _C.use_bfloat16_gemm(True)
    assert calls_of_the_operator(problem) == 0
    assert calls_of_the_operator(problem, torch.float16) == 1
    with torch.autocast("cpu"):
        ours, theirs = problem.evaluate(fused_loss), problem.evaluate(torch_loss)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@of_processor
@pytest.mark.parametrize(("B", "I", "O", "dtype"), NOT_LEFT)
def test_smaller_layers_are_fused(B, I, O, dtype):
    _C.use_bfloat16_gemm(True)
    assert calls_of_the_operator(of_input(LossProblem.random(B, I, O), dtype)) == 1


@of_processor
def test_a_large_layer_has_the_operators_errors():
    _C.use_bfloat16_gemm(True)
    x, weight, target = torch.zeros(1024, 1024), torch.zeros(64, 1024), torch.zeros(1024, 63)
    with torch.autocast("cpu"), pytest.raises(ValueError, match="target must have the shape"):
        fused_step.linear_mse_loss(x, weight, target)


@of_processor
@pytest.mark.parametrize(("B", "I", "O", "dtype"), LEFT)
def test_steps_of_large_layers_are_the_plain_loops_and_say_why(B, I, O, dtype):
    _C.use_bfloat16_gemm(True)
    problem = of_input(Problem.random(B, I, O, options={"momentum": 0.9}), dtype)
    x, t = problem.input, problem.target
    ours, theirs = problem.build(), problem.build()
    step = fused_step.TrainStep(*ours)
    with torch.autocast("cpu", cache_enabled=False):
        assert "GEMMs of 16 bit are faster" in step.explain(x, t)
        loss = step(x, t)
        assert step.plan == "optimizer"
        assert torch.equal(loss, plain_step(*theirs, x, t))
        losses = step.run(x, t, epochs=2, batch_size=B)
        assert step.plan == "optimizer"
        assert torch.equal(losses, torch.stack([plain_step(*theirs, x, t) for _ in range(2)]))
        step.run(x, t, epochs=1, batch_size=B // 2)
        assert step.plan in FUSED_PLANS
    with torch.autocast("cpu", dtype=torch.float16, cache_enabled=False):
        step(x, t)
        assert step.plan in FUSED_PLANS
    step(x.float(), t)
    assert step.plan in FUSED_PLANS


@of_processor
def test_a_large_layer_in_float64_is_fused():
    _C.use_bfloat16_gemm(True)
    problem = Problem.random(1024, 1024, 33, dtype=torch.float64)
    step = fused_step.TrainStep(*problem.build())
    with torch.autocast("cpu"):
        step(problem.input, problem.target)
    assert step.plan == "gemm"
