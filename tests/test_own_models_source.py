# SPDX-License-Identifier: MIT
"""Where the source of a model's own forward() comes from, and when it is not used."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import warnings

import pytest
import torch
from oracle import plain_step
from own_models import (
    HEAD,
    LOWER,
    Layers,
    assert_trains_like_plain,
    batch,
    made,
    sgd,
)
from torch import nn

import fused_step

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 9), nn.Linear(9, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))
"""


def imported(path) -> type[nn.Module]:
    spec = importlib.util.spec_from_file_location("net_of_a_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Net


def test_source_in_a_file_is_read(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(SOURCE)
    assert_trains_like_plain(made(imported(path)), HEAD)


def test_only_the_lines_of_forward_are_read(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(SOURCE + "\nassert 1 is 1, '\\d'\n")
    with pytest.warns(match="invalid escape|is. with"):
        kind = imported(path)
    path.write_text(SOURCE + "\n(")
    assert_trains_like_plain(made(kind), HEAD)  # a warning is an error here


@pytest.mark.parametrize(
    "line",
    ["k = '\\d'", "assert (x is not None, 'no input')", "k = x is 2", "k = x is not 'a'"],
)
def test_warnings_of_the_compiler_are_not_given_again(tmp_path, line):
    path = tmp_path / "net.py"
    path.write_text(SOURCE.replace("        return", f"        {line}\n        return"))
    with pytest.warns((SyntaxWarning, DeprecationWarning)):
        kind = imported(path)
    assert_trains_like_plain(made(kind), HEAD)  # a warning is an error here


class Outer:
    class Inner(Layers):
        def forward(self, x):
            self.name = (lambda: None).__qualname__
            return self.last(self.first(x))


def test_names_of_functions_within_are_their_own():
    model = made(Outer.Inner)
    step = fused_step.TrainStep(model, nn.MSELoss(), sgd(model))
    step(*batch())
    assert step.plan == "head"
    assert model.name == "Outer.Inner.forward.<locals>.<lambda>"


class KeyErrors:
    """Not what a loader should raise."""

    def get_source(self, name):
        raise KeyError(name)


def test_error_of_a_loader_is_not_that_of_a_step():
    names = {"__name__": "from_an_archive", "__loader__": KeyErrors()}
    exec(compile(SOURCE, "archive/net.py", "exec"), names)
    assert_trains_like_plain(made(names["Net"]), LOWER)


def test_interrupt_while_the_source_is_read_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "net.py"
    path.write_text(SOURCE)
    model = made(imported(path))
    x, t = batch()
    step = fused_step.TrainStep(model, nn.MSELoss(), sgd(model))

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fused_step._forward._parse", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step(x, t)
    before = copy.deepcopy(model)
    loss = step(x, t)
    torch.testing.assert_close(loss, plain_step(before, nn.MSELoss(), sgd(before), x, t))
    assert step.plan == "head"


def test_source_that_could_not_be_read_for_want_of_stack_is_read_later(tmp_path, monkeypatch):
    path = tmp_path / "net.py"
    path.write_text(SOURCE)
    model = made(imported(path))
    step = fused_step.TrainStep(model, nn.MSELoss(), sgd(model))

    def too_deep(*arguments):
        raise RecursionError

    with monkeypatch.context() as patch:
        patch.setattr("fused_step._forward._parse", too_deep)
        step(*batch())
        assert step.plan in LOWER
        assert "no memory or stack left" in step.explain(*batch())
    step(*batch())
    assert step.plan == "head"


def test_warnings_that_were_given_once_are_not_given_again(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(
        SOURCE.replace("        return", "        warnings.warn('once')\n        return")
        + "\nimport warnings\n"
    )
    model = made(imported(path))
    x, t = batch()
    step = fused_step.TrainStep(model, nn.MSELoss(), sgd(model))
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("default")
        model(x)
        for _ in range(4):
            step(x, t)
    assert step.plan == "head"
    assert len(given) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda source: source.replace("torch.tanh(self.first(x))", "self.first(x)"),
        lambda source: source.replace("x)))", "x))) * 2"),
        lambda source: "\n" + source,
        lambda source: source.replace("def forward", "(def forward"),
        lambda source: "",
    ],
    ids=["another body", "another end", "a line before", "no Python", "nothing"],
)
def test_source_that_has_changed_since_is_not_used(tmp_path, change):
    path = tmp_path / "net.py"
    path.write_text(SOURCE)
    kind = imported(path)
    path.write_text(change(SOURCE))
    assert_trains_like_plain(made(kind), LOWER)


def test_source_that_is_gone_is_not_used(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(SOURCE)
    kind = imported(path)
    path.unlink()
    assert_trains_like_plain(made(kind), LOWER)


def test_source_that_was_imported_again_is_read(tmp_path):
    path = tmp_path / "net.py"
    for source in (SOURCE, SOURCE.replace("tanh", "sigmoid")):
        path.write_text(source)
        assert_trains_like_plain(made(imported(path)), HEAD)


def test_class_made_of_a_string_is_not_read():
    names: dict[str, type[nn.Module]] = {}
    exec(SOURCE, names)
    assert_trains_like_plain(made(names["Net"]), LOWER)


def test_cell_of_a_notebook_is_read(monkeypatch):
    cell = "await_something = 1\n" + SOURCE + "\nfirst = await_something\n"
    lines = cell.splitlines(keepends=True)
    monkeypatch.setitem(inspect.linecache.cache, "<cell 1>", (len(cell), None, lines, "<cell 1>"))
    names: dict[str, type[nn.Module]] = {}
    exec(compile(cell, "<cell 1>", "exec"), names)
    assert_trains_like_plain(made(names["Net"]), HEAD)
