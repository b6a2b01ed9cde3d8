# SPDX-License-Identifier: MIT
"""Training saved by one loop is resumed by the other, with the same continuation."""

from __future__ import annotations

import copy
import functools
import gc
import io
import itertools
import pickle
import weakref

import pytest
import torch
from oracle import (
    DTYPES,
    GEMM,
    ONE_PASS,
    OPTION_SETS,
    Problem,
    assert_within_rule,
    describe,
    plain_step,
    scales,
    train_plain,
)
from torch import nn

import fused_step

SHAPES = {"one-pass": (41, 21, 6), "gemm": (45, 19, 131)}
PLANS = {"one-pass": ONE_PASS, "gemm": GEMM}


def train(problem, model, loss_function, optimizer, *, fused, steps=3):
    """Some steps, by TrainStep or by the plain loop."""
    step = functools.partial(plain_step, model, loss_function, optimizer)
    if fused:
        step = fused_step.TrainStep(model, loss_function, optimizer)
    for _ in range(steps):
        step(problem.input, problem.target)
    if fused:
        assert step.plan in (*ONE_PASS, *GEMM)


def reload_by_state_dict(saved):
    """Through bytes, into objects that have never trained."""
    model, loss_function, optimizer, problem = saved
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh, _, fresh_optimizer = problem.build()
    fresh.load_state_dict(state["model"])
    fresh_optimizer.load_state_dict(state["optimizer"])
    return fresh, loss_function, fresh_optimizer


def reload_in_place(saved):
    """Into the very objects, which have gone on training meanwhile."""
    model, loss_function, optimizer, problem = saved
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(problem, model, loss_function, optimizer, fused=True, steps=2)
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    return model, loss_function, optimizer


def reload_by_deepcopy(saved):
    model, loss_function, optimizer, _ = saved
    return copy.deepcopy((model, loss_function, optimizer))


@pytest.mark.parametrize(
    "reload", [reload_by_state_dict, reload_in_place, reload_by_deepcopy], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(
    ("before", "after"), [("fused", "plain"), ("plain", "fused"), ("fused", "fused")]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_resumed_training_continues_as_if_never_saved(shape, before, after, reload):
    for options, dtype in itertools.product(OPTION_SETS, DTYPES):
        problem = Problem.random(*SHAPES[shape], dtype=dtype, options=options)
        model, loss_function, optimizer = problem.build()
        train(problem, model, loss_function, optimizer, fused=before == "fused")
        model, loss_function, optimizer = reload((model, loss_function, optimizer, problem))
        train(problem, model, loss_function, optimizer, fused=after == "fused")
        same_dtype = train_plain(problem, 6)
        exact = train_plain(problem, 6, torch.float64)
        scale = scales(problem, 6)
        for name, parameter in model.named_parameters():
            assert_within_rule(
                f"{describe(options)} {name}",
                parameter.detach(),
                getattr(same_dtype, name),
                getattr(exact, name),
                scale[name],
            )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTION_SETS, ids=describe)
def test_state_dict_has_the_plain_loops_form(shape, options):
    found = []
    for fused in (True, False):
        problem = Problem.random(*SHAPES[shape], options=options)
        model, loss_function, optimizer = problem.build()
        train(problem, model, loss_function, optimizer, fused=fused)
        state = optimizer.state_dict()
        form = {
            key: {k: (v.dtype, v.shape, v.stride(), v.requires_grad) for k, v in entry.items()}
            for key, entry in state["state"].items()
        }
        found.append((state["param_groups"], form, list(state)))
    assert found[0] == found[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_loading_a_state_without_momentum_starts_it_anew(shape):
    """The buffers of before must not be taken from a cache."""
    problem = Problem.random(*SHAPES[shape], options={"momentum": 0.9, "dampening": 0.5})
    model, loss_function, optimizer = problem.build()
    fresh = copy.deepcopy(optimizer.state_dict())
    step = fused_step.TrainStep(model, loss_function, optimizer)
    for _ in range(3):
        step(problem.input, problem.target)
    old = optimizer.state[model.weight]["momentum_buffer"]
    kept = old.clone()
    with torch.no_grad():
        model.weight.copy_(problem.weight)
        model.bias.copy_(problem.bias)
    optimizer.load_state_dict(fresh)
    for _ in range(2):
        step(problem.input, problem.target)
    assert torch.equal(old, kept)
    assert_within_rule(
        "weight",
        model.weight.detach(),
        train_plain(problem, 2).weight,
        train_plain(problem, 2, torch.float64).weight,
        scales(problem, 2)["weight"],
    )


class WithItsStep(nn.Module):
    """A module that has all that trains it, and itself in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.1, momentum=0.9)
        self.step = fused_step.TrainStep(self.layer, nn.MSELoss(), self.optimizer)
        self.layer.step = self.step

    def forward(self, input):
        return self.layer(input)


def by_pickle(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
def test_copy_of_a_step_trains_the_copies(copied):
    x, t = torch.randn(16, 4), torch.randn(16, 3)
    module = WithItsStep()
    module.step(x, t)
    other = copied(module)
    assert other.step.model is other.layer
    assert other.layer.step is other.step
    assert other.step.optimizer is other.optimizer
    assert other.step.plan is None
    before = module.layer.weight.detach().clone()
    losses = [other.step(x, t) for _ in range(3)]
    assert torch.equal(module.layer.weight, before)
    for loss in losses:
        assert torch.equal(module.step(x, t), loss)
    assert torch.equal(module.layer.weight, other.layer.weight)


def test_repr_names_model_loss_and_optimizer():
    module = WithItsStep()
    assert repr(module.step) == ("TrainStep(model=Linear, loss_function=MSELoss(), optimizer=SGD)")
    step = fused_step.TrainStep(module.layer, nn.functional.mse_loss, module.optimizer)
    assert "loss_function=mse_loss," in repr(step)


class Counting(fused_step.TrainStep):
    calls = 0

    def __call__(self, input, target):
        self.calls += 1
        return super().__call__(input, target)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, by_pickle])
def test_copy_keeps_what_a_subclass_or_the_user_has_put_on_it(copied):
    layer = nn.Linear(4, 3)
    step = Counting(layer, nn.MSELoss(), torch.optim.SGD(layer.parameters(), lr=0.1))
    step.note = "mine"
    step(torch.randn(16, 4), torch.randn(16, 3))
    other = copied(step)
    assert (other.calls, other.note, other.plan) == (1, "mine", None)
    other(torch.randn(16, 4), torch.randn(16, 3))
    assert (other.calls, step.calls) == (2, 1)


def test_run_makes_the_steps_of_a_subclass():
    layer = nn.Linear(4, 3)
    step = Counting(layer, nn.MSELoss(), torch.optim.SGD(layer.parameters(), lr=0.1))
    step.run(torch.randn(16, 4), torch.randn(16, 3), epochs=3, batch_size=4)
    assert step.calls == 12


def test_steps_hold_no_more_of_an_optimizer_than_its_own():
    """A scheduler puts a function in the place of optimizer.step, which the reader remembers."""
    layer = nn.Linear(4, 3)
    references = []
    for _ in range(2):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        torch.optim.lr_scheduler.ConstantLR(optimizer)
        references.append(weakref.ref(optimizer.step))
        step = fused_step.TrainStep(layer, nn.MSELoss(), optimizer)
        step(torch.randn(16, 4), torch.randn(16, 3))
        del step, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None, None]
