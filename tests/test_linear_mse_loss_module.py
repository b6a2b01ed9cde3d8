# SPDX-License-Identifier: MIT
"""LinearMSELoss as a module, and as the model of a TrainStep."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    FUSED_PLANS,
    OPTION_SETS,
    Problem,
    Trained,
    describe,
    plain_step,
    same_bits,
    train_fused,
)
from torch import nn
from torch.nn.utils import parametrizations

import fused_step

SHAPES = [(37, 13, 1), (41, 21, 6), (45, 19, 131)]


def batch(B: int = 7, I: int = 5, O: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(B, I), torch.randn(B, O)


# --- the module ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_is_that_of_the_function(bias, reduction):
    head = fused_step.LinearMSELoss(5, 3, bias=bias, reduction=reduction)
    x, t = batch()
    expected = fused_step.linear_mse_loss(
        x, head.linear.weight, t, linear_bias=head.linear.bias, reduction=reduction
    )
    assert torch.equal(head(x, t), expected)
    assert torch.equal(head.predict(x), head.linear(x))


def test_layer_is_initialised_as_linear_is():
    torch.manual_seed(3)
    head = fused_step.LinearMSELoss(5, 3, dtype=torch.float64)
    torch.manual_seed(3)
    linear = nn.Linear(5, 3, dtype=torch.float64)
    assert torch.equal(head.linear.weight, linear.weight)
    assert torch.equal(head.linear.bias, linear.bias)


def test_device_is_taken():
    assert fused_step.LinearMSELoss(5, 3, device="meta").linear.weight.device.type == "meta"


def test_unknown_reduction_raises():
    with pytest.raises(ValueError, match=r"^LinearMSELoss: reduction must be .*got 'average'"):
        fused_step.LinearMSELoss(5, 3, reduction="average")


def test_repr_shows_the_layer_and_the_reduction():
    shown = repr(fused_step.LinearMSELoss(5, 3, reduction="sum"))
    assert "reduction='sum'" in shown
    assert "(linear): Linear(in_features=5, out_features=3, bias=True)" in shown


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_equal_and_apart(duplicate):
    head = fused_step.LinearMSELoss(5, 3, reduction="sum")
    twin = duplicate(head)
    x, t = batch()
    assert torch.equal(twin(x, t), head(x, t))
    with torch.no_grad():
        twin.linear.weight.zero_()
    assert not torch.equal(twin(x, t), head(x, t))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
    step = fused_step.TrainStep(twin, None, optimizer)
    step(x, t)
    assert step.plan in FUSED_PLANS


def test_state_dict_saves_and_loads():
    head, other = fused_step.LinearMSELoss(5, 3), fused_step.LinearMSELoss(5, 3)
    assert list(head.state_dict()) == ["linear.weight", "linear.bias"]
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.linear.weight, head.linear.weight)


def test_state_dict_of_a_bare_linear_loads_and_is_left_alone():
    linear = nn.Linear(5, 3)
    state = linear.state_dict()
    head = fused_step.LinearMSELoss(5, 3)
    head.load_state_dict(state)
    assert torch.equal(head.linear.weight, linear.weight)
    assert torch.equal(head.linear.bias, linear.bias)
    assert list(state) == ["weight", "bias"]

    # As a part of a larger model, too.
    body = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    model = nn.Sequential(nn.Linear(4, 5), fused_step.LinearMSELoss(5, 3))
    model.load_state_dict(body.state_dict())
    assert torch.equal(model[1].linear.weight, body[1].weight)


def test_state_dict_that_does_not_fit_raises():
    head = fused_step.LinearMSELoss(5, 3, bias=False)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*linear\.bias"):
        head.load_state_dict(nn.Linear(5, 3).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*linear\.weight"):
        head.load_state_dict({})


def test_hooks_of_the_layer_are_called():
    head = fused_step.LinearMSELoss(5, 3)
    x, t = batch()
    head.linear.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(
        head(x, t), F.mse_loss(2 * F.linear(x, *head.linear.parameters()), t)
    )
    with pytest.raises(ValueError, match="target must have the shape of the output"):
        head(x, t[:, :1])


def test_layer_of_another_class_is_called():
    x, t = batch()
    head = fused_step.LinearMSELoss(5, 3)
    parametrizations.weight_norm(head.linear)
    loss = head(x, t)
    torch.testing.assert_close(loss, F.mse_loss(head.linear(x), t))
    head.linear = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    torch.testing.assert_close(head(x, t), F.mse_loss(head.linear(x), t))


def test_head_of_a_model_compiles_as_one_graph():
    torch._dynamo.reset()
    body, head = nn.Linear(5, 5), fused_step.LinearMSELoss(5, 3)

    def loss(x, t):
        return head(torch.relu(body(x)), t)

    x, t = batch()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(x, t)
    torch.testing.assert_close(compiled, loss(x, t))
    compiled.backward()
    ours = [p.grad.clone() for p in (*body.parameters(), *head.parameters())]
    for p in (*body.parameters(), *head.parameters()):
        p.grad = None
    loss(x, t).backward()
    for a, p in zip(ours, (*body.parameters(), *head.parameters()), strict=True):
        torch.testing.assert_close(a, p.grad)


# --- in a TrainStep -----------------------------------------------------------------------------


def head_of(problem: Problem) -> tuple[fused_step.LinearMSELoss, torch.optim.SGD]:
    linear, _, optimizer = problem.build()
    head = fused_step.LinearMSELoss(1, 1, reduction=problem.reduction)
    head.linear = linear
    return head, optimizer


def head_step(head, optimizer, input, target) -> torch.Tensor:
    """The plain loop of a model that gives its loss."""
    loss = head(input, target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTION_SETS, ids=describe)
def test_step_has_the_bits_of_linear_and_mse_loss(options, shape):
    for reduction, bias in itertools.product(("mean", "sum"), (True, False)):
        problem = Problem.random(*shape, reduction=reduction, bias=bias, options=options)
        head, optimizer = head_of(problem)
        step = fused_step.TrainStep(head, None, optimizer)
        trained = Trained()
        for _ in range(3):
            trained.losses.append(step(problem.input, problem.target))
            trained.plans.append(step.plan)
        expected = train_fused(problem, 3)
        assert trained.plans == expected.plans
        trained.take(head.linear, optimizer)
        for (name, a), (_, b) in zip(trained.tensors(), expected.tensors(), strict=True):
            assert (a is None) == (b is None)
            assert a is None or same_bits(a, b), name


def test_run_has_the_bits_of_linear_and_mse_loss():
    problem = Problem.random(50, 13, 3)
    head, optimizer = head_of(problem)
    linear, loss_function, other = problem.build()
    losses = [
        step.run(problem.input, problem.target, epochs=3, batch_size=16)
        for step in (
            fused_step.TrainStep(head, None, optimizer),
            fused_step.TrainStep(linear, loss_function, other),
        )
    ]
    assert torch.equal(*losses)
    assert torch.equal(head.linear.weight, linear.weight)


def _hook(module):
    module.register_forward_hook(lambda *_: None)


def _own_forward(head):
    head.forward = lambda input, target: type(head).forward(head, input, target)


def _second_module(head):
    head.extra = nn.Linear(1, 1)


def _hidden_layer(head):
    head.__dict__["linear"] = head.linear


def _subclass(head):
    head.__class__ = type("Other", (fused_step.LinearMSELoss,), {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hook, "the model has hooks"),
        (lambda head: _hook(head.linear), "the linear layer has hooks"),
        (_own_forward, "the model has a forward of its own"),
        (_second_module, "the model's only module is not its nn.Linear"),
        (_hidden_layer, "the model's only module is not its nn.Linear"),
        (_subclass, "not LinearMSELoss itself"),
    ],
    ids=["hook", "hook of the layer", "forward", "second module", "hidden layer", "subclass"],
)
def test_cause_lowers_the_plan_with_the_result_of_the_plain_loop(change, reason):
    problem = Problem.random(37, 13, 3, options={"momentum": 0.9})
    plain_head, plain_optimizer = head_of(problem)
    head, optimizer = head_of(problem)
    step = fused_step.TrainStep(head, None, optimizer)
    step(problem.input, problem.target)
    assert step.plan in FUSED_PLANS
    # From the same weights on.
    plain_head.load_state_dict(head.state_dict())
    plain_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    change(head)
    change(plain_head)
    assert reason in step.explain(problem.input, problem.target)
    for _ in range(2):
        ours = step(problem.input, problem.target)
        assert step.plan == "optimizer"
        expected = head_step(plain_head, plain_optimizer, problem.input, problem.target)
        assert torch.equal(ours, expected)
    assert torch.equal(head.linear.weight, plain_head.linear.weight)


def test_reduction_that_is_changed_is_seen():
    problem = Problem.random(37, 13, 3)
    head, optimizer = head_of(problem)
    step = fused_step.TrainStep(head, None, optimizer)
    mean = step(problem.input, problem.target)
    head, optimizer = head_of(problem)
    step = fused_step.TrainStep(head, None, optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    step(problem.input, problem.target)
    head.reduction = "sum"
    torch.testing.assert_close(step(problem.input, problem.target), mean * 37 * 3)
    head.reduction = "none"
    with pytest.raises(RuntimeError, match="scalar outputs"):
        step(problem.input, problem.target)


def test_target_that_broadcasts_raises_and_changes_nothing():
    problem = Problem.random(37, 13, 3)
    head, optimizer = head_of(problem)
    step = fused_step.TrainStep(head, None, optimizer)
    with pytest.raises(ValueError, match="target must have the shape of the output"):
        step(problem.input, problem.target[:, :1])
    assert torch.equal(head.linear.weight, problem.weight)


def test_other_models_need_a_loss_function():
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        TypeError, match="a model that takes the target and gives the loss, got None for Linear"
    ):
        fused_step.TrainStep(model, None, optimizer)


class Net(nn.Module):
    """A network that gives its loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 4), fused_step.LinearMSELoss(4, 3)

    def forward(self, input, target):
        return self.head(torch.relu(self.body(input)), target)


def test_model_with_a_head_is_traced_by_fx():
    net = Net()
    traced = torch.fx.symbolic_trace(net)
    x, t = torch.randn(7, 5), torch.randn(7, 3)
    torch.testing.assert_close(traced(x, t), net(x, t))


def test_model_of_any_class_may_give_the_loss_itself():
    ours = Net()
    theirs = copy.deepcopy(ours)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    step = fused_step.TrainStep(ours, None, torch.optim.SGD(ours.parameters(), lr=0.1))
    x, t = torch.randn(7, 5), torch.randn(7, 3)
    for _ in range(3):
        loss = theirs(x, t)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(step(x, t), loss.detach())
    assert step.plan == "optimizer"
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


def test_head_with_a_loss_function_is_called_as_the_five_lines_call_it():
    head = fused_step.LinearMSELoss(5, 3)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    step = fused_step.TrainStep(head, F.mse_loss, optimizer)
    x, t = batch()
    with pytest.raises(TypeError, match="target"):
        step(x, t)
    with pytest.raises(TypeError, match="target"):
        plain_step(head, F.mse_loss, optimizer, x, t)


def doubled(self, *arguments, **keywords):
    return 2 * PLAIN_CALL(self, *arguments, **keywords)


PLAIN_CALL = nn.Module.__call__
REPLACED = {
    "nn.Linear.forward": (nn.Linear, "forward", lambda self, x: 2 * (x @ self.weight.T)),
    "F.linear": (F, "linear", lambda x, weight, bias=None: 2 * (x @ weight.T)),
    "F.mse_loss": (F, "mse_loss", lambda output, target, reduction="mean": output.sum()),
    "nn.Module.__call__": (nn.Module, "__call__", doubled),
}


@pytest.mark.parametrize("what", REPLACED)
def test_what_somebody_put_in_the_place_of_torchs_functions_is_called(what, monkeypatch):
    head = fused_step.LinearMSELoss(3, 2)
    x, t = torch.randn(5, 3), torch.randn(5, 2)
    monkeypatch.setattr(*REPLACED[what])
    assert torch.equal(head.forward(x, t), F.mse_loss(head.linear(x), t))


def test_a_call_that_was_replaced_on_the_layer_is_called():
    head = fused_step.LinearMSELoss(3, 2)
    head.linear._call_impl = lambda x: 2 * (x @ head.linear.weight.T)
    x, t = torch.randn(5, 3), torch.randn(5, 2)
    assert torch.equal(head(x, t), F.mse_loss(head.linear(x), t))
