# SPDX-License-Identifier: MIT
"""TrainStep and losses that the user has written: a function, or a class, that is read or not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import FunctionType, ModuleType

import pytest
import torch
import torch as th
import torch.nn.functional as F
from device import DEVICE
from oracle import DTYPES, plain_step
from own_models import EPS, HEAD, HIDDEN, LOWER, OF_LAYER, B, I, O, batch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fused_step

LR = 0.002  # sums of B * O errors have gradients so much longer than means

# --- read ---------------------------------------------------------------------------------------


def documented(output: Tensor, target: Tensor) -> Tensor:
    """What is said about it changes nothing."""
    # Nor this.
    return ((output - target) ** 2).mean()


def of_the_book(t_p, t_c):
    squared_diffs = (t_p - t_c) ** 2
    return squared_diffs.mean()


def in_lines(y_hat, y):
    error = y_hat - y
    squared = error.pow(2)
    loss = squared.mean()
    return loss


def called(y_hat, y):
    loss = F.mse_loss(y_hat, y)
    return loss


def within() -> Callable[[Tensor, Tensor], Tensor]:
    def loss(output, target):
        return (output - target).square().sum()

    return loss


class Mean(nn.Module):
    def forward(self, output, target):
        return torch.mean((output - target) ** 2)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, output, target):
        diff = target - output
        return torch.sum(diff * diff)


class Inherited(Mean):
    pass


class Renamed(nn.MSELoss):
    pass


MEANS = {
    "documented": documented,
    "of the book": of_the_book,
    "in lines": in_lines,
    "called": called,
    "square": lambda a, b: torch.square(a - b).mean(),
    "product": lambda a, b: ((b - a) * (b - a)).mean(),
    "torch.mean": lambda a, b: torch.mean((a - b) ** 2),
    "torch.pow": lambda a, b: torch.mean(torch.pow(a - b, 2)),
    "another name": lambda a, b: th.mean((a - b).square()),
    "F": lambda output, target: F.mse_loss(output, target),
    "F, turned": lambda output, target: F.mse_loss(target, output, reduction="mean"),
    "nn.functional": lambda output, target: nn.functional.mse_loss(output, target),
    "torch.nn.functional": lambda output, target: torch.nn.functional.mse_loss(output, target),
    "imported": lambda output, target: mse_loss(output, target),
    "class": Mean(),
    "inherited": Inherited(),
    "subclass": Renamed(),
}
SUMS = {
    "within": within(),
    "pow": lambda a, b: (b - a).pow(2).sum(),
    "torch.sum": lambda a, b: torch.sum((a - b) ** 2),
    "F": lambda output, target: F.mse_loss(output, target, reduction="sum"),
    "class": Sum(),
    "subclass": Renamed(reduction="sum"),
}
READ = [pytest.param(loss, "mean", id=f"{name}, mean") for name, loss in MEANS.items()] + [
    pytest.param(loss, "sum", id=f"{name}, sum") for name, loss in SUMS.items()
]

# --- not read -----------------------------------------------------------------------------------


def made(text: str, **globals_: object) -> FunctionType:
    """A function `loss` of its own module, whose globals are these."""
    module: dict[str, object] = dict(globals_)
    exec(text, module)
    loss = module["loss"]
    assert isinstance(loss, FunctionType)
    return loss


MEAN = "loss = lambda a, b: torch.mean((a - b) ** 2)"

seen: list[Tensor] = []
half = 0.5


def shadowed() -> Callable[[Tensor, Tensor], Tensor]:
    torch = Shadow()
    return lambda a, b: torch.mean((a - b) ** 2)


def with_module_of_ones_own() -> FunctionType:
    """Another module may come to its address, unseen."""
    ops = ModuleType("ops")
    ops.mse_loss = F.mse_loss
    return made("loss = lambda a, b: ops.mse_loss(a, b)", ops=ops)


def with_constant(value: object) -> FunctionType:
    loss = made(MEAN, torch=torch)
    code = loss.__code__
    loss.__code__ = code.replace(co_consts=(*code.co_consts, value))
    return loss


class Shadow:
    @staticmethod
    def mean(t: Tensor) -> Tensor:
        return 2 * t.mean()


shadow = Shadow()


def kept(output, target):
    seen[:] = [output]
    return ((output - target) ** 2).mean()


def rows(output, target):
    return ((output - target) ** 2).sum() / len(output)


def with_default(output, target, factor=2.0):
    return factor * ((output - target) ** 2).mean()


def reassigned(output, target):
    output = output - target
    return (output * target).mean()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 0.5

    def forward(self, output, target):
        return self.factor * ((output - target) ** 2).mean()


class Doubled(nn.MSELoss):
    def forward(self, output, target):
        return 2 * super().forward(output, target)


class Called(Mean):
    def __call__(self, output, target):
        return 3 * self.forward(output, target)


class ClassReduction(nn.MSELoss):
    reduction = property(lambda self: "sum", lambda self, value: None)


class WithoutInit(Mean):
    def __init__(self) -> None:
        self.name = "its hooks are missing"


class HooksOfTheClass(Mean):
    _forward_hooks = property(
        lambda self: {1: lambda module, args, output: 2 * output}, lambda self, value: None
    )


class Method:
    def loss(self, output, target):
        return ((output - target) ** 2).mean()


def patched_instance() -> nn.Module:
    loss = Mean()
    loss.forward = lambda output, target: (output - target).abs().mean()
    return loss


NOT_READ = {
    "cube": lambda a, b: ((a - b) ** 3).mean(),
    "float": lambda a, b: ((a - b) ** 2.0).mean(),
    "absolute": lambda a, b: (a - b).abs().mean(),
    "added": lambda a, b: ((a + b) ** 2).mean(),
    "of one": lambda a, b: ((a - a.detach() / 2) ** 2).mean(),
    "output alone": lambda a, b: ((a - a) ** 2).mean() + a.mean(),
    "half": lambda a, b: half * ((a - b) ** 2).mean(),
    "half of it": lambda a, b: ((a - b) ** 2 / 2).mean(),
    "max": lambda a, b: ((a - b) ** 2).max(),
    "rows": rows,
    "shadowed": shadowed(),
    "shadow": lambda a, b: shadow.mean((a - b) ** 2),
    "kept": kept,
    "with default": with_default,
    "reassigned": reassigned,
    "root": lambda a, b: torch.sqrt(torch.mean((a - b) ** 2)),
    "l1": lambda a, b: F.l1_loss(a, b),
    "scaled": Scaled(),
    "doubled": Doubled(),
    "called": Called(),
    "reduction of the class": ClassReduction(),
    "hooks of the class": HooksOfTheClass(),
    "module of one's own": with_module_of_ones_own(),
    "constant without a hash": with_constant([1]),
    "method": Method().loss,
    "forward of the instance": patched_instance(),
}

# --- what trains with them ----------------------------------------------------------------------


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)


def layer() -> nn.Module:
    torch.manual_seed(5)
    return nn.Linear(I, O).to(DEVICE)


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(I, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, O)).to(DEVICE)


MODELS = {"layer": (layer, OF_LAYER), "network": (network, HEAD)}
each_model = pytest.mark.parametrize("model", MODELS)


def assert_trains_like_plain(
    make: Callable[[], nn.Module], loss_function, plans: tuple[str, ...], change=None
) -> None:
    """Some steps against the five lines; `change` is made after the third."""
    model, other = make(), make()
    ours, theirs = sgd(model), sgd(other)
    x, t = batch()
    step = fused_step.TrainStep(model, loss_function, ours)
    for number in range(5):
        if change is not None and number == 3:
            assert step.plan in OF_LAYER + HEAD, step.explain(x, t)
            change()
        loss = step(x, t)
        expected = plain_step(other, loss_function, theirs, x, t)
        torch.testing.assert_close(loss, expected, rtol=B * EPS, atol=8 * EPS)
    assert step.plan in plans, step.explain(x, t)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2 * B * EPS, atol=8 * EPS)


@each_model
@pytest.mark.parametrize(("loss_function", "reduction"), READ)
def test_squared_error_of_ones_own_trains_with_the_bits_of_mse_loss(
    model, loss_function, reduction
):
    make, plans = MODELS[model]
    a, b = make(), make()
    x, t = batch()
    step = fused_step.TrainStep(a, loss_function, sgd(a))
    of_torch = fused_step.TrainStep(b, nn.MSELoss(reduction=reduction), sgd(b))
    assert step.explain(x, t) == of_torch.explain(x, t)
    for _ in range(3):
        assert torch.equal(step(x, t), of_torch(x, t))
        assert step.plan == of_torch.plan
        assert step.plan in plans
    assert torch.equal(step.run(x, t, epochs=2), of_torch.run(x, t, epochs=2))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


@each_model
@pytest.mark.parametrize(("loss_function", "reduction"), READ)
def test_squared_error_of_ones_own_trains_like_the_plain_loop(model, loss_function, reduction):
    make, plans = MODELS[model]
    assert_trains_like_plain(make, loss_function, plans)


@each_model
@pytest.mark.parametrize("name", NOT_READ)
def test_other_loss_trains_like_the_plain_loop(model, name):
    seen.clear()
    assert_trains_like_plain(MODELS[model][0], NOT_READ[name], LOWER)
    assert len(seen) == (name == "kept")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_gives_what_it_gives_with_mse_loss(dtype):
    a, b = layer().to(dtype), layer().to(dtype)
    x, t = (data.to(dtype) for data in batch())
    step = fused_step.TrainStep(a, of_the_book, sgd(a))
    of_torch = fused_step.TrainStep(b, nn.MSELoss(), sgd(b))
    for _ in range(3):
        assert torch.equal(step(x, t), of_torch(x, t))
    assert step.plan in OF_LAYER
    assert torch.equal(a.weight, b.weight)


@each_model
def test_no_rows_give_the_mean_of_nothing(model):
    make, plans = MODELS[model]
    a, b = make(), make()
    x, t = torch.zeros(0, I, device=DEVICE), torch.zeros(0, O, device=DEVICE)
    step = fused_step.TrainStep(a, of_the_book, sgd(a))
    expected = plain_step(b, of_the_book, sgd(b), x, t)
    torch.testing.assert_close(step(x, t), expected, equal_nan=True)
    assert step.plan in plans
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


@each_model
def test_targets_that_broadcast_do_so_silently_as_in_the_function(model, recwarn):
    make, _ = MODELS[model]
    a, b = make(), make()
    x, t = batch()
    step = fused_step.TrainStep(a, of_the_book, sgd(a))
    for target in (t[:1], t[:, :1]):
        loss = step(x, target)
        assert step.plan in LOWER
        expected = plain_step(b, of_the_book, sgd(b), x, target)
        torch.testing.assert_close(loss, expected, rtol=B * EPS, atol=8 * EPS)
    assert not recwarn


@each_model
def test_loss_without_hooks_is_the_error_of_the_plain_loop(model):
    x, t = batch()
    net = MODELS[model][0]()
    step = fused_step.TrainStep(net, WithoutInit(), sgd(net))
    with pytest.raises(AttributeError, match="_backward_hooks"):
        step(x, t)


AUTOCAST = {
    "operators": (of_the_book, LOWER),
    "class": (Sum(), LOWER),
    "mse_loss": (called, OF_LAYER),
}


@pytest.mark.skipif(DEVICE.type != "cpu", reason="lists of autocast: those of the CPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", AUTOCAST)
def test_losses_of_16_bit_targets_under_autocast_have_the_dtype_of_the_plain_loop(name, dtype):
    loss_function, plans = AUTOCAST[name]
    a, b = layer(), layer()
    x, t = batch()
    step = fused_step.TrainStep(a, loss_function, sgd(a))
    theirs = sgd(b)
    with torch.autocast("cpu", dtype, cache_enabled=False):
        for target, expected_plans in ((t.to(dtype), plans), (t, OF_LAYER)):
            loss = step(x, target)
            assert step.plan in expected_plans
            expected = plain_step(b, loss_function, theirs, x, target)
            assert loss.dtype == expected.dtype
            if step.plan in LOWER:
                assert torch.equal(loss, expected)


def test_explain_says_what_of_a_loss_is_not_read():
    model = layer()
    x, t = batch()

    def said(loss_function):
        return fused_step.TrainStep(model, loss_function, sgd(model)).explain(x, t)

    not_read = "not read as a mean or sum of squared errors"
    assert f"the loss is a function that is {not_read}" in said(NOT_READ["cube"])
    assert f"the loss is Scaled, whose forward is {not_read}" in said(Scaled())
    assert f"the loss is L1Loss, whose forward is {not_read}" in said(nn.L1Loss())
    assert "calling something else than PyTorch's functions" in said(NOT_READ["shadow"])
    assert "the loss is Called, whose calls or attributes" in said(Called())
    assert "the loss is method, not" in said(Method().loss)


# --- what changes while they train --------------------------------------------------------------


@each_model
def test_another_function_by_the_name_is_seen(model):
    loss = made(MEAN, torch=torch)

    def change() -> None:
        loss.__globals__["torch"] = shadow

    assert_trains_like_plain(MODELS[model][0], loss, LOWER, change)


@each_model
def test_other_names_of_the_module_may_change(model):
    loss = made(MEAN, torch=torch)
    make, plans = MODELS[model]
    assert_trains_like_plain(make, loss, plans, lambda: loss.__globals__.update(batch=3))


@each_model
def test_name_that_is_gone_is_an_error_as_in_the_plain_loop(model):
    loss = made(MEAN, torch=torch)
    x, t = batch()
    net = MODELS[model][0]()
    before = copy.deepcopy(net.state_dict())
    step = fused_step.TrainStep(net, loss, sgd(net))
    del loss.__globals__["torch"]
    with pytest.raises(NameError, match="torch"):
        step(x, t)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


@each_model
def test_other_code_of_the_function_is_seen(model):
    loss = made(MEAN, torch=torch)
    other = made("loss = lambda a, b: torch.mean((a - b) ** 4)")
    change = lambda: setattr(loss, "__code__", other.__code__)  # noqa: E731
    assert_trains_like_plain(MODELS[model][0], loss, LOWER, change)


@each_model
def test_other_forward_of_the_class_is_seen(model, monkeypatch):
    class Own(nn.Module):
        def forward(self, a, b):
            return ((a - b) ** 2).mean()

    change = lambda: setattr(Own, "forward", lambda self, a, b: ((a - b) ** 4).mean())  # noqa: E731
    assert_trains_like_plain(MODELS[model][0], Own(), LOWER, change)


def test_hooks_of_a_loss_of_ones_own_run():
    loss, calls = Mean(), []
    handle = None

    def change() -> None:
        nonlocal handle
        handle = loss.register_forward_hook(lambda *_: calls.append(1))

    assert_trains_like_plain(layer, loss, LOWER, change)
    assert len(calls) == 4  # two steps of each


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch, "mean"),
        (torch.Tensor, "__pow__"),
        (torch.Tensor, "__sub__"),
        (nn.Parameter, "__rsub__"),
        (torch.Tensor, "backward"),
        (torch.Tensor, "detach"),
        (torch.autograd, "backward"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@each_model
def test_replaced_functions_of_torch_are_seen(model, owner, name, monkeypatch):
    loss = made(MEAN, torch=torch)
    of_torch = getattr(owner, name)
    another = lambda *args, **options: of_torch(*args, **options)  # noqa: E731
    with monkeypatch.context() as patches:
        change = lambda: patches.setattr(owner, name, another)  # noqa: E731
        assert_trains_like_plain(MODELS[model][0], loss, LOWER, change)


@pytest.mark.parametrize("module", ["linear", "loss"])
@each_model
def test_another_functional_in_torchs_modules_is_seen(model, module, monkeypatch):
    class Doubling:
        @staticmethod
        def linear(*args):
            return 2 * F.linear(*args)

        @staticmethod
        def mse_loss(*args, **kwargs):
            return 2 * F.mse_loss(*args, **kwargs)

    of_torch = getattr(nn.modules, module)
    with monkeypatch.context() as patches:
        change = lambda: patches.setattr(of_torch, "F", Doubling)  # noqa: E731
        assert_trains_like_plain(MODELS[model][0], nn.MSELoss(), LOWER, change)
