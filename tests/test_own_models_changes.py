# SPDX-License-Identifier: MIT
"""TrainStep and models of one's own class that change, between two steps or within one."""

from __future__ import annotations

import copy
import functools
import gc
import traceback
import weakref

import pytest
import torch
from device import DEVICE
from oracle import plain_step
from own_models import (
    EPS,
    HIDDEN,
    LOWER,
    OF_LAYER,
    B,
    ByPath,
    I,
    Layers,
    Named,
    Nested,
    O,
    OfList,
    Optional,
    Returned,
    alike,
    assert_trains_like_plain,
    batch,
    hide,
    made,
    sgd,
)
from torch import nn

import fused_step


def shifted(self, x):
    return self.last(x) + 1


def test_forward_put_into_the_class_is_called(monkeypatch):
    assert_trains_like_plain(
        made(Returned), LOWER, lambda model: monkeypatch.setattr(Returned, "forward", shifted)
    )


def test_forward_put_into_the_instance_is_called():
    def change(model):
        model.forward = functools.partial(shifted, model)

    assert_trains_like_plain(made(Returned), LOWER, change)


@pytest.mark.parametrize("code", [shifted, Named.forward], ids=["shifted", "the same"])
def test_code_put_into_forward_is_run(monkeypatch, code):
    plans = LOWER if code is shifted else OF_LAYER
    assert_trains_like_plain(
        made(Returned),
        plans,
        lambda model: monkeypatch.setattr(Returned.forward, "__code__", code.__code__),
    )


# Its parameters are not the optimizer's: their gradients add up.
@pytest.mark.parametrize("kind", [Returned, Nested, ByPath])
@pytest.mark.parametrize("is_linear", [True, False], ids=["by a layer", "by something else"])
def test_module_that_is_replaced_is_called(kind, is_linear):
    torch.manual_seed(9)
    linear = nn.Linear(HIDDEN if kind is Nested else I, O)
    new = linear if is_linear else nn.Sequential(linear, nn.Tanh())

    def change(model):
        owner = model.net if kind is ByPath else model
        owner.last = copy.deepcopy(new).to(DEVICE)

    alike(made(kind), change)


@pytest.mark.parametrize("change", ["item", "longer", "list"])
def test_list_of_modules_that_changes_is_gone_through_as_python_does(change):
    def made_other(*modules):
        torch.manual_seed(9)
        return nn.Linear(*modules).to(DEVICE)

    def make_change(model):
        if change == "item":
            model.layers[1] = nn.Sequential(made_other(HIDDEN, O), nn.Tanh())
        elif change == "longer":
            model.layers.append(made_other(O, O))
        else:
            model.layers = nn.ModuleList([made_other(I, 4), made_other(4, O)])

    step = alike(made(OfList), make_change)
    assert step.plan == ("optimizer" if change == "item" else "head")


def test_modules_that_the_class_gives_are_the_ones_that_run(monkeypatch):
    class Own(nn.Sequential):
        pass

    def change(_):
        first_two = property(lambda self: dict([*self.__dict__["_modules"].items()][:2]))
        monkeypatch.setattr(Own, "_modules", first_two, raising=False)

    model = made(lambda: Own(nn.Linear(I, O), nn.Tanh(), nn.Linear(O, O)))
    assert alike(model, change).plan == "optimizer"


DEFAULTS = {"__defaults__": (0.5,), "__kwdefaults__": {"mask": torch.tensor(0.5)}}


@pytest.mark.parametrize("defaults", DEFAULTS)
def test_other_defaults_of_forward_are_taken(defaults, monkeypatch):
    def change(_):
        monkeypatch.setattr(Optional.forward, defaults, DEFAULTS[defaults])

    assert alike(made(Optional), change).plan == "head"


@pytest.mark.parametrize("defaults", DEFAULTS)
def test_other_defaults_that_a_module_gives_are_taken_in_that_step(defaults, monkeypatch):
    old = getattr(Optional.forward, defaults)

    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            new = DEFAULTS[defaults] if self.calls == 4 else old
            monkeypatch.setattr(Optional.forward, defaults, new)
            return x

    alike(nn.Sequential(Changing(), made(Optional)), lambda _: None)


@pytest.mark.parametrize("kind", [Returned, Nested, ByPath])
def test_layer_that_is_hidden_later_is_not_called(kind):
    step = alike(made(kind), lambda model: hide(model.net if kind is ByPath else model))
    assert step.plan in LOWER


class Swapping(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(HIDDEN, O)

    def swapped(self, x):
        self.last, self.other = self.other, self.last
        return x


class SwappingBefore(Swapping):
    def forward(self, x):
        hidden = self.swapped(self.first(x))
        return self.last(hidden)


class SwappingWithin(Swapping):
    """The layer is looked up before its argument is made."""

    def forward(self, x):
        return self.last(self.swapped(self.first(x)))


class ToSwapping(nn.Module):
    """The layer is looked up when its argument has been made."""

    def __init__(self) -> None:
        super().__init__()
        self.swapping = SwappingBefore()
        self.returned = Returned()
        self.returned.last = nn.Linear(HIDDEN, O)

    def forward(self, x):
        return self.returned(self.put(x))

    def put(self, x):
        self.swapping.swapped(x)
        self.returned.last = self.swapping.last
        return self.swapping.first(x)


@pytest.mark.parametrize("kind", [SwappingBefore, SwappingWithin, ToSwapping])
def test_layer_that_forward_replaces_is_the_one_that_python_calls(kind):
    alike(made(kind), lambda model: None)


class Inner(Layers):
    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


class Doubling(Inner):
    def forward(self, x):
        return 2 * super().forward(x)


def stack(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(I, HIDDEN), *modules, nn.Linear(HIDDEN, O))


def hooked(net: nn.Module, call: int) -> None:
    if call == 1:
        net.handle = net.register_forward_hook(lambda module, args, output: output + 1)
    if call == 3:
        net.handle.remove()


def hooked_globally(net: nn.Module, call: int) -> None:
    def add(module, args, output):
        return output + 1 if module is net else None

    if call == 1:
        net.handle = nn.modules.module.register_module_forward_hook(add)
    if call == 3:
        net.handle.remove()


def without_gradients(net: nn.Module, call: int) -> None:
    net.last.requires_grad_(call % 2 == 0)


def annealed(net: nn.Module, call: int) -> None:
    net[1] = nn.Dropout(min(0.5, 0.1 * call))


def replaced_first(net: nn.Module, call: int) -> None:
    net[0] = copy.deepcopy(net[0])


def longer(net: nn.Module, call: int) -> None:
    net.append(nn.Tanh())


def shorter(net: nn.Module, call: int) -> None:
    if call == 1:
        net.pop(1)


def wrapped(net: nn.Module, call: int) -> None:
    if call == 1:
        net.last = nn.Sequential(net.last, nn.Tanh())


def wrapped_before(net: nn.Module, call: int) -> None:
    if call == 1:
        net.last = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), net.last)


def own_forward(net: nn.Module, call: int) -> None:
    if call == 1:
        net.forward = lambda x: 3 * net.last(net.first(x))


def other_class(net: nn.Module, call: int) -> None:
    if call == 1:
        net.__class__ = Doubling


CHANGES = [
    (Inner, hooked),
    (Inner, hooked_globally),
    (Inner, without_gradients),
    (Inner, wrapped),
    (Inner, wrapped_before),
    (Inner, own_forward),
    (Inner, other_class),
    (Returned, hooked),
    (Returned, wrapped),
    (lambda: stack(nn.Dropout(0.0)), hooked),
    (lambda: stack(nn.Dropout(0.0)), annealed),
    (lambda: stack(nn.Tanh()), replaced_first),
    (lambda: stack(nn.Tanh()), longer),
    (lambda: stack(nn.Tanh()), shorter),
]


class Changing(nn.Module):
    """Changes what it calls in the end before it calls it."""

    def __init__(self, net: nn.Module, change) -> None:
        super().__init__()
        self.net, self.before, self.change, self.calls = net, nn.Linear(I, I), change, 0

    def forward(self, x):
        self.calls += 1
        torch.manual_seed(self.calls)
        hidden = self.before(x)
        self.change(self.net, self.calls)
        return self.net(hidden)


@pytest.mark.parametrize(
    ("make", "change"), CHANGES, ids=[f"{make.__name__} {c.__name__}" for make, c in CHANGES]
)
def test_what_forward_changes_of_what_comes_after_it_is_seen_in_that_step(make, change):
    torch.manual_seed(1)
    net = make()
    other = copy.deepcopy(net)  # a hook's function is not copied
    models = []
    for one in (net, other):
        torch.manual_seed(2)
        models.append(Changing(one, change).to(DEVICE))
    model, plain = models
    ours, theirs = sgd(model), sgd(plain)
    x, t = batch()
    step = fused_step.TrainStep(model, nn.MSELoss(), ours)
    for _ in range(4):
        loss = step(x, t)
        expected = plain_step(plain, nn.MSELoss(), theirs, x, t)
        torch.testing.assert_close(loss, expected, rtol=B * EPS, atol=8 * EPS)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2 * B * EPS, atol=8 * EPS)
        assert (a.grad is None) == (b.grad is None)


class Meddling(nn.Module):
    """A module that changes the Sequential in which it stands."""

    def __init__(self, change) -> None:
        super().__init__()
        self.change = change

    def forward(self, x):
        self.change(self.__dict__["around"])
        return x


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.__setitem__(2, nn.Linear(HIDDEN, O)),
        lambda net: net.__setitem__(2, nn.Sequential(nn.Linear(HIDDEN, O), nn.Tanh())),
        lambda net: net.__setitem__(0, nn.Identity()),
        lambda net: net[2].register_forward_hook(lambda module, args, output: output + 1),
    ],
    ids=["by a layer", "by two modules", "what was called", "hook"],
)
def test_what_a_module_of_a_sequential_changes_in_it_is_seen(change):
    def meddled() -> nn.Sequential:
        torch.manual_seed(4)
        net = stack(Meddling(change)).to(DEVICE)
        net[1].__dict__["around"] = net
        return net

    x, t = batch()
    model, other = meddled(), meddled()
    step = fused_step.TrainStep(model, nn.MSELoss(), sgd(model))
    torch.manual_seed(6)
    loss = step(x, t)
    torch.manual_seed(6)
    expected = plain_step(other, nn.MSELoss(), sgd(other), x, t)
    torch.testing.assert_close(loss, expected, rtol=B * EPS, atol=8 * EPS)


def outer_stack(inside: nn.Module, *after: nn.Module) -> nn.Sequential:
    """A Sequential within one, in which `inside` knows the outer one."""
    layer = nn.Linear(I, 1) if after else nn.Linear(I, O)
    net = nn.Sequential(nn.Sequential(nn.Linear(I, I), inside, layer), *after).to(DEVICE)
    inside.__dict__["around"] = net
    return net


@pytest.mark.parametrize("after", [(), (nn.Flatten(0),)], ids=["", "flattened"])
@pytest.mark.parametrize(
    "change", [lambda net: net.append(nn.ReLU()), lambda net: net.pop(-1)], ids=["append", "pop"]
)
def test_sequential_that_changes_its_size_while_it_runs_fails_as_in_the_plain_loop(change, after):
    model = outer_stack(Meddling(change), *after)
    inner = model[0]
    before = copy.deepcopy(inner.state_dict())
    x, t = batch()
    step = fused_step.TrainStep(model, nn.MSELoss(), sgd(model))
    with pytest.raises(RuntimeError, match=r"changed size|mutated during"):
        step(x, t[:, 0] if after else t)
    for name, value in inner.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_flatten_that_a_module_replaces_further_out_is_not_called():
    def replace(net):
        net[1] = nn.Unflatten(1, (1, 1))

    models = []
    for _ in range(2):
        torch.manual_seed(4)
        models.append(outer_stack(Meddling(replace), nn.Flatten(0)))
    model, other = models
    x, _ = batch()
    t = torch.ones(B, 1, 1, device=DEVICE)
    step = fused_step.TrainStep(model, nn.MSELoss(), sgd(model))
    expected = plain_step(other, nn.MSELoss(), sgd(other), x, t)
    torch.testing.assert_close(step(x, t), expected)


class Stepping(nn.Module):
    """Changes the model around it, and makes a step of that, once."""

    def forward(self, x):
        around, step = self.__dict__["around"], self.__dict__.pop("step", None)
        if step is not None:
            around[2] = nn.Sequential(around[2], nn.Tanh())
            step(torch.ones(B, I, device=DEVICE), torch.ones(B, O, device=DEVICE))
        return x


def test_step_within_a_step_that_has_read_another_model():
    losses = []
    for is_plain in (False, True):
        torch.manual_seed(4)
        net = stack(Stepping()).to(DEVICE)
        optimizer = sgd(net)
        step = fused_step.TrainStep(net, nn.MSELoss(), optimizer)
        plain = functools.partial(plain_step, net, nn.MSELoss(), optimizer)
        one = plain if is_plain else step
        net[1].__dict__.update(around=net, step=one)
        losses.append(one(*batch()))
    torch.testing.assert_close(*losses)


def test_hidden_layer_does_not_outlive_the_forward_pass():
    class Watched(Layers):
        def forward(self, x):
            hidden = torch.relu(self.first(x))
            self.hidden = weakref.ref(hidden)
            return self.last(hidden)

    model = made(Watched)
    seen = []
    model.first.weight.register_hook(lambda gradient: seen.append(model.hidden()))
    step = fused_step.TrainStep(model, nn.MSELoss(), sgd(model))
    step(*batch())
    assert step.plan == "head"
    assert seen == [None]


@pytest.mark.parametrize("kind", [Returned, Nested])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_the_model_run(kind, register):
    calls = []
    model = made(kind)
    step = fused_step.TrainStep(model, nn.MSELoss(), sgd(model))
    x, t = batch()
    step(x, t)
    getattr(model, register)(lambda module, *args: calls.append(module))
    step(x, t)
    assert len(calls) == 1
    assert step.plan in LOWER
    assert f"{kind.__name__} has hooks" in step.explain(x, t)


def test_hook_that_forward_registers_on_the_last_layer_runs():
    class Hooking(Layers):
        def forward(self, x):
            self.handle = self.last.register_forward_hook(lambda module, args, output: output + 1)
            return self.last(self.first(x))

    model = made(Hooking)
    other = copy.deepcopy(model)
    x, t = batch()
    step = fused_step.TrainStep(model, nn.MSELoss(), sgd(model))
    expected = plain_step(other, nn.MSELoss(), sgd(other), x, t)
    torch.testing.assert_close(step(x, t), expected)


def test_error_in_forward_is_raised_with_the_line_of_the_source():
    class Failing(Layers):
        def forward(self, x):
            hidden = self.first(x)
            if x.shape[0] < B:
                raise RuntimeError("few rows")
            return self.last(hidden)

    model = made(Failing)
    before = copy.deepcopy(model.state_dict())
    x, t = batch()
    step = fused_step.TrainStep(model, nn.MSELoss(), sgd(model))
    with pytest.raises(RuntimeError, match="few rows") as raised:
        step(x[1:], t[1:])
    (frame,) = [f for f in traceback.extract_tb(raised.tb) if f.name == "forward"]
    assert frame.filename == __file__
    assert frame.line == 'raise RuntimeError("few rows")'
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    step(x, t)
    assert step.plan == "head"


def holding(held: list[fused_step.TrainStep]) -> type[nn.Module]:
    class Holding(Layers):
        def forward(self, x):
            return self.last(self.first(x) * len(held))

    return Holding


def test_class_and_model_are_not_kept_alive():
    held: list[fused_step.TrainStep] = []
    kind = holding(held)
    model = made(kind)
    held.append(fused_step.TrainStep(model, nn.MSELoss(), sgd(model)))
    held[0](*batch())
    assert held[0].plan == "head"
    kept = [weakref.ref(model), weakref.ref(kind)]
    del model, kind, held
    gc.collect()
    assert [ref() for ref in kept] == [None, None]
