# SPDX-License-Identifier: MIT
"""TrainStep and models of one's own class: what their forward() may say, and what is made of it."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import inspect
import traceback
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE
from oracle import plain_run, plain_step
from torch import Tensor, nn

import fused_step

B, I, HIDDEN, O = 40, 6, 9, 3
FACTOR = 0.5
NO_OPTIONS: dict[str, Tensor] = {}
OF_LAYER = ("tiny", "one-pass")
HEAD = ("head",)
LOWER = ("optimizer",)
EPS = torch.finfo(torch.float32).eps


class Layer(nn.Module):
    """One layer, to be called by the subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(I, O)


class Layers(nn.Module):
    """Two layers, to be called by the subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(I, HIDDEN), nn.Linear(HIDDEN, O)


# --- forward() that only calls a layer ----------------------------------------------------------


class Returned(Layer):
    def forward(self, input):
        return self.last(input)


class Documented(Layer):
    def forward(self, x: Tensor) -> Tensor:
        """What is said about it changes nothing."""
        # Nor this.
        return self.last(x)


class Named(Layer):
    def forward(self, x):
        y_pred = self.last(x)
        return y_pred


class NamedLikeTheInput(Layer):
    def forward(self, x):
        x: Tensor = self.last(x)
        return x


class Inherited(Returned):
    pass


class WithoutSelf(Layer):
    def forward(net, x):
        return net.last(x)


class Mixin:
    """Has a __dict__ before that of nn.Module."""


class Mixed(Mixin, Layer):
    def forward(self, x):
        return self.last(x)


class Within(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Returned()

    def forward(self, x):
        return self.net(x)


class ByPath(Within):
    def forward(self, x):
        return self.net.last(x)


class OfSequential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(Named())

    def forward(self, x):
        return self.net(x)


def decorated(function):
    function.note = "nothing else is changed"
    return function


class Decorated(Layer):
    @decorated
    def forward(self, x):
        return self.last(x)


ONLY_LAYER = [
    Returned,
    Documented,
    Named,
    NamedLikeTheInput,
    Inherited,
    WithoutSelf,
    Mixed,
    Within,
    ByPath,
    OfSequential,
    Decorated,
]

# --- forward() that does something before -------------------------------------------------------


class Nested(Layers):
    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


class InLines(Layers):
    def forward(self, x):
        x = self.first(x)
        x = F.relu(x)
        x = self.last(x)
        return x


class Residual(Layers):
    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        hidden = hidden + hidden.mean(-1, keepdim=True)
        out: Tensor = self.last(hidden)
        return out


class Branching(Layers):
    def forward(self, x):
        hidden = self.first(x)
        if self.training:
            self.mean = hidden.mean().detach()
            hidden = F.dropout(hidden, 0.5)
        for power in range(2):
            hidden = hidden + hidden**power
        with torch.no_grad():
            scale = 1 / (1 + hidden.abs().max())
        try:
            hidden = hidden * scale
        finally:
            scale = None
        return self.last(hidden)


class Counting(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.hidden = self.first(x)
        return self.last(self.hidden)


class WithGlobals(Layers):
    def forward(self, x):
        return self.last(FACTOR * self.first(x))


class WithSuper(InLines):
    def forward(self, x):
        return self.last(self.first(x) + super().forward(x).mean())


class WithFunctions(Layers):
    def forward(self, x):
        def squashed(t):
            return torch.tanh(t)

        both = [f(self.first(x)) for f in (squashed, lambda t: t / 2)]
        return self.last(hidden := both[0] + both[1])  # noqa: F841


class Flattening(Layers):
    def forward(self, x):
        return self.last(self.first(x).view(x.size(0), -1))


class ToSequential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(I, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, O))

    def forward(self, x):
        return self.net(x)


class OfBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.net = nn.BatchNorm1d(I), Nested()

    def forward(self, x):
        x = self.norm(x)
        return self.net(x)


def with_closure(factor: float) -> type[nn.Module]:
    class Closing(Layers):
        def forward(self, x):
            return self.last(self.first(x) * factor)

    return Closing


MORE_THAN_LAYER = [
    Nested,
    InLines,
    Residual,
    Branching,
    Counting,
    WithGlobals,
    WithSuper,
    WithFunctions,
    Flattening,
    ToSequential,
    OfBlocks,
    with_closure(0.25),
]

# --- forward() that is not read -----------------------------------------------------------------


class Scaled(Layer):
    def forward(self, x):
        return self.last(x) * 2


class Returning(Layer):
    def forward(self, x):
        if x.shape[0] == B:
            return self.last(x)
        return self.last(-x)


class EarlyReturning(Layer):
    def forward(self, x):
        if x.shape[0] == B:
            return self.last(x) + 1
        return self.last(x)


class InWith(Layer):
    def forward(self, x):
        with torch.enable_grad():
            return self.last(x)


class Keyword(Layer):
    def forward(self, x):
        return self.last(input=x)


class Keywords(Layer):
    def forward(self, x):
        return self.last(x, **NO_OPTIONS)


class Starred(Layer):
    def forward(self, x):
        return self.last(*(x,))


class Anything(Layer):
    def forward(self, *args):
        return self.last(*args)


class Optional(Layer):
    def forward(self, x, factor=1.0):
        return self.last(x * factor)


class Kept(Layer):
    def forward(self, x):
        global kept
        kept = self.last(x)
        return kept


class KeptWithin(Layer):
    def forward(self, x):
        self.seen = lambda: out
        out = self.last(x)
        return out


class KeptInput(Layer):
    def forward(self, x):
        self.seen = lambda: x
        x = self.last(x)
        return x


def hide(owner: nn.Module) -> None:
    """Puts something else in front of the layer that the owner has."""
    owner.__dict__["last"] = nn.Sequential(owner._modules["last"], nn.Tanh())


class OfMethod(Layer):
    def head(self, x):
        return self.last(x) + 1

    def forward(self, x):
        return self.head(x)


class OfProperty(Layer):
    @property
    def head(self):
        return lambda x: self.last(x) + 1

    def forward(self, x):
        return self.head(x)


class Mangled(Layer):
    def forward(self, x):
        return self.__last(x)

    def __last(self, x):
        return self.last(x) - 1


class MangledModule(Layer):
    """Python looks for _MangledModule__last."""

    def __init__(self) -> None:
        super().__init__()
        self.__last = self.last
        self.add_module("__last", nn.Linear(I, O))

    def forward(self, x):
        return self.__last(x)


class Counted(dict):
    def __getitem__(self, name):
        found = super().__getitem__(name)
        return (lambda x: found(x) + 1) if name == "last" else found


class OwnDictionary(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.__dict__["_modules"] = Counted(self._modules)

    def forward(self, x):
        return self.last(x)


class OfInstance(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.__dict__["end"] = torch.tanh

    def forward(self, x):
        return self.end(self.last(x))


class HiddenByInstance(Layer):
    def __init__(self) -> None:
        super().__init__()
        hide(self)

    def forward(self, x):
        return self.last(x)


class HiddenByClass(Layer):
    @property
    def last(self):
        return lambda x: self._modules["last"](x) + 1

    def forward(self, x):
        return self.last(x)


class Getattr(Layer):
    def __getattr__(self, name):
        found = super().__getattr__(name)
        return (lambda x: found(x) + 1) if name == "last" else found

    def forward(self, x):
        return self.last(x)


class Getattribute(Layer):
    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        return (lambda x: found["last"](x) + 1) if name == "_modules" and len(found) > 1 else found

    def forward(self, x):
        return self.last(x)


class Called(Returned):
    def __call__(self, x):
        return super().__call__(x) + 1


class CallImpl(Returned):
    def _call_impl(self, x):
        return super()._call_impl(x) + 1


class Lambda(Layer):
    forward = lambda self, x: self.last(x)  # noqa: E731


class Wrapped(Layer):
    @functools.wraps(Returned.forward)
    def forward(self, x):
        return -Returned.forward(self, x)


def doubling(function):
    @functools.wraps(function)
    def doubled(self, x):
        return 2 * function(self, x)

    return doubled


class Doubled(Layer):
    @doubling
    def forward(self, x):
        return self.last(x)


NOT_READ = [
    Scaled,
    Returning,
    EarlyReturning,
    InWith,
    Keyword,
    Keywords,
    Starred,
    Anything,
    Optional,
    Kept,
    KeptWithin,
    KeptInput,
    OfMethod,
    OfProperty,
    Mangled,
    MangledModule,
    OwnDictionary,
    OfInstance,
    HiddenByInstance,
    HiddenByClass,
    Getattr,
    Getattribute,
    Called,
    CallImpl,
    Lambda,
    Wrapped,
    Doubled,
]

# --- what is made of them -----------------------------------------------------------------------


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, t = torch.randn(B, I, generator=generator), torch.randn(B, O, generator=generator)
    return x.to(DEVICE), t.to(DEVICE)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    return kind().to(DEVICE)


def assert_trains_like_plain(model: nn.Module, plans: tuple[str, ...], change=None) -> None:
    """Some steps against the five lines on a copy; `change` is made to both after the third."""
    other = copy.deepcopy(model)
    ours, theirs = sgd(model), sgd(other)
    x, t = batch()
    step = fused_step.TrainStep(model, nn.MSELoss(), ours)
    for number in range(5):
        if change is not None and number == 3:
            change(model)
            change(other)
        torch.manual_seed(number)
        loss = step(x, t)
        assert change is not None or step.plan in plans, step.explain(x, t)
        torch.manual_seed(number)
        expected = plain_step(other, nn.MSELoss(), theirs, x, t)
        torch.testing.assert_close(loss, expected, rtol=B * EPS, atol=8 * EPS)
    assert step.plan in plans, step.explain(x, t)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2 * B * EPS, atol=8 * EPS)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ONLY_LAYER)
def test_class_that_only_calls_a_layer_trains_with_the_bits_of_the_layer(kind):
    model = made(kind)
    (weight, bias) = model.parameters()
    layer = nn.Linear(I, O).to(DEVICE)
    layer.load_state_dict({"weight": weight, "bias": bias})
    x, t = batch()
    step = fused_step.TrainStep(model, nn.MSELoss(), sgd(model))
    step_of_layer = fused_step.TrainStep(layer, nn.MSELoss(), sgd(layer))
    assert step.explain(x, t) == step_of_layer.explain(x, t)
    for _ in range(3):
        assert torch.equal(step(x, t), step_of_layer(x, t))
        assert step.plan == step_of_layer.plan
        assert step.plan in OF_LAYER
    assert torch.equal(step.run(x, t, epochs=2), step_of_layer.run(x, t, epochs=2))
    assert torch.equal(weight, layer.weight)
    assert torch.equal(bias, layer.bias)


@pytest.mark.parametrize("kind", MORE_THAN_LAYER)
def test_class_that_ends_in_a_layer_has_the_plan_head(kind):
    assert_trains_like_plain(made(kind), HEAD)


@pytest.mark.parametrize("kind", [InLines, ToSequential])
def test_in_a_sequential_they_are_looked_through(kind):
    model = nn.Sequential(nn.Linear(I, I), nn.Sequential(nn.ReLU(), made(kind))).to(DEVICE)
    assert_trains_like_plain(model, HEAD)


def test_run_is_the_loop_of_steps():
    model = made(Residual)
    other = copy.deepcopy(model)
    x, t = batch()
    step = fused_step.TrainStep(model, nn.MSELoss(), sgd(model))
    losses = step.run(x, t, epochs=2, batch_size=16)
    expected = plain_run(other, nn.MSELoss(), sgd(other), x, t, epochs=2, batch_size=16)
    torch.testing.assert_close(losses, torch.as_tensor(expected).to(losses), rtol=1e-5, atol=1e-6)
    assert step.plan == "head"


@pytest.mark.parametrize("kind", NOT_READ)
def test_class_whose_forward_is_not_read_trains_like_the_plain_loop(kind):
    assert_trains_like_plain(made(kind), LOWER)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Scaled, "in Scaled, whose forward does not end in `return self.layer"),
        (Optional, "in Optional, whose forward takes something else than one input"),
        (OfMethod, "in OfMethod, whose forward does not end in a call of one of its modules"),
        (Lambda, "in Lambda, whose forward has no source at hand that compiles to it"),
        (Called, "in Called, whose calls or attributes are not those of nn.Module"),
        (Nested, "the model is more than one nn.Linear: Nested's forward does more"),
    ],
)
def test_explain_says_what_of_a_class_keeps_it_from_a_deeper_plan(kind, reason):
    model = made(kind)
    said = fused_step.TrainStep(model, nn.MSELoss(), sgd(model)).explain(*batch())
    assert reason in said


# --- where it changes ---------------------------------------------------------------------------


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


def alike(model: nn.Module, change, steps: int = 3) -> fused_step.TrainStep:
    """Steps, `change` made to the model, and more steps: against the five lines, gradients too."""
    other = copy.deepcopy(model)
    ours, theirs = sgd(model), sgd(other)
    x, t = batch()
    step = fused_step.TrainStep(model, nn.MSELoss(), ours)
    # The second step is read as the first one was: the momentum buffers were new in that.
    for number in range(3 + steps):
        if number == 3:
            change(model)
            change(other)
        expected = plain_step(other, nn.MSELoss(), theirs, x, t)
        torch.testing.assert_close(step(x, t), expected, rtol=B * EPS, atol=8 * EPS)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2 * B * EPS, atol=8 * EPS)
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=2 * B * EPS, atol=8 * EPS)
    return step


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
    assert "Returned has hooks" in step.explain(x, t) or kind is not Returned


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


# --- where the source is ------------------------------------------------------------------------

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
