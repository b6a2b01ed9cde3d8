# SPDX-License-Identifier: MIT
"""Learning-rate schedulers of every kind drive a fused step as they drive the plain loop."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable

import pytest
import torch
from oracle import FUSED_PLANS, GEMM, ONE_PASS, Problem, assert_within_rule, plain_step, scales
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR

import fused_step

STEPS = 12

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "LambdaLR": lambda o: LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: MultiplicativeLR(o, lambda epoch: 0.95),
    "StepLR": lambda o: StepLR(o, step_size=3, gamma=0.5),
    "MultiStepLR": lambda o: MultiStepLR(o, milestones=[2, 5, 9], gamma=0.5),
    "ConstantLR": lambda o: ConstantLR(o, factor=0.5, total_iters=4),
    "LinearLR": lambda o: LinearLR(o, start_factor=0.25, total_iters=6),
    "ExponentialLR": lambda o: ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: PolynomialLR(o, total_iters=8, power=2.0),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, T_max=7, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda o: CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "CyclicLR": lambda o: CyclicLR(o, 1e-3, 2e-2, step_size_up=3),
    "CyclicLR, lr only": lambda o: CyclicLR(
        o, 1e-3, 2e-2, step_size_up=3, mode="exp_range", gamma=0.9, cycle_momentum=False
    ),
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=0.02, total_steps=STEPS + 1),
    "OneCycleLR, three phases": lambda o: OneCycleLR(
        o, max_lr=0.02, total_steps=STEPS + 1, three_phase=True, anneal_strategy="linear"
    ),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, patience=0, threshold=0.5, factor=0.5),
    "SequentialLR": lambda o: SequentialLR(
        o, [ConstantLR(o, factor=0.1, total_iters=3), ExponentialLR(o, gamma=0.9)], milestones=[4]
    ),
    "ChainedScheduler": lambda o: ChainedScheduler(
        [ConstantLR(o, factor=0.5, total_iters=4), ExponentialLR(o, gamma=0.9)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.001, anneal_epochs=5),
}


def test_every_scheduler_of_torch_is_in_the_table():
    known = {
        name
        for name, kind in inspect.getmembers(lr_scheduler, inspect.isclass)
        if issubclass(kind, LRScheduler) and name not in ("LRScheduler", "_LRScheduler")
    }
    assert known <= {name.split(",")[0] for name in SCHEDULERS}


def train(problem: Problem, kind: str, *, dtype=None, fused=False, lr_tensor=False) -> dict:
    """Trains with a scheduler, and returns the losses, the parameters and the lr of each step."""
    model, loss_function, optimizer = problem.build(dtype)
    x, t = problem.input.to(model.weight.dtype), problem.target.to(model.weight.dtype)
    if lr_tensor:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
    # Both orders are usual: the step is made before its scheduler here, after it elsewhere.
    step = functools.partial(plain_step, model, loss_function, optimizer)
    if fused:
        step = fused_step.TrainStep(model, loss_function, optimizer)
    scheduler = SCHEDULERS[kind](optimizer)
    found, rates = {}, []
    for number in range(STEPS):
        rates.append([(float(g["lr"]), g["momentum"]) for g in optimizer.param_groups])
        found[f"loss of step {number}"] = loss = step(x, t)
        if fused:
            assert step.plan in (ONE_PASS if problem.weight.shape[0] <= 8 else GEMM)
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss)
        else:
            scheduler.step()
    found |= {name: parameter.detach() for name, parameter in model.named_parameters()}
    found |= {"lr": rates}
    return found


@pytest.mark.parametrize("lr_tensor", [False, True], ids=["lr float", "lr tensor"])
@pytest.mark.parametrize("O", [3, 130])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_scheduled_training_stays_fused_and_equals_plain_loop(kind, O, lr_tensor):
    # Momentum 0.95 is the most that a cycling scheduler sets, 0.02 the highest rate.
    problem = Problem.random(40, 11, O, options={"lr": 0.02, "momentum": 0.95})
    scale = scales(problem, STEPS)
    ours, same_dtype, exact = (
        train(problem, kind, dtype=dtype, fused=fused, lr_tensor=lr_tensor)
        for dtype, fused in ((None, True), (None, False), (torch.float64, False))
    )
    rates = ours.pop("lr")
    # ReduceLROnPlateau decides by the loss; all the others by the step's number alone.
    assert rates == same_dtype.pop("lr")
    exact.pop("lr")
    assert len({tuple(r) for r in rates}) > 1  # the scheduler did schedule
    for name in ours:
        assert_within_rule(name, ours[name], same_dtype[name], exact[name], scale[name])


def test_first_scheduler_step_after_a_fused_step_does_not_warn():
    """It warns unless optimizer.step() was called; warnings are errors here."""
    problem = Problem.random(40, 11, 3)
    model, loss_function, optimizer = problem.build()
    scheduler = ExponentialLR(optimizer, gamma=0.5)
    step = fused_step.TrainStep(model, loss_function, optimizer)
    step(problem.input, problem.target)
    assert step.plan in ONE_PASS
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(problem.options["lr"] / 2)


def test_scheduler_stepped_too_early_still_warns():
    problem = Problem.random(40, 11, 3)
    model, loss_function, optimizer = problem.build()
    scheduler = ExponentialLR(optimizer, gamma=0.5)
    fused_step.TrainStep(model, loss_function, optimizer).explain(problem.input, problem.target)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_step_without_scheduler_leaves_no_trace_in_the_optimizer():
    problem = Problem.random(40, 11, 3)
    model, loss_function, optimizer = problem.build()
    before = set(vars(optimizer))
    step = fused_step.TrainStep(model, loss_function, optimizer)
    step(problem.input, problem.target)
    assert step.plan in ONE_PASS
    assert set(vars(optimizer)) == before


def test_two_schedulers_on_two_groups_of_one_optimizer():
    problem = Problem.random(40, 11, 3)
    ours = []
    for fused in (True, False):
        model, loss_function, _ = problem.build()
        optimizer = torch.optim.SGD(
            [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.1}], lr=0.01
        )
        scheduler = LambdaLR(optimizer, [lambda n: 1 / (n + 1), lambda n: math.exp(-n)])
        step = functools.partial(plain_step, model, loss_function, optimizer)
        if fused:
            step = fused_step.TrainStep(model, loss_function, optimizer)
        for _ in range(4):
            step(problem.input, problem.target)
            scheduler.step()
        if fused:
            assert step.plan in FUSED_PLANS
        ours.append((model.weight.detach(), model.bias.detach()))
    torch.testing.assert_close(ours[0], ours[1])
