# SPDX-License-Identifier: MIT
"""TrainStep's plan `head`: any model that ends in a linear layer, under any optimizer."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE
from oracle import (
    DTYPES,
    FUSED_PLANS,
    OPTION_SETS,
    Problem,
    assert_trains_like_plain,
    describe,
    plain_run,
    plain_step,
)
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

import fused_step

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
HEAD = ("head",)
LOWER = ("optimizer", "plain")
B, I, HIDDEN, O = 40, 6, 9, 3

# What comes before the last layer; made anew at each call.
BODIES: dict[str, Callable[[], list[nn.Module]]] = {
    "layer": lambda: [nn.Linear(I, HIDDEN)],
    "layers": lambda: [nn.Linear(I, 5), nn.Tanh(), nn.Linear(5, HIDDEN), nn.ReLU()],
    "Sequential": lambda: [nn.Sequential(nn.Linear(I, HIDDEN), nn.Sigmoid())],
    "normalised": lambda: [nn.Linear(I, HIDDEN), nn.LayerNorm(HIDDEN)],
    "running statistics": lambda: [nn.Linear(I, HIDDEN), nn.BatchNorm1d(HIDDEN)],
    "dropout": lambda: [nn.Linear(I, HIDDEN), nn.Dropout(0.5)],
    "own class": lambda: [Residual()],
}
each_body = pytest.mark.parametrize("body", BODIES)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(I, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.first(input)
        return hidden + torch.tanh(self.second(hidden))


class ProblemOfHead(Problem):
    """A linear regression that no plan of a linear layer takes: SGD has a parameter more."""

    def build(self, dtype=None):
        model, loss_function, optimizer = super().build(dtype)
        optimizer.add_param_group(
            {**optimizer.param_groups[-1], "params": [nn.Parameter(torch.ones(2))]}
        )
        return model, loss_function, optimizer


def head_of(problem: Problem) -> ProblemOfHead:
    return ProblemOfHead(**{f.name: getattr(problem, f.name) for f in dataclasses.fields(Problem)})


def net(body: list[nn.Module], outputs: int = O, dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(*body, nn.Linear(HIDDEN, outputs)).to(dtype)


def batch(dtype: torch.dtype = torch.float32, rows: int = B, outputs: int = O):
    generator = torch.Generator().manual_seed(rows + outputs)
    return (
        torch.randn(rows, I, generator=generator).to(dtype),
        torch.randn(rows, outputs, generator=generator).to(dtype),
    )


def twins(model: nn.Module, make: Callable[..., torch.optim.Optimizer]):
    """The model and a copy of it, each with an optimizer of its own."""
    other = copy.deepcopy(model)
    return model, make(model.parameters()), other, make(other.parameters())


def assert_same(model: nn.Module, other: nn.Module, **tolerance: float) -> None:
    """Equal parameters, buffers and gradients, bit for bit unless there is a tolerance."""
    same = functools.partial(
        torch.testing.assert_close, equal_nan=True, **(tolerance or {"rtol": 0, "atol": 0})
    )
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        same(p, q, msg=lambda said, name=name: f"{name}: {said}")
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            same(p.grad, q.grad)
    for p, q in zip(model.buffers(), other.buffers(), strict=True):
        same(p, q)


# Sums over the batch, each of whose terms may be rounded one way here and the other way there; what
# cancels is of order one. Stricter are the test by the rule and the one bit for bit.
_EPS = torch.finfo(torch.float32).eps
CLOSE = {"rtol": 2 * B * _EPS, "atol": 8 * _EPS}


def assert_head_trains_alike(pair, x: Tensor, t: Tensor, steps: int = 3, loss_function=None):
    """Some steps of one of the twins by TrainStep, of the other by the five lines."""
    model, ours, other, theirs = pair
    loss_function = loss_function or nn.MSELoss()
    step = fused_step.TrainStep(model, loss_function, ours)
    for number in range(steps):
        torch.manual_seed(number)
        loss = step(x, t)
        assert step.plan == "head"
        torch.manual_seed(number)
        expected = plain_step(other, loss_function, theirs, x, t)
        torch.testing.assert_close(loss, expected, equal_nan=True, **CLOSE)
    assert_same(model, other, **CLOSE)


# --- what it computes -----------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("options", OPTION_SETS, ids=describe)
def test_last_layer_alone_trains_by_the_rule(options, dtype):
    for (rows, outputs), reduction, bias in itertools.product(
        ((37, 1), (41, 6), (5, 33), (1, 3), (0, 2)), ("mean", "sum"), (True, False)
    ):
        problem = Problem.random(
            rows, 13, outputs, dtype=dtype, reduction=reduction, bias=bias, options=options
        )
        assert_trains_like_plain(head_of(problem), plans=HEAD)


@each_dtype
@each_body
@pytest.mark.parametrize("outputs", [1, 4, 64])
def test_head_is_doors_two_and_three_after_the_body(outputs, body, dtype):
    """Bit for bit: each of them is held to the plain loop by tests of its own.

    Door 2 multiplies a gradient by 2 / (rows · outputs) when it is summed, the head each residual:
    the same for a power of two.
    """
    torch.manual_seed(0)
    sgd = functools.partial(fused_step.SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
    model, optimizer, other, other_optimizer = twins(net(BODIES[body](), outputs, dtype), sgd)
    step = fused_step.TrainStep(model, nn.MSELoss(), optimizer)
    x, t = batch(dtype, rows=32, outputs=outputs)
    for number in range(3):
        torch.manual_seed(number)
        loss = step(x, t)
        assert step.plan == "head"
        assert not loss.requires_grad
        torch.manual_seed(number)
        last = other[-1]
        expected = fused_step.linear_mse_loss(
            other[:-1](x), last.weight, t, linear_bias=last.bias, reduction="mean"
        )
        expected.backward()
        other_optimizer.step(zero_grad=True)
        assert torch.equal(loss, expected.detach())
    assert_same(model, other)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "fused SGD": functools.partial(fused_step.SGD, lr=0.05, momentum=0.9),
    "clipping SGD": functools.partial(fused_step.SGD, lr=0.05, max_grad_norm=0.1),
    # Large eps: their steps then follow the gradient's size, and not the sign of its rounding.
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.01, eps=1e-2),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=0.01, eps=1e-2),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=0.01, eps=1e-2),
}


@each_body
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_network_trains_like_the_plain_loop(optimizer, body):
    torch.manual_seed(0)
    pair = twins(net(BODIES[body]()), OPTIMIZERS[optimizer])
    assert_head_trains_alike(pair, *batch(), steps=5)


@pytest.mark.parametrize("optimizer", ["SGD", "fused SGD", "AdamW"])
def test_run_is_the_loop_of_steps(optimizer):
    torch.manual_seed(0)
    model, ours, other, theirs = twins(net(BODIES["layers"]()), OPTIMIZERS[optimizer])
    x, t = batch(rows=50)
    step = fused_step.TrainStep(model, nn.MSELoss(), ours)
    options = {"epochs": 2, "batch_size": 16, "shuffle": True}
    losses = step.run(x, t, generator=torch.Generator().manual_seed(3), **options)
    assert step.plan == "head"
    expected = plain_run(
        other, nn.MSELoss(), theirs, x, t, generator=torch.Generator().manual_seed(3), **options
    )
    torch.testing.assert_close(losses, expected, **CLOSE)
    assert_same(model, other, **CLOSE)


@pytest.mark.parametrize("loss_function", [F.mse_loss, functools.partial(F.mse_loss)])
def test_losses_that_are_functions(loss_function):
    pair = twins(net(BODIES["layer"]()), OPTIMIZERS["AdamW"])
    assert_head_trains_alike(pair, *batch(), loss_function=loss_function)


def test_leading_dimensions_are_rows():
    model, ours, other, theirs = twins(net(BODIES["layers"]()), OPTIMIZERS["SGD"])
    step = fused_step.TrainStep(model, nn.MSELoss(), ours)
    for leading in ((), (4,), (2, 3), (2, 1, 5), (3, 0, 2)):
        x, t = torch.randn(*leading, I), torch.randn(*leading, O)
        expected = plain_step(other, nn.MSELoss(), theirs, x, t)
        torch.testing.assert_close(step(x, t), expected, equal_nan=True, **CLOSE)
        assert step.plan == "head"
    assert_same(model, other, **CLOSE)


# --- a body that gives no gradient ----------------------------------------------------------------


def frozen(body: list[nn.Module]) -> list[nn.Module]:
    for module in body:
        module.requires_grad_(False)
    return body


FEATURES: dict[str, Callable[[], list[nn.Module]]] = {
    "Flatten": lambda: [nn.Flatten(), nn.Dropout(0.0)],
    "frozen body": lambda: frozen([nn.Linear(I, HIDDEN), nn.ReLU()]),
}


@each_dtype
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("outputs", [1, 40])
def test_layer_whose_input_needs_no_gradient_has_its_own_plan(
    outputs, features, dtype, monkeypatch
):
    """The update in place, as TrainStep has it for that layer alone: no gradient is made."""
    torch.manual_seed(0)
    body = nn.Sequential(*FEATURES[features]()).to(dtype)
    last = nn.Linear(I if features == "Flatten" else HIDDEN, outputs, dtype=dtype)
    alone = copy.deepcopy(last)
    sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    step = fused_step.TrainStep(nn.Sequential(*body, last), nn.MSELoss(), sgd(last.parameters()))
    step_alone = fused_step.TrainStep(alone, nn.MSELoss(), sgd(alone.parameters()))
    x, t = batch(dtype, outputs=outputs)
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", None)  # nothing calls it
    for _ in range(3):
        loss = step(x, t)
        assert step.plan == "head"
        assert torch.equal(loss, step_alone(body(x), t))
        assert step_alone.plan in FUSED_PLANS
    assert_same(last, alone)


def test_frozen_body_in_the_optimizer_stays_as_it_is():
    pair = twins(net(FEATURES["frozen body"]()), OPTIMIZERS["SGD"])
    before = copy.deepcopy(pair[0][0])
    assert_head_trains_alike(pair, *batch())
    assert_same(pair[0][0], before)


def test_body_thawed_between_two_steps_is_trained():
    model = net(FEATURES["frozen body"]())
    other = copy.deepcopy(model)
    sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    ours, theirs = sgd(model[-1].parameters()), sgd(other[-1].parameters())
    step = fused_step.TrainStep(model, nn.MSELoss(), ours)
    x, t = batch()
    for number in range(4):
        if number == 2:
            for m, optimizer in ((model, ours), (other, theirs)):
                m.requires_grad_(True)
                optimizer.add_param_group({"params": [*m[0].parameters()]})
        step(x, t)
        assert step.plan == "head"
        plain_step(other, nn.MSELoss(), theirs, x, t)
    assert_same(model, other, **CLOSE)
    assert not torch.equal(model[0].weight, net(FEATURES["frozen body"]())[0].weight)


def test_last_layer_replaced_behind_a_frozen_body_has_its_own_plan(monkeypatch):
    layers = [nn.Linear(I, O) for _ in range(2)]
    others = copy.deepcopy(layers)
    model, other = nn.Sequential(nn.Flatten(), layers[0]), nn.Sequential(nn.Flatten(), others[0])
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, other))
    step = fused_step.TrainStep(model, nn.MSELoss(), ours)
    x, t = batch()
    backward, calls = torch.autograd._engine_run_backward, []

    def counted(*args, **options):
        calls.append(1)
        return backward(*args, **options)

    monkeypatch.setattr(torch.autograd, "_engine_run_backward", counted)
    for number in (0, 0, 1, 1, 0):
        for m, of, optimizer in ((model, layers, ours), (other, others, theirs)):
            m[1] = of[number]
            optimizer.param_groups[0]["params"] = list(m.parameters())
        torch.testing.assert_close(
            step(x, t), plain_step(other, nn.MSELoss(), theirs, x, t), **CLOSE
        )
        assert step.plan == "head"
    assert len(calls) == 5  # the plain loop's
    for mine, its in zip(layers, others, strict=True):
        assert_same(mine, its, **CLOSE)


# --- what a body may give and do ------------------------------------------------------------------


class Gives(nn.Module):
    """Calls a function, and counts the calls."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function, self.calls = function, 0

    def forward(self, input: Tensor) -> object:
        self.calls += 1
        return self.function(input)


class Tagged(Tensor):
    pass


@pytest.mark.parametrize(
    "function",
    [
        Tensor.double,
        Tensor.to_sparse,
        lambda h: h[:, :-1],
        lambda h: h[0],
        lambda h: h[:, None],
        lambda h: h.as_subclass(Tagged),
        lambda h: (h, h),
        lambda h: None,
    ],
    ids=["dtype", "sparse", "columns", "one row", "a dimension", "subclass", "tuple", "None"],
)
def test_layer_is_called_as_it_is_where_its_input_does_not_fit(function):
    """With the plain loop's result, warning or error, and the body called once."""
    outcomes = []
    for fused in (True, False):
        torch.manual_seed(0)
        gives = Gives(function)
        model = net([nn.Linear(I, HIDDEN), gives])
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        step = functools.partial(plain_step, model, nn.MSELoss(), optimizer)
        if fused:
            step = fused_step.TrainStep(model, nn.MSELoss(), optimizer)
        found: list[object] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found.append(step(*batch()).item())
            except Exception as error:
                found.append((type(error), str(error)))
        assert gives.calls == 1
        if fused:
            assert step.plan in LOWER
        found += [str(w.message) for w in caught]
        outcomes.append((found, model))
    assert outcomes[0][0] == outcomes[1][0]
    assert_same(outcomes[0][1], outcomes[1][1])


def test_hook_that_the_body_registers_on_the_last_layer_is_called():
    calls: list[str] = []
    last = nn.Linear(HIDDEN, O)

    def register(h):
        last.register_forward_hook(lambda module, args, output: calls.append("hook"))
        return h

    model = nn.Sequential(nn.Linear(I, HIDDEN), Gives(register), last)
    step = fused_step.TrainStep(model, nn.MSELoss(), OPTIMIZERS["SGD"](model.parameters()))
    step(*batch())
    assert calls == ["hook"]
    assert step.plan in LOWER


def test_error_of_the_body_is_raised_and_nothing_is_changed():
    def fails(h):
        raise LookupError("by the body")

    model = net([nn.Linear(I, HIDDEN), Gives(fails)])
    before = copy.deepcopy(model)
    step = fused_step.TrainStep(model, nn.MSELoss(), OPTIMIZERS["SGD"](model.parameters()))
    with pytest.raises(LookupError, match="by the body"):
        step(*batch())
    assert_same(model, before)


def test_hooks_of_the_body_run():
    model, ours, other, theirs = twins(net(BODIES["layers"]()), OPTIMIZERS["SGD"])
    for m in (model, other):
        m[0].register_forward_hook(lambda module, args, output: 2 * output)
        m[2].register_full_backward_hook(
            lambda module, grad_input, grad_output: (grad_input[0] / 2,)
        )
        m[0].weight.register_hook(lambda grad: grad * 3)
    assert_head_trains_alike((model, ours, other, theirs), *batch())


# --- how a model may be put together --------------------------------------------------------------


def test_sequentials_inside_of_the_last_place_are_looked_through():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.ReLU(), nn.Linear(HIDDEN, O))
    nested = nn.Sequential(nn.Linear(I, HIDDEN), nn.Sequential(nn.Tanh(), inner))
    assert_head_trains_alike(twins(nested, OPTIMIZERS["SGD"]), *batch())


def test_layer_that_is_used_twice():
    torch.manual_seed(0)
    layer = nn.Linear(I, I)
    pair = twins(nn.Sequential(layer, nn.Tanh(), layer), OPTIMIZERS["fused SGD"])
    assert_head_trains_alike(pair, torch.randn(B, I), torch.randn(B, I))


def test_model_that_changes_between_two_steps():
    """Modules appended, replaced and removed: the next step sees it."""
    model, ours, other, theirs = twins(net(BODIES["layers"]()), OPTIMIZERS["SGD"])
    step = fused_step.TrainStep(model, nn.MSELoss(), ours)
    x, t = batch()

    def both(change):
        for m in (model, other):
            change(m)

    def replace_last(m):
        m[-1] = nn.Linear(HIDDEN, O).requires_grad_(False)
        for p in m[-1].parameters():
            nn.init.constant_(p, 0.5)

    def replace_body(m):
        m[1] = nn.ReLU()

    def drop(m):
        del m[1]

    for change, plans in (
        (lambda m: None, HEAD),
        (lambda m: m.append(nn.ReLU()), LOWER),
        (lambda m: m.pop(-1), HEAD),
        (replace_body, HEAD),
        (drop, HEAD),
        (replace_last, HEAD),
        (lambda m: m.append(nn.Sequential()), LOWER),
    ):
        both(change)
        step(x, t)
        assert step.plan in plans
        plain_step(other, nn.MSELoss(), theirs, x, t)
        assert_same(model, other, **CLOSE)


@pytest.mark.parametrize("is_trained", [True, False], ids=["trained body", "layer alone"])
def test_parameters_keep_the_gradients_that_were_made_and_no_copies(is_trained):
    model = net([nn.Linear(I, HIDDEN)]) if is_trained else nn.Linear(I, O)
    step = fused_step.TrainStep(model, nn.MSELoss(), torch.optim.Adam(model.parameters()))
    x, y = batch()
    step(x, y)
    with torch.profiler.profile() as profile:
        step(x, y)
    assert step.plan == "head"
    copies = [e for e in profile.events() if e.name == "aten::copy_" and e.cpu_parent is not None]
    assert "torch::autograd::AccumulateGrad" not in {e.cpu_parent.name for e in copies}


def test_gradient_that_nothing_clears_has_the_layout_it_has_in_the_plain_loop():
    def of_one_element() -> tuple[nn.Module, torch.optim.Optimizer]:
        linear = nn.Linear(I, 1)
        linear.bias = nn.Parameter(torch.zeros(3).as_strided((1,), (0,)))
        return linear, torch.optim.SGD([linear.weight], lr=0.1)

    x, y = batch(outputs=1)
    model, optimizer = of_one_element()
    plain_step(model, nn.MSELoss(), optimizer, x, y)
    ours, optimizer = of_one_element()
    step = fused_step.TrainStep(ours, nn.MSELoss(), optimizer)
    step(x, y)
    assert step.plan == "head"
    assert ours.bias.grad.stride() == model.bias.grad.stride()
    step(x, y)  # to add to one of strides of another kind, torch warns


# Torch's own, of an activation that it makes a fake tensor of.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_autograd_takes_the_gradients_that_were_made():
    x, y = batch()
    model, optimizer, other, plain = twins(
        net(BODIES["layers"]()), lambda p: torch.optim.SGD(p, lr=0.1)
    )
    step = fused_step.TrainStep(model, nn.MSELoss(), optimizer)
    for _ in range(3):
        with compiled_autograd._enable(lambda graph: graph):
            step(x, y)
        assert step.plan == "head"
        plain_step(other, nn.MSELoss(), plain, x, y)
    assert_same(model, other, **CLOSE)


def test_gradients_that_are_there_are_added_to():
    model, ours, other, theirs = twins(net(BODIES["layers"]()), OPTIMIZERS["SGD"])
    for m in (model, other):
        for number, p in enumerate(m.parameters()):
            p.grad = torch.full_like(p, 0.1 * number)
    assert_head_trains_alike((model, ours, other, theirs), *batch(), steps=1)


def test_input_that_needs_a_gradient_gets_it():
    model, ours, other, theirs = twins(net(BODIES["layers"]()), OPTIMIZERS["SGD"])
    x, t = batch()
    mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    step = fused_step.TrainStep(model, nn.MSELoss(), ours)
    for _ in range(2):
        step(mine, t)
        assert step.plan == "head"
        plain_step(other, nn.MSELoss(), theirs, its, t)
    torch.testing.assert_close(mine.grad, its.grad, **CLOSE)


def test_autocast_is_left_to_the_plain_loop():
    model, ours, other, theirs = twins(net(BODIES["layers"]()), OPTIMIZERS["SGD"])
    step = fused_step.TrainStep(model, nn.MSELoss(), ours)
    x, t = batch()
    for cache_enabled in (True, False):
        with torch.autocast(DEVICE.type, torch.bfloat16, cache_enabled=cache_enabled):
            loss = step(x, t)
            assert step.plan in LOWER
            assert "autocast is on" in step.explain(x, t)
            assert torch.equal(loss, plain_step(other, nn.MSELoss(), theirs, x, t))
    assert_same(model, other)


# --- what explain() says --------------------------------------------------------------------------


def test_explain_gives_the_reasons_of_each_plan():
    x, t = batch()

    def said(model, loss_function=None, make=OPTIMIZERS["SGD"], target=t):
        loss_function = loss_function or nn.MSELoss()
        step = fused_step.TrainStep(model, loss_function, make(model.parameters()))
        return step.explain(x, target)

    layers = net(BODIES["layers"]())
    assert said(layers).startswith("plan: head\n")
    assert "nn.Linear itself" not in said(layers)
    assert said(nn.Sequential(layers, nn.ReLU())).startswith("plan: optimizer\n")
    assert "does not end in nn.Linear itself but in ReLU" in said(nn.Sequential(layers, nn.ReLU()))
    assert "in Residual" in said(Residual())
    of_rows = said(layers, target=t[:, 0])
    assert of_rows.startswith("plan: optimizer\n")
    assert "target is not [*, O]" in of_rows
    with_adam = said(layers, make=OPTIMIZERS["AdamW"])
    assert with_adam.startswith("plan: head\n")
    assert "optimizer.step() and zero_grad() are called as they are" in with_adam
    with_l1 = said(layers, nn.L1Loss(), OPTIMIZERS["AdamW"])
    assert with_l1.startswith("plan: plain\n")
    assert with_l1.count("the loss is L1Loss") == 1
    assert "target is not of the weight's dtype" in said(layers, target=t.double())


class ViewsOfAChangedBase(nn.Module):
    """Its output is a view of another dtype's view, whose base was changed in place after it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        base = self.linear(x) * 1.0
        as_complex = torch.view_as_complex(base.view(-1, 4, 2))
        output = torch.view_as_real(as_complex).view(-1, 8)
        as_complex.mul_(2)
        return output


def test_input_may_be_a_view_that_autograd_replays():
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(ViewsOfAChangedBase(), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, t = torch.randn(16, 4), torch.randn(16, 1)
        if fused:
            step = fused_step.TrainStep(model, nn.MSELoss(), optimizer)
            step(x, t)
            assert step.plan == "head"
        else:
            plain_step(model, nn.MSELoss(), optimizer, x, t)
        found.append([p.detach() for p in model.parameters()])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def test_sequential_that_ends_in_itself_fails_as_when_it_is_called():
    model = nn.Sequential(nn.Linear(2, 2))
    model.append(model)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    step = fused_step.TrainStep(model, nn.MSELoss(), optimizer)
    assert "too many modules are nested" in step.explain(torch.randn(3, 2), torch.randn(3, 2))
    with pytest.raises(RecursionError):
        step(torch.randn(3, 2), torch.randn(3, 2))


def test_gradient_has_the_parameters_dtype_also_where_grad_dtype_is_none():
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).bfloat16()
        model[2].weight.grad_dtype = None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        x, t = torch.randn(16, 4).bfloat16(), torch.randn(16, 1).bfloat16()
        if fused:
            fused_step.TrainStep(model, nn.MSELoss(), optimizer)(x, t)
        else:
            plain_step(model, nn.MSELoss(), optimizer, x, t)
        found.append(optimizer.state[model[2].weight]["momentum_buffer"].dtype)
    assert found == [torch.bfloat16] * 2


def test_a_frozen_layer_alone_is_not_fused_and_explain_says_so():
    model = nn.Linear(3, 2).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = fused_step.TrainStep(model, nn.MSELoss(), optimizer)
    explained = step.explain(torch.randn(5, 3), torch.randn(5, 2))
    assert not explained.startswith("plan: head")
    assert "nothing needs a gradient" in explained
