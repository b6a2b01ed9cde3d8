# SPDX-License-Identifier: MIT
"""The fuzzer itself: it finds what is planted, makes it small, and prints what repeats it."""

from __future__ import annotations

import random

import fuzz
import pytest
import torch
from fuzzing import training
from fuzzing.doors import DOORS

import fused_step

each_door = pytest.mark.parametrize("door", DOORS.values(), ids=lambda door: door.name)
pytestmark = pytest.mark.cpu_only("the fuzzer makes its tensors on the CPU")


@pytest.fixture(autouse=True)
def _prepared():
    before = torch.is_warn_always_enabled()
    fuzz.prepare()
    yield
    torch.set_warn_always(before)


@each_door
def test_first_cases_of_a_door_hold(door):
    source = random.Random(1)
    for _ in range(40):
        case = door.draw(source)
        assert door.failure(case) is None, fuzz.repro(door, case)


@each_door
def test_text_of_a_case_gives_the_case_back(door):
    source = random.Random(2)
    for _ in range(200):
        case = door.draw(source)
        assert door.parse(case.text(door.choices)) == case


@each_door
def test_cases_of_a_seed_are_the_same_at_every_run(door):
    found = [[fuzz.case_of([door], 3, number)[1] for number in range(20)] for _ in range(2)]
    assert found[0] == found[1]
    assert found[0] != [fuzz.case_of([door], 4, number)[1] for number in range(20)]


def test_choice_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="step has no choice colour"):
        DOORS["step"].parse("step; colour='red'")


def smallest_failure(door_name: str, seed: int = 5) -> str:
    """What the fuzzer makes of the first case that fails."""
    door = DOORS[door_name]
    for number in range(300):
        _, case = fuzz.case_of([door], seed, number)
        if door.failure(case) is not None:
            return fuzz.repro(door, door.shrink(case))
    raise AssertionError("nothing found")


def test_a_step_that_forgets_the_bias_is_found_and_made_small(monkeypatch):
    class Forgetful(fused_step.TrainStep):
        def __call__(self, input, target):
            bias = getattr(self.model, "bias", None)
            kept = None if bias is None else bias.detach().clone()
            loss = super().__call__(input, target)
            if kept is not None:
                bias.data.copy_(kept)
            return loss

    monkeypatch.setattr(training.fused_step, "TrainStep", Forgetful)
    assert smallest_failure("step") == 'python tests/fuzz.py --case "step"'


def test_a_loss_that_is_slightly_off_is_found(monkeypatch):
    right = fused_step.linear_mse_loss
    monkeypatch.setattr(fused_step, "linear_mse_loss", lambda *a, **k: right(*a, **k) * 1.0001)
    assert smallest_failure("loss").startswith('python tests/fuzz.py --case "loss')


def test_an_optimizer_that_ignores_maximize_is_found(monkeypatch):
    class Ignorant(fused_step.SGD):
        def step(self, *args, **kwargs):
            for group in self.param_groups:
                group["maximize"] = False
            return super().step(*args, **kwargs)

    monkeypatch.setattr(fused_step, "SGD", Ignorant)
    assert "maximize=True" in smallest_failure("sgd")


def test_an_error_that_changes_something_is_found(monkeypatch):
    right = fused_step.linear_mse_loss

    def untidy(input, weight, target, **keywords):
        try:
            return right(input, weight, target, **keywords)
        except ValueError:
            with torch.no_grad():
                target.zero_()
            raise

    monkeypatch.setattr(fused_step, "linear_mse_loss", untidy)
    assert smallest_failure("loss").startswith('python tests/fuzz.py --case "loss; ')
