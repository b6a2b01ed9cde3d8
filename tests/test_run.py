# SPDX-License-Identifier: MIT
"""TrainStep.run equals the loop of steps that it stands for."""

from __future__ import annotations

import builtins
import dataclasses
import functools
import itertools
import math
import subprocess
import sys
import textwrap
import threading
import time

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from oracle import (
    DTYPES,
    FEW_OUTPUTS,
    GEMM,
    ONE_PASS,
    OPTION_SETS,
    Problem,
    Trained,
    assert_within_rule,
    describe,
    plain_run,
    plain_step,
    same_bits,
    scales,
)
from torch import nn

import fused_step

MOMENTUM = {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}
SHAPES = {"one output": (101, 13, 1), "few outputs": (90, 21, 6), "many outputs": (111, 19, 131)}
PLANS = {"one output": ONE_PASS, "few outputs": FEW_OUTPUTS, "many outputs": GEMM}
each_shape = pytest.mark.parametrize("shape", SHAPES)


def train(problem: Problem, how: str, *, dtype=None, generator_seed=None, **arguments):
    """Trains by "run", by the "loop of steps" or by the "plain" loop, with run's arguments."""
    model, loss_function, optimizer = problem.build(dtype)
    inputs, targets = (a.to(model.weight.dtype) for a in (problem.input, problem.target))
    if generator_seed is not None:
        arguments["generator"] = torch.Generator().manual_seed(generator_seed)
    trained = Trained()
    if how == "plain":
        losses = plain_run(model, loss_function, optimizer, inputs, targets, **arguments)
    else:
        step = fused_step.TrainStep(model, loss_function, optimizer)
        if how == "run":
            losses = step.run(inputs, targets, **arguments)
        else:
            losses = plain_run(
                model, loss_function, optimizer, inputs, targets, step=step, **arguments
            )
        trained.plans.append(step.plan)
    assert losses.dim() == 1
    trained.losses = list(losses)
    return trained.take(model, optimizer)


def assert_same_bits(a: Trained, b: Trained) -> None:
    for (name, x), (_, y) in zip(a.tensors(), b.tensors(), strict=True):
        assert (x is None) == (y is None), name
        assert x is None or same_bits(x, y), name


def assert_runs_like_loop(problem: Problem, plans=(*ONE_PASS, *GEMM), **arguments) -> Trained:
    """Runs against the loop of steps, bit for bit if one-pass, and against the plain loop."""
    ours = train(problem, "run", **arguments)
    assert ours.plans[0] in plans
    loop = train(problem, "loop of steps", **arguments)
    if loop.plans == ours.plans and ours.plans[0] in ONE_PASS:
        assert_same_bits(ours, loop)
    same_dtype = train(problem, "plain", **arguments)
    exact = train(problem, "plain", dtype=torch.float64, **arguments)
    # Batches that are parts of the data have larger means; shuffled they differ from epoch to
    # epoch. The magnitudes of the sum over all rows bound those of each batch's sum.
    steps = len(ours.losses)
    n = max(problem.input.shape[0], 1)
    factor = n / min(arguments.get("batch_size") or n, n)
    scale = scales(problem, steps)
    for (name, a), (_, b), (_, c) in zip(
        ours.tensors(), same_dtype.tensors(), exact.tensors(), strict=True
    ):
        assert (a is None) == (b is None), name
        if a is not None:
            assert_within_rule(f"{problem} {arguments}: {name}", a, b, c, factor * scale[name])
    return ours


def slow(problem: Problem, factor: float = 0.1) -> Problem:
    """At a smaller rate: a batch of few rows has a larger curvature than all of them."""
    lr = problem.options["lr"] * factor
    return dataclasses.replace(problem, options={**problem.options, "lr": lr})


# --- equal to the loop --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTION_SETS, ids=describe)
@each_shape
def test_run_equals_loop_of_steps_for_every_option_set(shape, options, dtype):
    for bias, reduction in itertools.product((True, False), ("mean", "sum")):
        problem = Problem.random(
            *SHAPES[shape], dtype=dtype, bias=bias, reduction=reduction, options=options
        )
        assert_runs_like_loop(slow(problem), PLANS[shape], epochs=2, batch_size=40)


@each_shape
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 8, 32, 89, 90, 101, 110, 1000, None])
def test_every_batch_size_with_its_short_last_batch(shape, batch_size):
    problem = slow(Problem.random(*SHAPES[shape], options=MOMENTUM), 0.01)
    ours = assert_runs_like_loop(problem, epochs=2, batch_size=batch_size)
    n = problem.input.shape[0]
    assert len(ours.losses) == 2 * math.ceil(n / (batch_size or n))


@pytest.mark.parametrize("B", range(1, 18))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_runs_have_the_bits_of_the_loop_at_every_size(B, dtype):
    """The sizes of run's own small-case kernel: all that it keeps between steps is written back."""
    options = itertools.cycle(OPTION_SETS)
    for I, O in itertools.product((1, 2, 3, 4, 7, 8, 9, 13, 16, 17), (1, 2, 3, 8)):
        problem = slow(
            Problem.random(B, I, O, dtype=dtype, bias=(B + I) % 3 > 0, options=next(options))
        )
        arguments = {"epochs": 3, "batch_size": 1 + B // 2}
        ours, loop = (train(problem, how, **arguments) for how in ("run", "loop of steps"))
        assert_same_bits(ours, loop)


@each_shape
def test_epochs_count(shape):
    problem = Problem.random(*SHAPES[shape], options=MOMENTUM)
    assert len(assert_runs_like_loop(problem, PLANS[shape], epochs=7).losses) == 7


@each_shape
def test_run_after_steps_and_steps_after_run_continue_the_momentum(shape):
    problem = slow(Problem.random(*SHAPES[shape], options=MOMENTUM))
    found = []
    for by_run in (True, False):
        model, loss_function, optimizer = problem.build()
        step = fused_step.TrainStep(model, loss_function, optimizer)
        run = (
            step.run
            if by_run
            else functools.partial(plain_run, model, loss_function, optimizer, step=step)
        )
        losses = [step(problem.input, problem.target)[None]]
        losses.append(run(problem.input, problem.target, epochs=2, batch_size=50))
        losses.append(step(problem.input, problem.target)[None])
        losses.append(run(problem.input, problem.target, epochs=1))
        assert step.plan in PLANS[shape]
        trained = Trained(list(torch.cat(losses)))
        found.append(trained.take(model, optimizer))
    if PLANS[shape] == ONE_PASS:
        assert_same_bits(*found)
    else:
        torch.testing.assert_close(found[0].weight, found[1].weight)


@pytest.mark.parametrize(
    ("leading", "batch_size"), [((12, 5), 4), ((12, 5), 5), ((7, 2, 3), 2), ((9, 1), None)]
)
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("O", [1, 6, 130])
def test_samples_of_several_rows(leading, batch_size, shuffle, O):
    """n counts the first dimension only; a sample's rows stay together."""
    problem = slow(Problem.random(math.prod(leading), 9, O, options=MOMENTUM))
    problem = dataclasses.replace(
        problem,
        input=problem.input.reshape(*leading, 9),
        target=problem.target.reshape(*leading, O),
    )
    assert_runs_like_loop(
        problem, epochs=2, batch_size=batch_size, shuffle=shuffle, generator_seed=3
    )


@each_shape
@pytest.mark.parametrize("shuffle", [False, True])
def test_strided_inputs_and_targets(shape, shuffle):
    B, I, O = SHAPES[shape]
    table = torch.full((2 * B + 1, I + O + 5), float("nan"))
    problem = slow(Problem.random(B, I, O, options=MOMENTUM))
    inputs, targets = table[1::2, 2 : I + 2], table[1::2, I + 3 : I + O + 3]
    inputs.copy_(problem.input)
    targets.copy_(problem.target)
    strided = dataclasses.replace(problem, input=inputs, target=targets)
    arguments = {"epochs": 2, "batch_size": 40, "shuffle": shuffle, "generator_seed": 1}
    ours = assert_runs_like_loop(strided, PLANS[shape], **arguments)
    if PLANS[shape] == ONE_PASS:
        assert_same_bits(ours, train(problem, "run", **arguments))


@pytest.mark.cpu_only("threads of torch")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "I", "O"), [(9000, 64, 1), (5000, 33, 3), (3000, 100, 8)])
def test_run_has_the_same_bits_on_one_and_two_threads(B, I, O, dtype):
    problem = slow(Problem.random(B, I, O, dtype=dtype, options=MOMENTUM))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        arguments = {"epochs": 2, "batch_size": 1700, "shuffle": True, "generator_seed": 1}
        found.append(train(problem, "run", **arguments))
        assert found[-1].plans == ["one-pass"]
        assert_same_bits(found[-1], train(problem, "loop of steps", **arguments))
    assert_same_bits(*found)


def test_weight_and_bias_in_groups_with_other_options():
    problem = slow(Problem.random(101, 13, 3, options=MOMENTUM))
    problem = dataclasses.replace(
        problem, bias_options={"lr": 0.001, "momentum": 0.0, "maximize": True}
    )
    ours = assert_runs_like_loop(problem, ONE_PASS, epochs=3, batch_size=30)
    assert ours.bias_buffer is None
    assert ours.weight_buffer is not None


@st.composite
def runs(draw):
    """Any problem and any arguments of run."""
    problem = Problem.random(
        draw(st.integers(1, 60)),
        draw(st.integers(1, 20)),
        draw(st.one_of(st.integers(1, 9), st.just(128))),
        dtype=draw(st.sampled_from(DTYPES)),
        bias=draw(st.booleans()),
        reduction=draw(st.sampled_from(("mean", "sum"))),
        options=draw(st.sampled_from(OPTION_SETS)),
    )
    arguments = {
        "epochs": draw(st.integers(1, 3)),
        "batch_size": draw(st.one_of(st.none(), st.integers(1, 70))),
        "shuffle": draw(st.booleans()),
        "generator_seed": draw(st.integers(0, 5)),
    }
    return slow(problem, 0.01), arguments


@settings(max_examples=100)
@given(runs())
def test_any_run_equals_the_loop(run):
    problem, arguments = run
    assert_runs_like_loop(problem, **arguments)


# --- order --------------------------------------------------------------------------------------


@each_shape
def test_shuffled_order_is_that_of_randperm(shape):
    """Also checked through the losses: rows with targets of their own tell which were taken."""
    problem = slow(Problem.random(*SHAPES[shape], options=MOMENTUM))
    generator, twin = (torch.Generator().manual_seed(5) for _ in range(2))
    model, loss_function, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    n, epochs = problem.input.shape[0], 3
    losses = step.run(
        problem.input,
        problem.target,
        epochs=epochs,
        batch_size=25,
        shuffle=True,
        generator=generator,
    )
    assert step.plan in PLANS[shape]
    expected = train(problem, "plain", epochs=epochs, batch_size=25, shuffle=True, generator=twin)
    torch.testing.assert_close(losses, torch.stack(expected.losses))
    # Both generators have drawn as much.
    assert torch.equal(torch.randperm(n, generator=generator), torch.randperm(n, generator=twin))
    in_order = train(problem, "plain", epochs=epochs, batch_size=25)
    assert not torch.allclose(losses, torch.stack(in_order.losses))


def test_shuffling_without_generator_draws_from_the_default_one():
    problem = slow(Problem.random(101, 13, 3))
    found = []
    for how in ("run", "loop of steps"):
        torch.manual_seed(11)
        found.append(train(problem, how, epochs=2, batch_size=30, shuffle=True))
        found[-1].losses.append(torch.rand(()))  # and leaves it in the same state
    assert_same_bits(*found)


def test_run_in_order_draws_nothing():
    problem = slow(Problem.random(101, 13, 3))
    model, loss_function, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    before = torch.get_rng_state()
    step.run(problem.input, problem.target, epochs=2, batch_size=30)
    assert torch.equal(torch.get_rng_state(), before)


# --- what is left behind ------------------------------------------------------------------------


@each_shape
def test_inputs_are_not_written_and_gradients_stay_none(shape):
    problem = slow(Problem.random(*SHAPES[shape], options=MOMENTUM))
    kept = problem.input.clone(), problem.target.clone()
    model, loss_function, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    versions = [p._version for p in model.parameters()]
    losses = step.run(problem.input, problem.target, epochs=2, batch_size=30, shuffle=True)
    assert step.plan in PLANS[shape]
    assert losses.dtype == problem.dtype
    assert not losses.requires_grad
    assert torch.equal(problem.input, kept[0])
    assert torch.equal(problem.target, kept[1])
    assert all(p.grad is None for p in model.parameters())
    assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))


def test_backward_through_weights_of_before_the_run_raises():
    problem = Problem.random(101, 13, 3)
    model, loss_function, optimizer = problem.build()
    stale = model(problem.input.clone().requires_grad_()).sum()
    fused_step.TrainStep(model, loss_function, optimizer).run(problem.input, problem.target)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_scheduler_between_runs_sets_the_rate_of_the_next():
    """And its first step does not warn: warnings are errors here."""
    problem = slow(Problem.random(101, 13, 3, options={"momentum": 0.9}))
    found = []
    for how in ("run", "loop"):
        model, loss_function, optimizer = problem.build()
        step = fused_step.TrainStep(model, loss_function, optimizer)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        losses = []
        for _ in range(4):
            if how == "run":
                losses.append(step.run(problem.input, problem.target, batch_size=40))
            else:
                losses.append(
                    plain_run(
                        model,
                        loss_function,
                        optimizer,
                        problem.input,
                        problem.target,
                        batch_size=40,
                        step=step,
                    )
                )
            assert step.plan in ONE_PASS
            scheduler.step()
        found.append(Trained(list(torch.cat(losses))).take(model, optimizer))
    assert_same_bits(*found)


@each_shape
def test_nan_in_one_row_reaches_the_losses_after_it(shape):
    problem = slow(Problem.random(*SHAPES[shape]))
    problem.target[60] = float("nan")
    ours = train(problem, "run", batch_size=20)
    assert [bool(loss.isnan()) for loss in ours.losses[:5]] == [False, False, False, True, True]
    assert ours.weight.isnan().all()


# --- plain --------------------------------------------------------------------------------------


class Model(nn.Module):
    """A model that no fused plan knows."""

    def __init__(self, features, outputs):
        super().__init__()
        self.body = nn.Linear(features, 4)
        self.head = nn.Linear(4, outputs)

    def forward(self, input):
        return self.head(torch.tanh(self.body(input)))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [16, None])
def test_run_of_any_other_model_is_the_plain_loop(batch_size, shuffle):
    inputs, targets = torch.randn(50, 5), torch.randn(50, 2)
    found = []
    for ours in (True, False):
        torch.manual_seed(1)
        model, loss_function = Model(5, 2), nn.L1Loss()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        arguments = {
            "epochs": 3,
            "batch_size": batch_size,
            "shuffle": shuffle,
            "generator": torch.Generator().manual_seed(2),
        }
        if ours:
            step = fused_step.TrainStep(model, loss_function, optimizer)
            losses = step.run(inputs, targets, **arguments)
            assert step.plan == "plain"
        else:
            losses = plain_run(model, loss_function, optimizer, inputs, targets, **arguments)
        found.append([losses, *(p.detach() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_hook_during_a_run_lowers_the_plan_and_is_called_at_every_batch():
    problem = slow(Problem.random(101, 13, 3, options=MOMENTUM))
    model, loss_function, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    sizes = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[0]))
    losses = step.run(problem.input, problem.target, epochs=2, batch_size=40)
    assert step.plan == "optimizer"
    assert sizes == [40, 40, 21] * 2
    expected = train(problem, "plain", epochs=2, batch_size=40)
    assert torch.equal(losses, torch.stack(expected.losses))
    assert torch.equal(model.weight, expected.weight)


def test_error_of_the_plain_loop_comes_out_of_run_at_its_batch():
    """A broadcasting target is PyTorch's warning; here an error after some whole steps."""
    problem = slow(Problem.random(100, 13, 3))
    model, loss_function, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    with pytest.warns(UserWarning, match="Using a target size"):
        step.run(problem.input, problem.target[:, :1], batch_size=50)
    with pytest.raises(RuntimeError, match="same dtype"):
        step.run(problem.input.double(), problem.target.double(), batch_size=50)
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        step.run(problem.input, problem.target)


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": -3}, ValueError, "batch_size must be at least 1, got -3"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer, got 2.5"),
        ({"batch_size": "2"}, TypeError, "batch_size must be an integer, got '2'"),
        ({"epochs": -1}, ValueError, "epochs must not be negative, got -1"),
        ({"epochs": 1.5}, TypeError, "epochs must be an integer, got 1.5"),
        ({"epochs": None}, TypeError, "epochs must be an integer, got None"),
        ({"epochs": 1 << 62, "batch_size": 10}, ValueError, "epochs must give fewer than 2"),
        ({"epochs": 1 << 63}, ValueError, "epochs must give fewer than 2"),
        ({"generator": 7}, TypeError, "generator must be a torch.Generator or None, got int"),
        ({"shuffle": "no"}, TypeError, "shuffle must be a bool, got 'no'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("fused", [True, False])
def test_wrong_arguments_raise_and_change_nothing(arguments, error, message, fused):
    problem = Problem.random(40, 5, 3, options=MOMENTUM)
    model, loss_function, optimizer = problem.build()
    if not fused:
        loss_function = nn.L1Loss()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    with pytest.raises(error, match=message):
        step.run(problem.input, problem.target, **arguments)
    assert torch.equal(model.weight, problem.weight)
    assert torch.equal(model.bias, problem.bias)
    assert len(optimizer.state) == 0


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        ((40, 5), (39, 3), "targets must have as many rows as inputs"),
        ((40, 5), (), "targets must have a dimension of rows"),
        ((), (40, 3), "inputs must have a dimension of rows"),
    ],
)
def test_rows_that_do_not_match_raise(inputs, targets, message):
    model, loss_function, optimizer = Problem.random(40, 5, 3).build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    with pytest.raises(ValueError, match=message):
        step.run(torch.zeros(inputs), torch.zeros(targets))


@pytest.mark.parametrize("value", [None, [[1.0, 2.0]], 3])
def test_what_is_no_tensor_is_refused_by_name(value):
    problem = Problem.random(40, 5, 3)
    step = fused_step.TrainStep(*problem.build())
    got = f"must be a torch.Tensor, got {type(value).__name__}"
    with pytest.raises(TypeError, match=f"TrainStep.run: inputs {got}"):
        step.run(value, problem.target)
    with pytest.raises(TypeError, match=f"TrainStep.run: targets {got}"):
        step.run(problem.input, value)


@pytest.mark.parametrize("fused", [True, False])
def test_batch_size_beyond_64_bits_is_all_rows(fused):
    problem = Problem.random(40, 5, 3)
    found = []
    for batch_size in (1 << 70, 40):
        model, loss_function, optimizer = problem.build()
        step = fused_step.TrainStep(model, loss_function if fused else nn.L1Loss(), optimizer)
        found.append(step.run(problem.input, problem.target, epochs=2, batch_size=batch_size))
    assert torch.equal(*found)


@pytest.mark.parametrize("O", [3, 130])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("rows", "epochs"), [(0, 3), (40, 0), (0, 0)])
def test_run_without_steps_returns_no_losses_and_changes_nothing(rows, epochs, shuffle, O):
    problem = Problem.random(40, 5, O, options=MOMENTUM)
    model, loss_function, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    versions = [p._version for p in model.parameters()]
    losses = step.run(problem.input[:rows], problem.target[:rows], epochs=epochs, shuffle=shuffle)
    assert losses.shape == (0,)
    assert torch.equal(model.weight, problem.weight)
    assert [p._version for p in model.parameters()] == versions
    assert len(optimizer.state) == 0


@pytest.mark.parametrize("model", [nn.Linear(2, 1), nn.Sequential(nn.Linear(2, 1), nn.ReLU())])
def test_run_without_steps_returns_losses_of_the_models_dtype(model):
    model = model.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = fused_step.TrainStep(model, nn.MSELoss(), optimizer)
    data = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    assert step.run(*data, epochs=0).dtype == step.run(*data, epochs=1).dtype == torch.float64


def test_only_the_data_are_positional():
    model, loss_function, optimizer = Problem.random(40, 5, 3).build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    with pytest.raises(TypeError, match="positional"):
        step.run(torch.zeros(40, 5), torch.zeros(40, 3), 2)


# --- progress -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_progress_shows_a_bar_that_ends_at_the_last_step(capsys, fused):
    pytest.importorskip("tqdm")
    problem = slow(Problem.random(101, 13, 3))
    model, loss_function, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function if fused else nn.L1Loss(), optimizer)
    losses = step.run(problem.input, problem.target, epochs=5, batch_size=25, progress=True)
    assert step.plan in (ONE_PASS if fused else ("optimizer",))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "25/25" in captured.err
    assert len(losses) == 25


def test_no_bar_without_being_asked(capsys):
    train(slow(Problem.random(101, 13, 3)), "run", epochs=5, batch_size=25)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_progress_does_not_change_the_result():
    pytest.importorskip("tqdm")
    problem = slow(Problem.random(101, 13, 3, options=MOMENTUM))
    with_bar, without = (
        train(problem, "run", epochs=50, batch_size=25, progress=progress)
        for progress in (True, False)
    )
    assert_same_bits(with_bar, without)


def test_progress_without_tqdm_says_what_to_install(monkeypatch):
    problem = Problem.random(40, 5, 3)
    model, loss_function, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    original = builtins.__import__

    def no_tqdm(name, *args, **kwargs):
        if name.startswith("tqdm"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_tqdm)
    with pytest.raises(ImportError, match="pip install tqdm"):
        step.run(problem.input, problem.target, progress=True)
    assert torch.equal(model.weight, problem.weight)


# --- threads and signals ------------------------------------------------------------------------


def seconds_of_epochs(step, problem: Problem, seconds: float) -> int:
    """How many epochs take about that long."""
    epochs = 64
    while True:
        start = time.perf_counter()
        step.run(problem.input, problem.target, epochs=epochs)
        taken = time.perf_counter() - start
        if taken > 0.02:
            return max(1, int(epochs * seconds / taken))
        epochs *= 4


@pytest.mark.parametrize("shape", [(4, 2, 1), (2048, 64, 1), (256, 128, 128)], ids=str)
def test_other_threads_run_while_run_works(shape):
    """With the GIL held they would get a turn at each look for signals, about 20 a second."""
    problem = slow(Problem.random(*shape))
    model, loss_function, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    epochs = seconds_of_epochs(step, problem, 0.5)
    turns: list[float] = []
    stop = threading.Event()

    def other() -> None:
        while not stop.is_set():
            turns.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=other)
    thread.start()
    start = time.perf_counter()
    step.run(problem.input, problem.target, epochs=epochs)
    end = time.perf_counter()
    stop.set()
    thread.join()
    assert step.plan in (*ONE_PASS, *GEMM)
    during = sum(start < turn < end for turn in turns)
    assert end - start > 0.1
    assert during / (end - start) > 100, f"{during} turns in {end - start:.2f} s"


INTERRUPTED = """
    import os, signal, threading, time
    import torch, fused_step
    from torch import nn

    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    B, I, O, batch_size, shuffle = {arguments}
    inputs, targets = torch.randn(B, I), torch.randn(B, O)

    def build():
        torch.manual_seed(1)
        model = nn.Linear(I, O)
        # So slow that every step moves the weights, and never back.
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        return model, optimizer, fused_step.TrainStep(model, nn.MSELoss(), optimizer)

    model, optimizer, step = build()
    sent = []

    def interrupt():
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.3, interrupt)
    timer.start()
    try:
        step.run(
            inputs, targets, epochs=10**7, batch_size=batch_size, shuffle=shuffle,
            generator=torch.Generator().manual_seed(5),
        )
    except KeyboardInterrupt:
        latency = time.perf_counter() - sent[0]
    else:
        raise SystemExit("not interrupted")
    assert latency < 2, latency
    state = optimizer.state[model.weight]["momentum_buffer"]
    assert model.weight.isfinite().all() and state.isfinite().all()

    # Somewhere on the way of the same loop, after a whole step, all of it is as it was left.
    twin, twin_optimizer, twin_step = build()
    generator = torch.Generator().manual_seed(5)
    deadline = time.perf_counter() + 60
    steps = 0

    def reached():
        return all(
            torch.equal(a, b)
            and torch.equal(
                optimizer.state[a]["momentum_buffer"], twin_optimizer.state[b]["momentum_buffer"]
            )
            for a, b in zip(model.parameters(), twin.parameters())
        )

    def walk():
        global steps
        while True:
            order = torch.randperm(B, generator=generator) if shuffle else torch.arange(B)
            for first in range(0, B, batch_size):
                rows = order[first : first + batch_size]
                twin_step(inputs[rows], targets[rows])
                steps += 1
                if reached():
                    return
                if time.perf_counter() > deadline:
                    raise SystemExit(f"not the state after any of {{steps}} whole steps")

    walk()
    # And it goes on from there.
    step(inputs, targets)
    twin_step(inputs, targets)
    assert step.plan == "one-pass", step.plan
    assert torch.equal(model.weight, twin.weight)
    print("steps", steps)
"""


@pytest.mark.cpu_only("a process of its own")
@pytest.mark.parametrize(
    "arguments", [(20_000, 64, 1, 20_000, False), (20_000, 64, 3, 7000, True)], ids=str
)
def test_interrupt_stops_the_run_after_a_whole_step(arguments):
    code = textwrap.dedent(INTERRUPTED).format(arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 1


def test_interrupt_of_a_run_of_tiny_steps():
    """A step is far shorter than the time between two looks for signals."""
    code = """
        import os, signal, threading, time
        import torch, fused_step

        signal.signal(signal.SIGINT, signal.default_int_handler)
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        step = fused_step.TrainStep(model, torch.nn.MSELoss(), optimizer)
        before = model.weight.detach().clone()
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        start = time.perf_counter()
        try:
            step.run(torch.randn(3, 2), torch.randn(3, 1), epochs=10**9)
        except KeyboardInterrupt:
            assert time.perf_counter() - start < 3
            assert model.weight.isfinite().all() and not torch.equal(model.weight, before)
            assert "momentum_buffer" in optimizer.state[model.weight]
            print("interrupted")
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "interrupted\n", done.stderr


def test_runs_in_two_threads_do_not_disturb_each_other():
    jobs = [
        slow(Problem.random(512, 64, 3, options=MOMENTUM)),
        slow(Problem.random(300, 65, 1, options={"momentum": 0.5})),
    ]
    arguments = {"epochs": 60, "batch_size": 100, "shuffle": True, "generator_seed": 4}
    expected = [train(problem, "loop of steps", **arguments) for problem in jobs]
    found: list = [None, None]
    start = threading.Barrier(2)

    def work(index: int) -> None:
        start.wait()
        found[index] = train(jobs[index], "run", **arguments)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, alone in zip(found, expected, strict=True):
        assert ours.plans[0] in ONE_PASS
        assert_same_bits(ours, alone)


def test_one_run_equals_the_first_of_the_plain_steps():
    """A run of one step, against the five lines directly."""
    problem = Problem.random(40, 5, 3, options=MOMENTUM)
    model, loss_function, optimizer = problem.build()
    loss = plain_step(model, loss_function, optimizer, problem.input, problem.target)
    ours = train(problem, "run")
    torch.testing.assert_close(ours.losses[0], loss)
    torch.testing.assert_close(ours.weight, model.weight.detach())


@pytest.mark.parametrize("in_features", [1, 3, 9])
def test_infinite_row_leaves_infinity_and_nan_where_the_loop_does(in_features):
    """Not NaN in place of an infinity: 0 · inf must not arise in the lanes beyond the inputs."""
    inputs = torch.ones(3, in_features)
    inputs[0, 0] = torch.inf
    targets = torch.zeros(3, 1)

    def trained(run: bool) -> list[torch.Tensor]:
        model, loss_function = torch.nn.Linear(in_features, 1, bias=False), torch.nn.MSELoss()
        torch.nn.init.constant_(model.weight, 0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if run:
            step = fused_step.TrainStep(model, loss_function, optimizer)
            losses = step.run(inputs, targets, batch_size=1)
            assert step.plan in ONE_PASS
        else:
            losses = plain_run(model, loss_function, optimizer, inputs, targets, batch_size=1)
        return [losses, model.weight.detach()]

    for fused, plain in zip(trained(run=True), trained(run=False), strict=True):
        assert torch.equal(fused.isnan(), plain.isnan())
        assert torch.equal(fused.isinf(), plain.isinf())
