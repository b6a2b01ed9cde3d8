# SPDX-License-Identifier: MIT
"""TrainStep takes fused_step.SGD like torch.optim.SGD, and has the plan `optimizer` by it."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
from device import DEVICE
from oracle import describe, plain_step
from sgd_oracle import OPTION_SETS, momentum_of, torch_sgd
from torch import nn

import fused_step

# One output and few rows: on CUDA they fit a block.
ONE_OUTPUT = "one-pass" if DEVICE.type == "cpu" else "tiny"


def make_net() -> nn.Module:
    """A model that does not end in a linear layer."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), nn.Identity())


def assert_same(model, optimizer, other, other_optimizer, **tolerance: float) -> None:
    """Equal parameters and momentum, bit for bit unless there is a tolerance."""
    same = functools.partial(torch.testing.assert_close, **(tolerance or {"rtol": 0, "atol": 0}))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        same(p, q)
        assert p.grad is None
        same(momentum_of(optimizer, p), momentum_of(other_optimizer, q))


@pytest.mark.parametrize("options", OPTION_SETS, ids=describe)
@pytest.mark.parametrize(("O", "plan"), ((1, ONE_OUTPUT), (40, "gemm")))
def test_linear_models_take_the_same_plan_as_under_torchs_sgd(O, plan, options):
    x, t = torch.randn(16, 5), torch.randn(16, O)
    trained = []
    for make in (fused_step.SGD, torch.optim.SGD):
        torch.manual_seed(0)
        model = nn.Linear(5, O)
        optimizer = make(model.parameters(), **options)
        step = fused_step.TrainStep(model, nn.MSELoss(), optimizer)
        for _ in range(3):
            step(x, t)
            assert step.plan == plan
        step.run(x, t, epochs=2, batch_size=8)
        assert step.plan == plan
        trained.append((model, optimizer))
    assert_same(*trained[0], *trained[1])


@pytest.mark.parametrize("make", [fused_step.SGD, torch.optim.SGD], ids=["ours", "torch's"])
@pytest.mark.parametrize("options", OPTION_SETS, ids=describe)
def test_other_models_take_the_plan_optimizer(make, options):
    x, t = torch.randn(16, 4), torch.randn(16, 3)
    ours, theirs = make_net(), make_net()
    optimizer = make(ours.parameters(), **options)
    torch_optimizer = torch_sgd(theirs.parameters(), **options)
    step = fused_step.TrainStep(ours, nn.MSELoss(), optimizer)
    assert step.plan is None
    assert step.explain(x, t).startswith("plan: optimizer\nnot deeper: ")
    for _ in range(3):
        loss = step(x, t)
        assert step.plan == "optimizer"
        assert torch.equal(loss, plain_step(theirs, nn.MSELoss(), torch_optimizer, x, t))
    losses = step.run(x, t, epochs=2, batch_size=8)
    assert losses.shape == (4,)
    assert step.plan == "optimizer"
    for k in range(4):
        rows = slice(k % 2 * 8, k % 2 * 8 + 8)
        expected = plain_step(theirs, nn.MSELoss(), torch_optimizer, x[rows], t[rows])
        assert torch.equal(losses[k], expected)
    assert_same(ours, optimizer, theirs, torch_optimizer)


@pytest.mark.parametrize("make", [fused_step.SGD, torch.optim.SGD], ids=["ours", "torch's"])
@pytest.mark.parametrize(
    "context",
    [lambda: torch.device(DEVICE), torch.profiler.profile],
    ids=["mode", "profiler"],
)
def test_explain_says_who_looks_at_the_operators(context, make):
    net = make_net()
    step = fused_step.TrainStep(net, nn.MSELoss(), make(net.parameters()))
    x, t = torch.randn(16, 4), torch.randn(16, 3)
    with context():
        said = step.explain(x, t)
        step(x, t)
    assert said.startswith(f"plan: {step.plan}\n")
    looks = "a mode, a transform or a profiler looks at PyTorch's operators"
    assert (looks in said) == (step.plan == "plain") == (make is torch.optim.SGD)


def test_another_optimizer_is_plain_and_explain_says_so():
    net = make_net()
    step = fused_step.TrainStep(net, nn.MSELoss(), torch.optim.Adam(net.parameters()))
    x, t = torch.randn(16, 4), torch.randn(16, 3)
    assert step.explain(x, t).startswith("plan: plain\n")
    assert "the optimizer is not fused_step.SGD or torch.optim.SGD itself" in step.explain(x, t)
    step(x, t)
    assert step.plan == "plain"


@pytest.mark.parametrize(
    "options", ({"max_grad_norm": 0.1}, {"momentum": 0.9, "momentum_dtype": torch.float32}), ids=str
)
def test_options_of_our_own_lower_a_linear_model_to_the_plan_head(options):
    x, t = torch.randn(16, 5), torch.randn(16, 1)
    model, other = nn.Linear(5, 1), nn.Linear(5, 1)
    other.load_state_dict(model.state_dict())
    optimizer = fused_step.SGD(model.parameters(), lr=0.1, **options)
    other_optimizer = fused_step.SGD(other.parameters(), lr=0.1, **options)
    step = fused_step.TrainStep(model, nn.MSELoss(), optimizer)
    for _ in range(3):
        step(x, t)
        plain_step(other, nn.MSELoss(), other_optimizer, x, t)
    assert step.plan == "head"
    assert_same(model, optimizer, other, other_optimizer, rtol=1e-5, atol=1e-6)


def test_an_optimizer_that_was_changed_is_plain():
    x, t = torch.randn(16, 4), torch.randn(16, 3)

    def replaced_step(optimizer):
        inner = optimizer.step
        optimizer.step = lambda: inner()

    def replaced_zero_grad(optimizer):
        inner = optimizer.zero_grad
        optimizer.zero_grad = lambda: inner(set_to_none=False)

    for make, change in itertools.product(
        (fused_step.SGD, torch.optim.SGD), (replaced_step, replaced_zero_grad)
    ):
        net = make_net()
        optimizer = make(net.parameters(), lr=0.1)
        step = fused_step.TrainStep(net, nn.MSELoss(), optimizer)
        change(optimizer)
        step(x, t)
        assert step.plan == "plain"
        assert (net[0].weight.grad is None) == (change is replaced_step)

    for base in (fused_step.SGD, torch.optim.SGD):
        subclass = type("Mine", (base,), {})
        net = make_net()
        step = fused_step.TrainStep(net, nn.MSELoss(), subclass(net.parameters(), lr=0.1))
        step(x, t)
        assert step.plan == "plain"


def test_a_scheduler_leaves_the_plans_as_they_are():
    for make, (model, plan) in itertools.product(
        (fused_step.SGD, torch.optim.SGD),
        ((nn.Linear(4, 3), ONE_OUTPUT), (make_net(), "optimizer")),
    ):
        optimizer = make(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        step = fused_step.TrainStep(model, nn.MSELoss(), optimizer)
        for _ in range(3):
            step(torch.randn(16, 4), torch.randn(16, 3))
            assert step.plan == plan
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0.1 / 8


def test_a_loop_and_the_step_share_the_state():
    x, t = torch.randn(16, 4), torch.randn(16, 1)
    model, other = nn.Linear(4, 1), nn.Linear(4, 1)
    other.load_state_dict(model.state_dict())
    optimizer = fused_step.SGD(model.parameters(), lr=0.1, momentum=0.9)
    other_optimizer = fused_step.SGD(other.parameters(), lr=0.1, momentum=0.9)
    step = fused_step.TrainStep(model, nn.MSELoss(), optimizer)
    for k in range(6):
        if k % 2:
            plain_step(model, nn.MSELoss(), optimizer, x, t)
        else:
            step(x, t)
            assert step.plan == ONE_OUTPUT
        plain_step(other, nn.MSELoss(), other_optimizer, x, t)
    torch.testing.assert_close(model.weight, other.weight)


def test_replaced_zero_grad_of_the_class_is_called(monkeypatch):
    called = []
    zero_grad = torch.optim.Optimizer.zero_grad

    def noted(self, set_to_none=True):
        called.append(self)
        zero_grad(self, set_to_none)

    for owner, model in itertools.product(
        (torch.optim.Optimizer, fused_step.SGD), (nn.Linear(4, 3), make_net())
    ):
        optimizer = fused_step.SGD(model.parameters(), lr=0.1)
        step = fused_step.TrainStep(model, nn.MSELoss(), optimizer)
        with monkeypatch.context() as patch:
            patch.setattr(owner, "zero_grad", noted)
            step(torch.randn(16, 4), torch.randn(16, 3))
        assert called.pop() is optimizer


@pytest.mark.parametrize("make", (fused_step.SGD, torch.optim.SGD))
@pytest.mark.parametrize("model", (nn.Linear(4, 3), make_net()), ids=("layer", "network"))
def test_state_that_refuses_an_entry_leaves_the_parameters_as_they_were(model, make):
    optimizer = make(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state = {}
    before = [p.detach().clone() for p in model.parameters()]
    step = fused_step.TrainStep(model, nn.MSELoss(), optimizer)
    with pytest.raises(KeyError):
        step(torch.randn(16, 4), torch.randn(16, 3))
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)


@pytest.mark.parametrize("model_of", [lambda: nn.Linear(5, 1), make_net], ids=["linear", "net"])
def test_options_of_our_own_on_torchs_optimizer_mean_nothing(model_of):
    x, t = torch.randn(16, 5), torch.randn(16, 1)
    if model_of is make_net:
        x, t = torch.randn(16, 4), torch.randn(16, 3)
    model = model_of()
    other = copy.deepcopy(model)
    optimizers = []
    for m in (model, other):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
        optimizer.max_grad_norm = 1e-3
        optimizer.param_groups[0]["momentum_dtype"] = torch.float64
        optimizers.append(optimizer)
    step = fused_step.TrainStep(model, nn.MSELoss(), optimizers[0])
    for _ in range(2):
        step(x, t)
        plain_step(other, nn.MSELoss(), optimizers[1], x, t)
    assert step.plan != "plain"
    assert not hasattr(optimizers[0], "grad_norm")
    assert_same(model, optimizers[0], other, optimizers[1], rtol=1e-5, atol=1e-6)


def test_momentum_dtype_loaded_into_torchs_optimizer_means_nothing():
    layer = nn.Linear(5, 3).bfloat16()
    ours = fused_step.SGD(layer.parameters(), lr=0.1, momentum=0.9, momentum_dtype=torch.float32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(ours.state_dict())
    loss = functools.partial(nn.functional.l1_loss)
    step = fused_step.TrainStep(layer, loss, optimizer)
    step(torch.randn(16, 5).bfloat16(), torch.randn(16, 3).bfloat16())
    assert step.plan == "optimizer"
    assert momentum_of(optimizer, layer.weight).dtype == torch.bfloat16


def sparse_gradients():
    return nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 3)), nn.L1Loss()


def complex_parameters():
    model = nn.Linear(4, 3, dtype=torch.complex64)
    return model, lambda output, target: output.abs().sum() + target.sum()


@pytest.mark.parametrize("make", [sparse_gradients, complex_parameters])
def test_plan_is_plain_where_torchs_own_step_has_run(make):
    model, loss_function = make()
    step = fused_step.TrainStep(model, loss_function, torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.arange(5) if make is sparse_gradients else torch.randn(5, 4, dtype=torch.complex64)
    step(x, torch.randn(5, 3))
    assert step.plan == "plain"


def test_options_that_are_not_fused_are_told():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.1)
    step = fused_step.TrainStep(net, nn.L1Loss(), optimizer)
    x, t = torch.randn(16, 4), torch.randn(16, 3)
    assert step.explain(x, t).startswith("plan: plain\n")
    assert "an option is not fused" in step.explain(x, t)
    step(x, t)
    assert step.plan == "plain"
