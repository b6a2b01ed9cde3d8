# SPDX-License-Identifier: MIT
"""TrainStep and models of one's own class: what their forward() may say, and what is made of it."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from device import DEVICE
from oracle import plain_run
from own_models import (
    EPS,
    HEAD,
    LOWER,
    MORE_THAN_LAYER,
    OF_LAYER,
    ONLY_LAYER,
    B,
    I,
    InLines,
    Layer,
    Nested,
    O,
    Residual,
    Returned,
    ToSequential,
    assert_trains_like_plain,
    batch,
    hide,
    made,
    sgd,
)
from torch import Tensor, nn

import fused_step

NO_OPTIONS: dict[str, Tensor] = {}


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


class ByNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.number = nn.ModuleList([nn.Linear(I, O)]), 0

    def forward(self, x):
        return self.layers[self.number](x)


class OutOfRange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = ListOfItsOwn([nn.Linear(I, O)])

    def forward(self, x):
        return self.layers[7](x)


class ListOfItsOwn(nn.ModuleList):
    def __getitem__(self, number):
        return super().__getitem__(0)


class TurnedAround(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(O, O), nn.Linear(I, O))

    def __iter__(self):
        return reversed(list(super().__iter__()))


class HooksOfTheClass(nn.Linear):
    _forward_hooks = property(
        lambda self: {1: lambda module, args, output: 2 * output}, lambda self, value: None
    )

    def __init__(self) -> None:
        super().__init__(I, O)


class WithProperty(nn.Linear):
    def __init__(self) -> None:
        super().__init__(I, O)
        self.scale = 2.0

    @property
    def weight(self):
        return self.scale * self._parameters["weight"]


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
    ByNumber,
    OutOfRange,
    TurnedAround,
    HooksOfTheClass,
    WithProperty,
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
    torch.testing.assert_close(
        losses, torch.as_tensor(expected).to(losses), rtol=B * EPS, atol=8 * EPS
    )
    assert step.plan == "head"


@pytest.mark.parametrize("kind", NOT_READ)
def test_class_whose_forward_is_not_read_trains_like_the_plain_loop(kind):
    assert_trains_like_plain(made(kind), LOWER)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Scaled, "in Scaled, whose forward does not end in `return self.layer"),
        (Anything, "in Anything, whose forward takes no input, or is no plain function"),
        (TurnedAround, "a Sequential has an __iter__ of its own"),
        (WithProperty, "the layer's weight and bias are not Parameters of its own"),
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
