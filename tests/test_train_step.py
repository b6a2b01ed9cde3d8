# SPDX-License-Identifier: MIT
"""TrainStep's fused plans compute what the plain loop computes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import threading

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from device import DEVICE
from hypothesis import given, settings
from oracle import (
    ANY_PLAN,
    DTYPES,
    FEW_OUTPUTS,
    FUSED_PLANS,
    GEMM,
    ONE_PASS,
    OPTION_SETS,
    Problem,
    assert_trains_like_plain,
    assert_within_rule,
    describe,
    plain_step,
    same_bits,
    scales,
    thinned,
    train_fused,
    train_plain,
)
from torch import nn

import fused_step

# Every size around vectors of 4, 8 and 16 elements: 0 … 2 · 16 + 1.
VECTOR_SIZES = range(2 * 16 + 2)
ONE_PASS_OUTPUTS = tuple(range(1, 9))
# From 9 to 127 the implementation chooses between one-pass and gemm.
MORE_OUTPUTS = (9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
# One problem of each plan.
SHAPES = {"one output": (37, 13, 1), "few outputs": (41, 21, 6), "many outputs": (45, 19, 131)}
PLANS = {"one output": ONE_PASS, "few outputs": FEW_OUTPUTS, "many outputs": GEMM}
each_plan = pytest.mark.parametrize("shape", SHAPES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
MOMENTUM = {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}


# --- sizes --------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("B", VECTOR_SIZES)
def test_step_equals_plain_loop_at_every_size_around_vector_widths(B, dtype):
    outputs = itertools.cycle(ONE_PASS_OUTPUTS)
    options = itertools.cycle(OPTION_SETS)
    plans = ANY_PLAN if B == 0 else FUSED_PLANS if B < 32 else FEW_OUTPUTS
    for I in VECTOR_SIZES:
        if thinned(dtype, B, I):
            continue
        problem = Problem.random(
            B,
            I,
            1 if (B + I) % 2 else next(outputs),
            dtype=dtype,
            bias=(B + I) % 3 != 0,
            reduction=("mean", "sum")[I // 2 % 2],
            options=next(options),
        )
        assert_trains_like_plain(problem, steps=2, plans=ANY_PLAN if I == 0 else plans)


@each_dtype
@pytest.mark.parametrize("O", (*ONE_PASS_OUTPUTS, *MORE_OUTPUTS))
def test_step_equals_plain_loop_at_every_number_of_outputs(O, dtype):
    options = itertools.cycle(OPTION_SETS)
    plans = ONE_PASS if O == 1 else FEW_OUTPUTS if O <= 8 else GEMM if O >= 128 else FUSED_PLANS
    for B, I in itertools.product((32, 33, 67), (1, 4, 13, 16, 17, 33)):
        for reduction, bias in itertools.product(("mean", "sum"), (True, False)):
            if thinned(dtype, B, I, bias, reduction == "sum"):
                continue
            problem = Problem.random(
                B, I, O, dtype=dtype, bias=bias, reduction=reduction, options=next(options)
            )
            assert_trains_like_plain(problem, steps=2, plans=plans)


@each_dtype
@pytest.mark.parametrize(
    ("B", "I", "O"),
    [
        (1, 1, 1),
        (1, 1000, 1),
        (1000, 1, 1),
        (1, 1000, 8),
        (1, 300, 130),
        (300, 1, 130),
        (3, 2, 1),
        (442, 10, 1),
        (4099, 257, 1),
        (4099, 257, 3),
        (2051, 129, 8),
        (1027, 129, 16),
        (515, 131, 131),
        (70_001, 7, 2),
        (5, 5003, 4),
    ],
)
def test_step_equals_plain_loop_at_larger_and_odd_sizes(B, I, O, dtype):
    for options in ({}, MOMENTUM):
        assert_trains_like_plain(Problem.random(B, I, O, dtype=dtype, options=options))


@pytest.mark.parametrize("O", [1, 5, 130])
def test_constant_data_trains_like_plain_loop(O):
    problem = Problem.random(40, 11, O)
    constant = dataclasses.replace(
        problem,
        input=torch.full_like(problem.input, 0.7),
        target=torch.full_like(problem.target, -1.3),
    )
    assert_trains_like_plain(constant.stable())


# --- options ------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("options", OPTION_SETS, ids=describe)
@each_plan
def test_every_option_set_equals_plain_loop_over_five_steps(shape, options, dtype):
    for reduction, bias in itertools.product(("mean", "sum"), (True, False)):
        if thinned(dtype, 2 * bias, reduction == "sum"):
            continue
        problem = Problem.random(
            *SHAPES[shape], dtype=dtype, bias=bias, reduction=reduction, options=options
        )
        assert_trains_like_plain(problem, steps=5, plans=PLANS[shape])


@each_plan
@pytest.mark.parametrize(
    "edits",
    [
        {"nesterov": True, "momentum": 0.9, "dampening": 0.4},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1},
        {"nesterov": True},
        {"momentum": 0.9, "dampening": 1.0},
        {"momentum": 0.9, "dampening": 1.5, "weight_decay": 0.1},
        {"momentum": 1.0},
        {"weight_decay": -0.05, "momentum": 0.9},
        {"momentum": -0.5, "weight_decay": 0.1},
        {"lr": -0.01, "momentum": 0.5, "weight_decay": 0.1},
        {"lr": 0.0, "momentum": 0.5, "weight_decay": 0.1},
        {"lr": 1},
        {"lr": np.float64(0.01)},
        {"momentum": True},
        {"lr": 1e-300, "momentum": 0.9},
        {"weight_decay": 3.0, "lr": 0.3},
    ],
    ids=describe,
)
def test_options_edited_into_param_groups_equal_plain_loop(edits, shape):
    """Some of them SGD's constructor refuses; its step just computes with them."""
    problem = Problem.random(*SHAPES[shape])
    assert_trains_like_plain(dataclasses.replace(problem, edits=edits), plans=ANY_PLAN)


@each_plan
@each_dtype
def test_weight_and_bias_in_groups_with_other_options(shape, dtype):
    for weight_options, bias_options in itertools.permutations(
        (
            {"momentum": 0.0},
            {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
            {"momentum": 0.8, "nesterov": True, "maximize": True, "lr": 0.003},
        ),
        2,
    ):
        problem = Problem.random(*SHAPES[shape], dtype=dtype)
        problem = dataclasses.replace(
            problem,
            options={**problem.options, **weight_options},
            bias_options={"lr": 0.07, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
            | {"nesterov": False, "maximize": False}
            | bias_options,
        )
        assert_trains_like_plain(problem, plans=PLANS[shape])


@each_plan
def test_bias_group_listed_before_weight_group(shape):
    problem = Problem.random(*SHAPES[shape])
    model, loss_function, _ = problem.build()
    optimizer = torch.optim.SGD(
        [
            {"params": [model.bias], "lr": 0.0},
            {"params": [model.weight], "lr": 0.01, "momentum": 0.9},
        ]
    )
    step = fused_step.TrainStep(model, loss_function, optimizer)
    step(problem.input, problem.target)
    assert step.plan in PLANS[shape]
    assert torch.equal(model.bias, problem.bias)
    assert not torch.equal(model.weight, problem.weight)
    assert model.bias not in optimizer.state
    assert set(optimizer.state[model.weight]) == {"momentum_buffer"}


def is_read(lr: float | torch.Tensor) -> bool:
    """Whether a plan of the layer takes this learning rate; kernels of CUDA read float32 alone."""
    if not isinstance(lr, torch.Tensor):
        return True
    return lr.is_floating_point() if lr.device.type == "cpu" else lr.dtype == torch.float32


@each_plan
@pytest.mark.parametrize(
    "lr",
    [
        torch.tensor(0.1),
        torch.tensor([0.1]),
        torch.tensor([[0.1]], dtype=torch.float64),
        torch.tensor(1, dtype=torch.int64),
        torch.tensor(0.1, dtype=torch.bfloat16),
    ],
    ids=lambda lr: f"{lr.dtype}{list(lr.shape)}",
)
def test_learning_rate_tensor_has_its_own_value_to_the_last_bit(lr, shape):
    """A float32 0.1 is not the float 0.1: in float64 the rule tells them apart."""
    problem = Problem.random(*SHAPES[shape], dtype=torch.float64, options=MOMENTUM)
    problem = dataclasses.replace(problem, options={**problem.options, "lr": lr})
    assert_trains_like_plain(problem, plans=PLANS[shape] if is_read(lr) else ANY_PLAN)


@each_plan
def test_param_groups_are_read_anew_at_each_call(shape):
    """Options, the group's dict, the list of groups and the state may all change between calls."""
    problem = Problem.random(*SHAPES[shape])
    lr = problem.options["lr"]

    def train(dtype=None, fused=False):
        model, loss_function, optimizer = problem.build(dtype)
        x, t = problem.input.to(model.weight.dtype), problem.target.to(model.weight.dtype)
        step = functools.partial(plain_step, model, loss_function, optimizer)
        if fused:
            step = fused_step.TrainStep(model, loss_function, optimizer)
        found = [step(x, t)]
        optimizer.param_groups[0]["lr"] = lr / 3
        found.append(step(x, t))
        optimizer.param_groups[0]["momentum"] = 0.9
        found.append(step(x, t))
        found.append(step(x, t))
        optimizer.param_groups[0] = {**optimizer.param_groups[0], "weight_decay": 0.1}
        found.append(step(x, t))
        optimizer.param_groups = [{**optimizer.param_groups[0], "maximize": True}]
        found.append(step(x, t))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        found.append(step(x, t))
        optimizer.param_groups[0]["nesterov"] = True
        found.append(step(x, t))
        optimizer.param_groups[0]["momentum"] = 0.0
        found.append(step(x, t))
        optimizer.param_groups[0]["momentum"] = 0.5
        found.append(step(x, t))
        optimizer.state.clear()
        found.append(step(x, t))
        loss_function.reduction = "sum"
        optimizer.param_groups[0]["lr"] = lr / 1000
        found.append(step(x, t))
        buffer = optimizer.state[model.weight]["momentum_buffer"]
        if fused:
            assert step.plan in PLANS[shape]
        return [*found, model.weight.detach(), model.bias.detach(), buffer]

    scale = scales(dataclasses.replace(problem, edits={"momentum": 0.9, "weight_decay": 0.1}), 12)
    # The sum is count times the mean.
    scale["loss of step 11"] *= problem.target.numel()
    scale["weight_buffer"] *= problem.target.numel()
    names = [f"loss of step {i}" for i in range(12)] + ["weight", "bias", "weight_buffer"]
    for name, ours, same_dtype, exact in zip(
        names, train(fused=True), train(), train(torch.float64), strict=True
    ):
        assert_within_rule(name, ours, same_dtype, exact, scale[name])


def test_learning_rate_tensor_changed_in_place_counts_at_the_next_step():
    problem = Problem.random(37, 13, 3)
    lr = torch.tensor(0.0)
    model, loss_function, _ = problem.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    step = fused_step.TrainStep(model, loss_function, optimizer)
    for _ in range(3):
        step(problem.input, problem.target)
        assert step.plan in ONE_PASS
        assert torch.equal(model.weight, problem.weight)
    lr.fill_(0.1)
    step(problem.input, problem.target)
    assert not torch.equal(model.weight, problem.weight)


def test_keywords_of_a_partial_loss_changed_in_place_count_at_the_next_step():
    problem = Problem.random(37, 13, 3)
    model, _, optimizer = problem.build()
    loss_function = functools.partial(F.mse_loss, reduction="mean")
    step = fused_step.TrainStep(model, loss_function, optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    mean = [step(problem.input, problem.target) for _ in range(3)][-1]
    loss_function.keywords["reduction"] = "sum"
    summed = step(problem.input, problem.target)
    assert step.plan in ONE_PASS
    torch.testing.assert_close(summed, mean * problem.target.numel())
    loss_function.keywords["reduction"] = "none"
    with pytest.raises(RuntimeError, match="scalar outputs"):
        step(problem.input, problem.target)
    assert step.plan == "optimizer"


@each_plan
def test_step_leaves_parameters_unchanged_when_lr_is_zero(shape):
    problem = Problem.random(*SHAPES[shape], options={**MOMENTUM, "lr": 0.0})
    ours = assert_trains_like_plain(problem, plans=PLANS[shape])
    assert torch.equal(ours.weight, problem.weight)
    assert torch.equal(ours.bias, problem.bias)


@each_plan
@pytest.mark.parametrize("present", ["weight", "bias", "neither"])
@pytest.mark.parametrize("absent", ["missing", "None"])
def test_only_some_momentum_buffers_exist(shape, present, absent):
    """The first step is each parameter's own: a buffer may be there for one and not the other."""
    problem = Problem.random(*SHAPES[shape], options={"momentum": 0.9, "dampening": 0.5})
    scale = scales(problem, 4)
    results = []
    for dtype, fused in ((None, True), (None, False), (torch.float64, False)):
        model, loss_function, optimizer = problem.build(dtype)
        for name, parameter in model.named_parameters():
            if name == present:
                buffer = torch.linspace(-1, 1, parameter.numel(), dtype=parameter.dtype)
                optimizer.state[parameter]["momentum_buffer"] = buffer.reshape(parameter.shape)
            elif absent == "None":
                optimizer.state[parameter]["momentum_buffer"] = None
        step = functools.partial(plain_step, model, loss_function, optimizer)
        if fused:
            step = fused_step.TrainStep(model, loss_function, optimizer)
        x, t = problem.input.to(model.weight.dtype), problem.target.to(model.weight.dtype)
        found = {f"loss of step {i}": step(x, t) for i in range(3)}
        if fused:
            assert step.plan in PLANS[shape]
        for name, parameter in model.named_parameters():
            found[name] = parameter.detach()
            found[f"{name}_buffer"] = optimizer.state[parameter]["momentum_buffer"]
        results.append(found)
    for name in results[0]:
        assert_within_rule(name, *(found[name] for found in results), scale[name] + 1)


# --- what a step leaves behind ------------------------------------------------------------------


@each_plan
def test_state_stays_empty_without_momentum(shape):
    problem = Problem.random(*SHAPES[shape], options={"weight_decay": 0.1, "dampening": 0.5})
    model, loss_function, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    step(problem.input, problem.target)
    assert step.plan in PLANS[shape]
    assert len(optimizer.state) == 0


@each_plan
def test_state_holds_only_the_momentum_buffer_of_each_parameter(shape):
    problem = Problem.random(*SHAPES[shape], options={"momentum": 0.9})
    model, loss_function, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    step(problem.input, problem.target)
    assert step.plan in PLANS[shape]
    assert list(optimizer.state) == [model.weight, model.bias]
    buffers = []
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert set(state) == {"momentum_buffer"}
        buffer = state["momentum_buffer"]
        assert type(buffer) is torch.Tensor
        assert buffer.shape == parameter.shape
        assert buffer.dtype == parameter.dtype
        assert buffer.is_contiguous()
        assert not buffer.requires_grad
        buffers.append(buffer)
    step(problem.input, problem.target)
    for parameter, buffer in zip(model.parameters(), buffers, strict=True):
        assert optimizer.state[parameter]["momentum_buffer"] is buffer


@each_plan
def test_other_entries_of_the_state_are_kept(shape):
    problem = Problem.random(*SHAPES[shape], options={"momentum": 0.9})
    model, loss_function, optimizer = problem.build()
    optimizer.state[model.weight]["note"] = "kept"
    step = fused_step.TrainStep(model, loss_function, optimizer)
    step(problem.input, problem.target)
    assert optimizer.state[model.weight]["note"] == "kept"
    assert "momentum_buffer" in optimizer.state[model.weight]


@each_plan
@each_dtype
def test_loss_is_a_detached_scalar_of_its_own(shape, dtype):
    problem = Problem.random(*SHAPES[shape], dtype=dtype)
    model, loss_function, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    assert step.plan is None
    before = F.mse_loss(model(problem.input), problem.target).item()
    first = step(problem.input, problem.target)
    assert step.plan in PLANS[shape]
    assert type(first) is torch.Tensor
    assert first.shape == ()
    assert first.dtype == dtype
    assert not first.requires_grad
    assert first.is_leaf
    assert first.item() == pytest.approx(before, rel=1e-5)
    kept = first.clone()
    second = step(problem.input, problem.target)
    assert second.item() < first.item()
    assert torch.equal(first, kept)
    first.add_(1)  # an ordinary tensor, not one of inference mode
    assert torch.equal(second, second.clone())
    assert first.data_ptr() != second.data_ptr()


@each_plan
def test_step_bumps_version_counters_of_all_it_writes_and_of_nothing_else(shape):
    problem = Problem.random(*SHAPES[shape], options={"momentum": 0.9})
    model, loss_function, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    step(problem.input, problem.target)
    written = [*model.parameters(), *(s["momentum_buffer"] for s in optimizer.state.values())]
    read = [problem.input, problem.target]
    assert len(written) == 4
    before = [t._version for t in written]
    untouched = [t._version for t in read]
    step(problem.input, problem.target)
    assert step.plan in PLANS[shape]
    assert all(t._version > version for t, version in zip(written, before, strict=True))
    assert [t._version for t in read] == untouched


@each_plan
def test_backward_through_weights_of_before_the_step_raises(shape):
    problem = Problem.random(*SHAPES[shape])
    model, loss_function, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    stale = model(problem.input.clone().requires_grad_()).sum()
    step(problem.input, problem.target)
    assert step.plan in PLANS[shape]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@each_plan
def test_input_and_target_are_not_written(shape):
    problem = Problem.random(*SHAPES[shape])
    x, t = problem.input.clone(), problem.target.clone()
    assert_trains_like_plain(problem, plans=PLANS[shape])
    assert torch.equal(problem.input, x)
    assert torch.equal(problem.target, t)


@each_plan
def test_explain_names_the_plan_and_changes_nothing(shape):
    problem = Problem.random(*SHAPES[shape], options=MOMENTUM)
    model, loss_function, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    versions = [p._version for p in model.parameters()]
    said = step.explain(problem.input, problem.target)
    assert PLANS[shape][0] in said
    assert step.plan is None
    assert torch.equal(model.weight, problem.weight)
    assert [p._version for p in model.parameters()] == versions
    assert len(optimizer.state) == 0
    step(problem.input, problem.target)
    assert step.plan == PLANS[shape][0]


# --- models and losses --------------------------------------------------------------------------


@each_plan
@pytest.mark.parametrize("depth", [1, 2])
def test_sequential_of_one_linear_is_fused(shape, depth):
    problem = Problem.random(*SHAPES[shape], options=MOMENTUM)
    linear, loss_function, optimizer = problem.build()
    model = linear
    for _ in range(depth):
        model = nn.Sequential(model)
    step = fused_step.TrainStep(model, loss_function, optimizer)
    step(problem.input, problem.target)
    assert step.plan in PLANS[shape]
    assert_within_rule(
        "weight",
        linear.weight.detach(),
        train_plain(problem, 1).weight,
        train_plain(problem, 1, torch.float64).weight,
        scales(problem, 1)["weight"],
    )


class Positional:
    """A loss that is a bound method: nothing that is recognised."""

    def loss(self, output, target):
        return F.mse_loss(output, target, reduction="sum")


@pytest.mark.parametrize(
    ("loss_function", "reduction", "plans"),
    [
        (nn.MSELoss(), "mean", ONE_PASS),
        (nn.MSELoss(reduction="sum"), "sum", ONE_PASS),
        (F.mse_loss, "mean", ONE_PASS),
        (functools.partial(F.mse_loss), "mean", ONE_PASS),
        (functools.partial(F.mse_loss, reduction="mean"), "mean", ONE_PASS),
        (functools.partial(F.mse_loss, reduction="sum"), "sum", ONE_PASS),
        (
            functools.partial(functools.partial(F.mse_loss, reduction="mean"), reduction="sum"),
            "sum",
            ONE_PASS,
        ),
        (lambda output, target: F.mse_loss(output, target), "mean", ONE_PASS),
        (Positional().loss, "sum", ("optimizer",)),
    ],
    ids=["MSELoss", "MSELoss sum", "F", "partial", "mean", "sum", "nested", "lambda", "method"],
)
def test_loss_functions_that_are_recognised(loss_function, reduction, plans):
    problem = Problem.random(37, 13, 3, reduction=reduction)
    model, _, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    loss = step(problem.input, problem.target)
    assert step.plan in plans
    same_dtype = train_plain(problem, 1)
    exact = train_plain(problem, 1, torch.float64)
    scale = scales(problem, 1)
    assert_within_rule("loss", loss, same_dtype.losses[0], exact.losses[0], scale["loss of step 0"])
    assert_within_rule(
        "weight", model.weight.detach(), same_dtype.weight, exact.weight, scale["weight"]
    )


@each_plan
@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (2, 3, 7), (1, 1, 1), (5, 1, 9), (3, 0, 2)])
def test_leading_dimensions_are_rows(shape, leading):
    _, I, O = SHAPES[shape]
    B = int(np.prod(leading))
    for reduction in ("mean", "sum"):
        problem = Problem.random(B, I, O, reduction=reduction, options=MOMENTUM)
        problem = dataclasses.replace(
            problem,
            input=problem.input.reshape(*leading, I),
            target=problem.target.reshape(*leading, O),
        )
        assert_trains_like_plain(problem, plans=ANY_PLAN if B == 0 else FUSED_PLANS)


# --- layouts ------------------------------------------------------------------------------------

LAYOUTS = (
    "contiguous",
    "offset",
    "column slice",
    "every second row",
    "every second column",
    "transposed",
    "expanded rows",
    "expanded columns",
    "reversed copy",
)


def laid_out(a: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of `a` [B, N] in another layout; all memory around them is NaN.

    The expanded ones have values of their own: those of the first row or column.
    """
    B, N = a.shape
    nan = functools.partial(torch.full, fill_value=float("nan"), dtype=a.dtype)
    if layout == "offset":  # in turn at every misalignment against a vector
        offset = 1 + (B + N) % 15
        found = nan((B * N + offset + 16,))[offset : offset + B * N].view(B, N)
    elif layout == "column slice":
        found = nan((B + 2, N + 5))[1 : B + 1, 3 : N + 3]
    elif layout == "every second row":
        found = nan((2 * B + 1, N))[1::2]
    elif layout == "every second column":
        found = nan((B, 2 * N + 1))[:, 1::2]
    elif layout == "transposed":
        found = nan((N, B)).T
    elif layout == "expanded rows":
        return a[:1].clone().expand(B, N)
    elif layout == "expanded columns":
        return a[:, :1].clone().expand(B, N)
    elif layout == "reversed copy":
        found = nan((B, N)).flip(0)
    else:
        found = nan((B, N))
    found.copy_(a)
    return found


@each_dtype
@each_plan
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_input_and_target(shape, layout, dtype):
    B, I, O = SHAPES[shape]
    for B_ in (B, 4 * B + 3):
        problem = Problem.random(B_, I, O, dtype=dtype, options=MOMENTUM)
        for input_layout, target_layout in (
            (layout, "contiguous"),
            ("contiguous", layout),
            (layout, layout),
        ):
            varied = dataclasses.replace(
                problem,
                input=laid_out(problem.input, input_layout),
                target=laid_out(problem.target, target_layout),
            )
            assert_trains_like_plain(varied.stable(), plans=PLANS[shape])


@pytest.mark.parametrize("O", [1, 5, 130])
def test_strided_batches_in_three_dimensions(O):
    problem = Problem.random(6 * 7, 13, O)
    x = laid_out(problem.input, "column slice").unflatten(0, (6, 7))
    t = laid_out(problem.target, "every second row").unflatten(0, (6, 7))
    problem = dataclasses.replace(problem, input=x, target=t)
    assert_trains_like_plain(problem, plans=FUSED_PLANS)
    swapped = dataclasses.replace(problem, input=x.transpose(0, 1), target=t.transpose(0, 1))
    assert_trains_like_plain(swapped, plans=FUSED_PLANS)


@pytest.mark.parametrize("O", [1, 5])
def test_first_columns_and_rows_of_one_tensor_as_input_and_target(O):
    """The usual table: the last columns are the targets. Nothing of it is written."""
    table = torch.randn(50, 13 + O)
    kept = table.clone()
    problem = Problem.random(50, 13, O)
    problem = dataclasses.replace(problem, input=table[:, :13], target=table[:, 13:])
    assert_trains_like_plain(problem, plans=ONE_PASS)
    assert torch.equal(table, kept)


GUARD = 24576.0  # which every dtype holds


def guarded(a: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of `a` inside a larger buffer of guard words, and the buffer."""
    buffer = torch.full((offset + a.numel() + 32,), GUARD, dtype=a.dtype)
    inside = buffer[offset : offset + a.numel()].view(a.shape)
    inside.copy_(a)
    return inside, buffer


@each_dtype
@each_plan
@pytest.mark.parametrize("offset", [1, 2, 3, 5, 8, 13, 16])
def test_nothing_is_written_around_parameters_and_buffers(shape, offset, dtype):
    """Parameters and momentum buffers sit misaligned between guard words, and stay fused."""
    for I in (SHAPES[shape][1], 16, 17):
        problem = Problem.random(
            SHAPES[shape][0], I, SHAPES[shape][2], dtype=dtype, options=MOMENTUM
        )
        model, loss_function, _ = problem.build()
        buffers = []
        for parameter in model.parameters():
            parameter.data, buffer = guarded(parameter.data, offset)
            buffers.append((buffer, parameter.numel()))
        optimizer = torch.optim.SGD(model.parameters(), **problem.options)
        for parameter in model.parameters():
            momentum, buffer = guarded(torch.zeros_like(parameter), offset)
            optimizer.state[parameter]["momentum_buffer"] = momentum
            buffers.append((buffer, parameter.numel()))
        step = fused_step.TrainStep(model, loss_function, optimizer)
        for _ in range(2):
            step(problem.input, problem.target)
        assert step.plan in PLANS[shape]
        for buffer, size in buffers:
            assert (buffer[:offset] == GUARD).all()
            assert (buffer[offset + size :] == GUARD).all()
            assert (buffer[offset : offset + size] != GUARD).all()
        # A zero buffer averaged without dampening is the gradient itself: as a first step.
        same_dtype, exact = train_plain(problem, 2), train_plain(problem, 2, torch.float64)
        for name in ("weight", "bias"):
            assert_within_rule(
                name,
                getattr(model, name).detach(),
                getattr(same_dtype, name),
                getattr(exact, name),
                scales(problem, 2)[name],
            )


@each_plan
def test_parameters_and_buffers_side_by_side_in_one_storage(shape):
    problem = Problem.random(*SHAPES[shape], options=MOMENTUM)
    model, loss_function, _ = problem.build()
    total = sum(p.numel() for p in model.parameters())
    flat = torch.zeros(2 * total)
    first = 0
    pieces = []
    for parameter in (*model.parameters(), *model.parameters()):
        pieces.append(flat[first : first + parameter.numel()].view(parameter.shape))
        first += parameter.numel()
    optimizer = torch.optim.SGD(model.parameters(), **problem.options)
    for index, parameter in enumerate(model.parameters()):
        pieces[index].copy_(parameter.data)
        parameter.data = pieces[index]
        optimizer.state[parameter]["momentum_buffer"] = pieces[2 + index]
    step = fused_step.TrainStep(model, loss_function, optimizer)
    for _ in range(2):
        step(problem.input, problem.target)
    same_dtype, exact = train_plain(problem, 2), train_plain(problem, 2, torch.float64)
    for name in ("weight", "bias"):
        assert_within_rule(
            name,
            getattr(model, name).detach(),
            getattr(same_dtype, name),
            getattr(exact, name),
            scales(problem, 2)[name],
        )


# --- the world changes between calls ------------------------------------------------------------


@each_plan
def test_storage_behind_the_same_parameter_is_exchanged(shape):
    """`.data =` and model.double() keep the Parameter object and change what is behind it."""
    problem = Problem.random(*SHAPES[shape], options={"weight_decay": 0.01})
    ours, loss_function, optimizer = problem.build()
    twin, _, twin_optimizer = problem.build()
    step = fused_step.TrainStep(ours, loss_function, optimizer)
    x, t = problem.input, problem.target
    step(x, t)
    plain_step(twin, loss_function, twin_optimizer, x, t)
    left = ours.weight.data
    kept = left.clone()
    ours.weight.data = twin.weight.data = problem.weight * 2
    ours.weight.data = ours.weight.data.clone()
    step(x, t)
    plain_step(twin, loss_function, twin_optimizer, x, t)
    assert torch.equal(left, kept)  # the old storage is no longer written
    torch.testing.assert_close(ours.weight, twin.weight)
    ours.double()
    twin.double()
    loss = step(x.double(), t.double())
    assert loss.dtype == torch.float64
    assert step.plan in PLANS[shape]
    plain_step(twin, loss_function, twin_optimizer, x.double(), t.double())
    torch.testing.assert_close(ours.weight, twin.weight, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="same dtype"):
        step(x, t)


@each_plan
def test_model_loaded_with_assign_and_a_new_optimizer(shape):
    problem = Problem.random(*SHAPES[shape])
    model, loss_function, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    step(problem.input, problem.target)
    old = model.weight
    kept = old.detach().clone()
    model.load_state_dict(
        {"weight": problem.weight.clone(), "bias": problem.bias.clone()}, assign=True
    )
    # The optimizer still holds the old parameters: the plain loop moves nothing.
    step(problem.input, problem.target)
    assert step.plan == "head"
    assert torch.equal(model.weight, problem.weight)
    assert torch.equal(old, kept)
    model.zero_grad()
    optimizer.param_groups[0]["params"] = list(model.parameters())
    step(problem.input, problem.target)
    assert step.plan in PLANS[shape]
    assert not torch.equal(model.weight, problem.weight)
    assert torch.equal(old, kept)


def test_batches_of_all_sizes_through_one_step():
    """Whatever is cached for one size must not be used for another."""
    B, I = 64, 11
    problem = Problem.random(B, I, 3, options=MOMENTUM)
    results = []
    for dtype, fused in ((None, True), (None, False), (torch.float64, False)):
        model, loss_function, optimizer = problem.build(dtype)
        step = functools.partial(plain_step, model, loss_function, optimizer)
        if fused:
            step = fused_step.TrainStep(model, loss_function, optimizer)
        x, t = problem.input.to(model.weight.dtype), problem.target.to(model.weight.dtype)
        results.append([step(x[:n], t[:n]) for n in (64, 1, 33, 2, 64, 7, 50)])
        results[-1].append(model.weight.detach())
    scale = scales(problem, 7)
    # Seven rows are taken for the mean where the scale took 64.
    for number, (ours, same_dtype, exact) in enumerate(zip(*results, strict=True)):
        size = scale["weight"] if number == 7 else scale["loss of step 6"]
        assert_within_rule(f"result {number}", ours, same_dtype, exact, 64 * size)


def test_eval_mode_and_grad_mode_settings_do_not_matter():
    problem = Problem.random(37, 13, 2)
    model, loss_function, optimizer = problem.build()
    model.eval()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    with torch.enable_grad():
        step(problem.input, problem.target)
    assert step.plan in ONE_PASS
    assert not torch.equal(model.weight, problem.weight)


def test_default_dtype_does_not_matter():
    problem = Problem.random(37, 13, 2, options={"momentum": 0.9})
    torch.set_default_dtype(torch.float64)
    try:
        assert_trains_like_plain(problem, plans=ONE_PASS)
    finally:
        torch.set_default_dtype(torch.float32)


# --- data that is not finite, or not there ------------------------------------------------------


@each_dtype
@each_plan
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["input", "target", "weight", "bias"])
@pytest.mark.parametrize("options", [{}, MOMENTUM], ids=describe)
def test_nan_and_infinity_flow_through_as_in_pytorch(where, value, shape, options, dtype):
    problem = Problem.random(*SHAPES[shape], dtype=dtype, options=options)
    poisoned = getattr(problem, where).clone()
    poisoned.view(-1)[poisoned.numel() // 2] = value
    problem = dataclasses.replace(problem, **{where: poisoned})
    same_dtype = train_plain(problem, 1)
    assert not same_dtype.losses[0].isfinite()
    assert_trains_like_plain(problem, steps=1, plans=PLANS[shape])


@each_plan
def test_nan_in_one_target_reaches_only_its_output(shape):
    problem = Problem.random(*SHAPES[shape])
    O = problem.weight.shape[0]
    problem.target[5, O - 1] = float("nan")
    ours = assert_trains_like_plain(problem, steps=1, plans=PLANS[shape])
    assert ours.weight[O - 1].isnan().all()
    assert ours.weight[: O - 1].isfinite().all()


@each_plan
def test_overflow_of_the_loss_is_infinite_as_in_pytorch(shape):
    problem = Problem.random(*SHAPES[shape], options={"lr": 1e-30})
    problem = dataclasses.replace(problem, target=problem.target.sign() * 3e20)
    assert train_plain(problem, 1).losses[0].isinf()
    assert_trains_like_plain(problem, steps=1, plans=PLANS[shape])


@each_dtype
@pytest.mark.parametrize("O", [1, 3, 130])
@pytest.mark.parametrize("options", OPTION_SETS, ids=describe)
def test_empty_batch_moves_by_decay_and_momentum_only(O, options, dtype):
    for reduction, bias in itertools.product(("mean", "sum"), (True, False)):
        problem = Problem.random(0, 5, O, dtype=dtype, reduction=reduction, bias=bias)
        problem = dataclasses.replace(problem, options={"lr": 0.1, **options})
        ours = assert_trains_like_plain(problem, plans=ANY_PLAN)
        assert all(loss.isnan() if reduction == "mean" else loss == 0 for loss in ours.losses)
        moved = not torch.equal(ours.weight, problem.weight)
        assert moved == (options["weight_decay"] != 0)
        assert ours.weight.isfinite().all()


@each_plan
def test_empty_batch_after_full_ones_moves_by_momentum(shape):
    problem = Problem.random(*SHAPES[shape])
    results = []
    for dtype, fused in ((None, True), (None, False), (torch.float64, False)):
        model, loss_function, optimizer = problem.build(dtype)
        optimizer.param_groups[0].update(momentum=0.9, weight_decay=0.1)
        step = functools.partial(plain_step, model, loss_function, optimizer)
        if fused:
            step = fused_step.TrainStep(model, loss_function, optimizer)
        x, t = problem.input.to(model.weight.dtype), problem.target.to(model.weight.dtype)
        step(x, t)
        before = model.weight.detach().clone()
        assert step(x[:0], t[:0]).isnan()
        assert not torch.equal(model.weight, before)
        results.append(model.weight.detach())
    edited = dataclasses.replace(problem, edits={"momentum": 0.9, "weight_decay": 0.1})
    assert_within_rule("weight", *results, scales(edited, 2)["weight"])


@each_dtype
@pytest.mark.parametrize("O", [1, 3, 130])
@pytest.mark.parametrize("options", OPTION_SETS, ids=describe)
def test_no_features_trains_the_bias_alone(O, options, dtype):
    for reduction in ("mean", "sum"):
        problem = Problem.random(37, 0, O, dtype=dtype, reduction=reduction, options=options)
        ours = assert_trains_like_plain(problem, plans=ANY_PLAN)
        assert ours.weight.shape == (O, 0)
        assert not torch.equal(ours.bias, problem.bias)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_outputs_equals_plain_loop(reduction):
    problem = Problem.random(7, 5, 0, reduction=reduction)
    assert_trains_like_plain(problem, plans=ANY_PLAN)


# --- bits ---------------------------------------------------------------------------------------

# Large enough for more than one thread: more than 32k multiply-adds a thread.
THREADED = [(4096, 64, 1), (2048, 64, 3), (1500, 100, 8), (3, 40_000, 1), (50_000, 3, 2)]


@pytest.mark.cpu_only("threads of torch")
@each_dtype
@pytest.mark.parametrize(("B", "I", "O"), THREADED)
def test_one_pass_has_the_same_bits_on_one_and_two_threads(B, I, O, dtype):
    problem = Problem.random(B, I, O, dtype=dtype, options=MOMENTUM)
    found = []
    for threads in (1, 2, 2, 1):
        torch.set_num_threads(threads)
        found.append(assert_trains_like_plain(problem, steps=2, plans=FUSED_PLANS))
        if B >= 32:
            assert found[-1].plans == ["one-pass"] * 2
    for other in found[1:]:
        for (name, a), (_, b) in zip(found[0].tensors(), other.tensors(), strict=True):
            assert same_bits(a, b), name


@each_plan
@each_dtype
def test_same_bits_from_run_to_run(shape, dtype):
    B, I, O = SHAPES[shape]
    problem = Problem.random(40 * B, I, O, dtype=dtype, options=MOMENTUM)
    first = assert_trains_like_plain(problem, plans=PLANS[shape])
    for _ in range(3):
        again = assert_trains_like_plain(problem, plans=PLANS[shape])
        for (name, a), (_, b) in zip(first.tensors(), again.tensors(), strict=True):
            assert same_bits(a, b), name


@pytest.mark.parametrize("O", [1, 3, 8] if DEVICE.type == "cpu" else [1, 3])
def test_one_pass_has_the_same_bits_in_every_layout(O):
    """The order of summation depends on the sizes alone, not on where the data lie."""
    problem = Problem.random(301, 29, O, options=MOMENTUM)
    first = assert_trains_like_plain(problem, plans=ONE_PASS)
    for layout in ("offset", "column slice", "every second row"):
        moved = dataclasses.replace(problem, input=laid_out(problem.input, layout))
        again = assert_trains_like_plain(moved, plans=ONE_PASS)
        assert torch.equal(first.weight, again.weight), layout
        assert torch.equal(first.losses[-1], again.losses[-1]), layout


# --- weight decay too small for one rounding -----------------------------------------------------


def test_small_weight_decay_is_achieved_over_4000_steps():
    """lr · wd below the rounding of a float32 factor 1 − lr · wd, on the gemm plan.

    What decay achieved is how far the weights of two runs, with and without it, are apart, seen
    along the weights. The gradients' noise moves every weight by many units in the last place a
    step, so that rounding is unbiased; what is left of it after T steps is a random walk of
    eps/2 · √(T / 3) per element, averaged over the elements.
    """
    B, I, O, T, lr = 32, 48, 128, 4000, 1e-3
    decays = (1e-8, 1e-6)
    problem = Problem.random(B, I, O, bias=False)
    batches = 4
    x = torch.randn(batches, B, I)
    t = x @ problem.weight.T + torch.randn(batches, B, O)

    def weights(kind: str, weight_decay: float) -> torch.Tensor:
        used = dataclasses.replace(problem, options={"lr": lr, "weight_decay": weight_decay})
        model, loss_function, optimizer = used.build(torch.float64 if kind == "exact" else None)
        step = functools.partial(plain_step, model, loss_function, optimizer)
        if kind == "ours":
            step = fused_step.TrainStep(model, loss_function, optimizer)
        data = [
            (a.to(model.weight.dtype), b.to(model.weight.dtype)) for a, b in zip(x, t, strict=True)
        ]
        for number in range(T):
            step(*data[number % batches])
        if kind == "ours":
            assert step.plan == "gemm"
        return model.weight.detach().double()

    W = problem.weight.double()
    achieved = {}  # relative to the weights, for each kind of run and each decay
    for kind in ("exact", "plain", "ours"):
        without = weights(kind, 0.0)
        for decay in decays:
            apart = without - weights(kind, decay / lr)
            achieved[kind, decay] = float((apart * W).sum() / W.square().sum())

    # Two runs, and four standard deviations of the mean of I · O random walks.
    scale = 4 * (2 * T / 3) ** 0.5 / 2 / (I * O) ** 0.5
    for decay in decays:
        exact, plain, ours = (achieved[kind, decay] for kind in ("exact", "plain", "ours"))
        assert exact == pytest.approx(T * decay, rel=0.1)
        allowed = 2 * abs(plain - exact) + torch.finfo(torch.float32).eps * scale
        assert abs(ours - exact) <= allowed, (
            f"lr · wd = {decay}: achieved {ours / exact:.3f}, the plain loop {plain / exact:.3f}"
        )
        assert allowed < 0.2 * exact  # the rule is able to tell


@pytest.mark.parametrize(
    ("B", "I", "O"), [(40, 11, 130), (4096, 64, 128), (4096, 300, 128), (4096, 64, 3)]
)
def test_updates_of_a_few_units_in_the_last_place_are_not_lost(B, I, O):
    """An update has to reach the weights in one addition.

    The contributions of all rows add up to a few units in the last place of a weight; that of one
    row, or of a block of them, is below half a unit and would be rounded away if it were added by
    itself. What an update achieved is its projection on the exact one. A rounded weight is off by
    1/√12 units at random, and that is averaged over all elements.
    """
    problem = Problem.random(B, I, O, bias=False)
    problem = dataclasses.replace(problem, weight=problem.weight.abs() + 1)
    lr = problem.stable().options["lr"] * 1e-6
    problem = dataclasses.replace(problem, options={"lr": lr})
    before = problem.weight.double()
    exact = train_plain(problem, 1, torch.float64).weight - before
    in_units = exact / (before * torch.finfo(torch.float32).eps)
    assert 1 < in_units.abs().median() < 100

    def achieved(weight: torch.Tensor) -> float:
        return float(((weight.double() - before) * exact).sum() / exact.square().sum())

    plain = achieved(train_plain(problem, 1).weight)
    ours = achieved(train_fused(problem, 1).weight)
    noise = (1 / 12) ** 0.5 / float(in_units.square().mean().sqrt()) / exact.numel() ** 0.5
    allowed = 2 * abs(plain - 1) + 4 * noise
    assert allowed < 0.1  # the rule is able to tell
    assert abs(ours - 1) <= allowed, (
        f"achieved {ours:.3f} of the update, the plain loop {plain:.3f}"
    )


# --- anything together --------------------------------------------------------------------------


@st.composite
def problems(draw):
    """Any shape, dtype, layout, reduction and options of a problem that is to be fused."""
    B, I = draw(st.integers(0, 70)), draw(st.integers(0, 40))
    O = draw(st.one_of(st.integers(1, 9), st.sampled_from((16, 33, 128, 131))))
    dtype = draw(st.sampled_from(DTYPES))
    problem = Problem.random(
        B,
        I,
        O,
        dtype=dtype,
        bias=draw(st.booleans()),
        reduction=draw(st.sampled_from(("mean", "sum"))),
        seed=draw(st.integers(0, 3)),
    )
    options = draw(st.sampled_from(OPTION_SETS))
    if options["momentum"]:
        options = {**options, "momentum": draw(st.sampled_from((0.5, 0.9, 0.99)))}
    if options["weight_decay"]:
        options = {**options, "weight_decay": draw(st.sampled_from((1e-8, 1e-4, 0.3)))}
    layouts = st.sampled_from(LAYOUTS) if B and I else st.just("contiguous")
    problem = dataclasses.replace(
        problem,
        input=laid_out(problem.input, draw(layouts)),
        target=laid_out(problem.target, draw(layouts)),
    )
    lr = problem.stable().options["lr"]
    if draw(st.booleans()):
        lr = torch.tensor(lr, dtype=draw(st.sampled_from(DTYPES)))
    return dataclasses.replace(
        problem,
        options={"lr": lr, **options},
        bias_options=draw(st.sampled_from((None, {"weight_decay": 0.0}, {"lr": lr * 0.5}))),
    )


@settings(max_examples=150)
@given(problem=problems(), steps=st.integers(1, 4))
def test_any_problem_trains_like_plain_loop(problem, steps):
    B, I = problem.input.shape
    is_fused = B and I and is_read(problem.options["lr"])
    assert_trains_like_plain(problem, steps, plans=FUSED_PLANS if is_fused else ANY_PLAN)


# --- threads ------------------------------------------------------------------------------------


def test_two_steps_in_two_threads_do_not_disturb_each_other():
    jobs = [
        Problem.random(2048, 64, 3, options=MOMENTUM),
        Problem.random(1000, 65, 1, options={"momentum": 0.5}),
    ]
    expected = [assert_trains_like_plain(problem, steps=40, plans=ONE_PASS) for problem in jobs]
    found: list = [None, None]
    start = threading.Barrier(2)

    def work(index: int) -> None:
        start.wait()
        model, loss_function, optimizer = jobs[index].build()
        step = fused_step.TrainStep(model, loss_function, optimizer)
        for _ in range(40):
            step(jobs[index].input, jobs[index].target)
        found[index] = (step.plan, model.weight.detach())

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (plan, weight), trained in zip(found, expected, strict=True):
        assert plan in ONE_PASS
        assert torch.equal(weight, trained.weight)


# --- construction -------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["model", "loss_function", "optimizer"])
def test_constructor_refuses_what_cannot_be_called_or_stepped(argument):
    model, loss_function, optimizer = Problem.random(3, 2, 1).build()
    arguments = {"model": model, "loss_function": loss_function, "optimizer": optimizer}
    with pytest.raises(TypeError, match=f"TrainStep: {argument} must be"):
        fused_step.TrainStep(**{**arguments, argument: "something else"})


def test_deepcopy_of_model_and_optimizer_trains_apart_from_the_original():
    problem = Problem.random(37, 13, 3, options=MOMENTUM)
    model, loss_function, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    step(problem.input, problem.target)
    copied_model, copied_optimizer = copy.deepcopy((model, optimizer))
    kept = model.weight.detach().clone()
    copied = fused_step.TrainStep(copied_model, loss_function, copied_optimizer)
    copied(problem.input, problem.target)
    assert copied.plan in ONE_PASS
    assert torch.equal(model.weight, kept)
    step(problem.input, problem.target)
    assert torch.equal(model.weight, copied_model.weight)
    for original, other in zip(model.parameters(), copied_model.parameters(), strict=True):
        assert torch.equal(
            optimizer.state[original]["momentum_buffer"],
            copied_optimizer.state[other]["momentum_buffer"],
        )


@pytest.mark.parametrize("sizes", [(37, 13, 1), (37, 13, 131)], ids=["one-pass", "gemm"])
def test_the_profiler_sees_steps_and_what_they_call(sizes):
    problem = Problem.random(*sizes)
    step = fused_step.TrainStep(*problem.build())
    step(problem.input, problem.target)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(problem.input, problem.target)
        assert step.plan in FUSED_PLANS
        step.run(problem.input, problem.target, epochs=2, batch_size=sizes[0])
        assert step.plan in FUSED_PLANS
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["TrainStep.step"] == counts["TrainStep.run"] == 1
    if step.plan == "gemm":
        parents = {e.cpu_parent.name for e in profile.events() if e.name == "aten::mm"}
        assert parents == {"TrainStep.step", "TrainStep.run"}


def test_the_profiler_sees_the_loss_of_a_head():
    model = nn.Sequential(nn.Linear(13, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step = fused_step.TrainStep(model, nn.MSELoss(), optimizer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(torch.randn(7, 13), torch.randn(7, 1))
    assert step.plan == "head"
    assert [event.count for event in profile.key_averages() if event.key == "TrainStep.loss"] == [1]
