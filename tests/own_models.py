# SPDX-License-Identifier: MIT
"""Models of one's own class, and what trains them beside the plain loop."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from device import DEVICE
from oracle import plain_step
from torch import Tensor, nn

import fused_step

B, I, HIDDEN, O = 40, 6, 9, 3
FACTOR = 0.5
OF_LAYER = ("tiny", "one-pass")
HEAD = ("head",)
LOWER = ("optimizer",)
EPS = torch.finfo(
    torch.float32
).eps  # B of them: each term of a sum over the batch rounded another way


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


class OfSubclass(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(I, O))


class LinearOfItsOwn(nn.Linear):
    def __init__(self) -> None:
        super().__init__(I, O)


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
    OfSubclass,
    LinearOfItsOwn,
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


class Perceptron(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(I, HIDDEN), nn.ReLU(), LinearOfItsOwn())
        self[-1].weight = nn.Parameter(torch.randn(O, HIDDEN))


class OfList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(I, HIDDEN), nn.Linear(HIDDEN, O)])

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


class OfListOfBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Tanh(), Returned())])

    def forward(self, x):
        return self.blocks[0][1].last(x)


class Optional(Layers):
    def forward(self, x, factor=2.0, *more, mask=None, **options):
        hidden = torch.tanh(factor * self.first(x))
        return self.last(hidden if mask is None else hidden * mask)


class OnlyOptional(Layer):
    def forward(self, x, mask=None):
        return self.last(x)


MORE_THAN_LAYER = [
    Perceptron,
    OfList,
    OfListOfBlocks,
    Optional,
    OnlyOptional,
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

# --- what trains them ----------------------------------------------------------------------------


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


def hide(owner: nn.Module) -> None:
    """Puts something else in front of the layer that the owner has."""
    owner.__dict__["last"] = nn.Sequential(owner._modules["last"], nn.Tanh())
