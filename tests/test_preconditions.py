# SPDX-License-Identifier: MIT
"""What lowers the plan, and that the result is then still the plain loop's.

A scenario changes something about a world (a model, loss, optimizer and data) or about the process,
and undoes it again. For each of them two equal worlds are trained, one by TrainStep and one by the
five lines, and everything they leave behind is compared: losses, parameters, gradients, momentum,
warnings, errors, and what hooks and modes saw. By the plan `plain` all of it is the same bit for
bit, and so are the version counters; by `optimizer` all but those, which count the operators of an
update; by `head` the numbers are close.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
import torch.nn.functional as F
from device import DEVICE
from oracle import ANY_PLAN, FUSED_PLANS, LOOP_PLANS, ONE_PASS, plain_step
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_module
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import optimizer as optimizer_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import fused_step

B, I, O = 40, 5, 3


@dataclass
class World:
    """All that a training step touches."""

    model: nn.Module
    loss_function: Any
    optimizer: torch.optim.Optimizer
    input: Tensor
    target: Tensor
    log: list[Any] = field(default_factory=list)  # what hooks and modes saw

    @property
    def linear(self) -> nn.Linear:
        return self.model[0] if isinstance(self.model, nn.Sequential) else self.model

    def note(self, what: str, result: Any = None) -> Callable[..., Any]:
        """A hook that notes that it was called, and returns `result`."""

        def hook(*_: Any, **__: Any) -> Any:
            self.log.append(what)
            return result

        return hook


Cause = Callable[[World], Iterator[Callable[[Callable[[], Any]], Any] | None]]


@dataclass(frozen=True)
class Scenario:
    """One cause, and what it is expected to do to the plan.

    A cause changes the world, yields, and undoes its change. It may yield a function that is then
    to call the step.
    """

    cause: Cause
    plans: tuple[str, ...]
    reason: str  # what explain() says, as a regular expression
    comes_back: bool  # undone, the step is fused again
    replaces: bool  # puts another model, loss or optimizer into the world
    sequential: bool  # nn.Sequential(nn.Linear) for a model
    steps: int  # until the cause has spent itself
    options: dict[str, Any]


SCENARIOS: dict[str, Scenario] = {}


def scenario(
    reason: str = "",
    *,
    plans: tuple[str, ...] = LOOP_PLANS,
    comes_back: bool = True,
    replaces: bool = False,
    sequential: bool = False,
    steps: int = 2,
    name: str | None = None,
    **options: Any,
) -> Callable[[Cause], Cause]:
    """Enters a cause in the table."""

    def enter(cause: Cause) -> Cause:
        key = name or cause.__name__
        assert key not in SCENARIOS
        SCENARIOS[key] = Scenario(
            cause,
            plans,
            reason,
            comes_back,
            replaces,
            sequential,
            steps,
            {"momentum": 0.9, **options},
        )
        return cause

    return enter


def build(of: Scenario) -> World:
    """A world before the cause; the same every time."""
    generator = torch.Generator().manual_seed(7)
    randn = functools.partial(torch.randn, generator=generator)
    model: nn.Module = nn.Linear(I, O)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(randn(parameter.shape))
    if of.sequential:
        model = nn.Sequential(model)
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.05, **of.options})
    return World(model, nn.MSELoss(), optimizer, randn(B, I), randn(B, O))


@contextlib.contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute in the owner's own dictionary, and puts back what was there."""
    missing = object()
    old = owner.__dict__.get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if old is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, old)


@contextlib.contextmanager
def removing(*handles: Any) -> Iterator[None]:
    """Removes the handles of hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# === the table ==================================================================================

# --- models and their forward -------------------------------------------------------------------


class DoubledLinear(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class NamedSequential(nn.Sequential):
    def forward(self, input):
        return super().forward(input) + 1


class ShiftedMSE(nn.MSELoss):
    def forward(self, input, target):
        return super().forward(input, target) + 1


@scenario("DoubledLinear")
def linear_subclass(world):
    world.model.__class__ = DoubledLinear
    yield
    world.model.__class__ = nn.Linear


@scenario("does not end in nn.Linear itself", sequential=True, name="linear subclass in Sequential")
def inner_subclass(world):
    world.linear.__class__ = DoubledLinear
    yield
    world.linear.__class__ = nn.Linear


@scenario("NamedSequential", sequential=True)
def sequential_subclass(world):
    world.model.__class__ = NamedSequential
    yield
    world.model.__class__ = nn.Sequential


@scenario("forward")
def instance_forward(world):
    forward = world.model.forward
    with attribute(world.model, "forward", lambda input: 2 * forward(input)):
        yield


@scenario("forward", sequential=True)
def instance_forward_of_sequential(world):
    forward = world.model.forward
    with attribute(world.model, "forward", lambda input: 2 * forward(input)):
        yield


@scenario("forward", sequential=True)
def instance_forward_inside_sequential(world):
    forward = world.linear.forward
    with attribute(world.linear, "forward", lambda input: 2 * forward(input)):
        yield


@scenario("_call_impl")
def instance_call_impl(world):
    call = world.model._call_impl
    with attribute(world.model, "_call_impl", lambda input: 2 * call(input)):
        yield


@scenario("_call_impl", sequential=True)
def instance_call_impl_of_sequential(world):
    call = world.model._call_impl
    with attribute(world.model, "_call_impl", lambda input: 2 * call(input)):
        yield


@scenario("class", name="forward patched in class Linear")
def class_forward(world):
    forward = nn.Linear.forward
    with attribute(nn.Linear, "forward", lambda self, input: 2 * forward(self, input)):
        yield


@scenario("class", sequential=True, name="forward patched in class Sequential")
def sequential_class_forward(world):
    forward = nn.Sequential.forward
    with attribute(nn.Sequential, "forward", lambda self, input: 2 * forward(self, input)):
        yield


@scenario("class", name="forward patched in class MSELoss")
def loss_class_forward(world):
    forward = nn.MSELoss.forward
    with attribute(nn.MSELoss, "forward", lambda self, *batch: 2 * forward(self, *batch)):
        yield


@scenario("class", name="__call__ patched in class Module")
def class_call(world):
    call = nn.Module.__call__

    def doubled(self, *args, **kwargs):
        return 2 * call(self, *args, **kwargs)

    with attribute(nn.Module, "__call__", doubled):
        yield


@scenario("class", name="__call__ given to class Linear")
def linear_class_call(world):
    def doubled(self, input):
        return 2 * self.forward(input)

    with attribute(nn.Linear, "__call__", doubled):
        yield


@scenario("class", name="_call_impl patched in class Module")
def class_call_impl(world):
    call = nn.Module._call_impl

    def doubled(self, *args, **kwargs):
        return 2 * call(self, *args, **kwargs)

    with attribute(nn.Module, "_call_impl", doubled):
        yield


@scenario(name="F.linear patched")
def functional_linear(world):
    linear = F.linear
    with attribute(F, "linear", lambda *args: 2 * linear(*args)):
        yield


@scenario(name="F.mse_loss patched")
def functional_mse_loss(world):
    mse_loss = F.mse_loss
    with attribute(F, "mse_loss", lambda *args, **kwargs: 2 * mse_loss(*args, **kwargs)):
        yield


@scenario("compiled")
def compiled_module(world):
    world.model.compile(backend="eager")
    yield
    world.model._compiled_call_impl = None


@scenario("compiled", sequential=True)
def compiled_sequential(world):
    world.model.compile(backend="eager")
    yield
    world.model._compiled_call_impl = None


@scenario("compiled")
def compiled_loss(world):
    world.loss_function.compile(backend="eager")
    yield
    world.loss_function._compiled_call_impl = None


@scenario("Sequential", sequential=True)
def sequential_of_two(world):
    world.model.append(nn.ReLU())
    yield
    del world.model[1]


@scenario("Sequential", sequential=True)
def sequential_emptied(world):
    linear = world.model[0]
    del world.model[0]
    yield
    world.model.append(linear)


@scenario("OptimizedModule", replaces=True)
def torch_compile_of_the_model(world):
    world.model = torch.compile(world.model, backend="eager")
    yield


# --- hooks --------------------------------------------------------------------------------------

# The legacy backward hook is told from a full one by a flag of the module, which stays behind.
MODULE_HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_backward_hook",
)

for _register in MODULE_HOOKS:
    for _where in ("model", "loss_function", "linear"):

        @scenario("hook", sequential=_where == "linear", name=f"{_register} on {_where}")
        def module_hook(world, register=_register, where=_where):
            owner = getattr(world, where)
            with removing(getattr(owner, register)(world.note(register))):
                yield

    @scenario("hook", sequential=True, name=f"{_register} on Sequential")
    def sequential_hook(world, register=_register):
        with removing(getattr(world.model, register)(world.note(register))):
            yield


for _register in (
    "register_module_forward_hook",
    "register_module_forward_pre_hook",
    "register_module_full_backward_hook",
    "register_module_full_backward_pre_hook",
    "register_module_backward_hook",
):

    @scenario("global module hook", name=f"global {_register}")
    def global_module_hook(world, register=_register):
        with removing(getattr(module_hooks, register)(world.note(register))):
            yield
        # Which of the two kinds of global backward hooks is in use is remembered for good.
        module_hooks._global_is_full_backward_hook = None


@scenario("hook", name="forward hook with kwargs that changes the output")
def changing_hook(world):
    handle = world.model.register_forward_hook(
        lambda module, args, kwargs, output: 3 * output, with_kwargs=True, always_call=True
    )
    with removing(handle):
        yield


@scenario("hook", name="forward pre-hook that changes the input")
def changing_pre_hook(world):
    with removing(world.model.register_forward_pre_hook(lambda module, args: (2 * args[0],))):
        yield


@scenario("hook", name="forward hook that raises")
def raising_hook(world):
    def hook(*_):
        raise LookupError("by the hook")

    with removing(world.model.register_forward_hook(hook)):
        yield


@scenario("hook")
def tensor_hook_on_weight(world):
    with removing(world.model.weight.register_hook(lambda grad: 2 * grad)):
        yield


@scenario("hook")
def tensor_hook_on_bias(world):
    with removing(world.model.bias.register_hook(world.note("bias"))):
        yield


@scenario("hook")
def post_accumulate_grad_hook(world):
    handles = [
        p.register_post_accumulate_grad_hook(world.note("p")) for p in world.model.parameters()
    ]
    with removing(*handles):
        yield


@scenario("hook")
def post_accumulate_grad_hook_on_bias_that_clears_the_gradient(world):
    def hook(parameter):
        parameter.grad = None

    with removing(world.model.bias.register_post_accumulate_grad_hook(hook)):
        yield


@scenario("hook")
def hook_on_gradient_accumulator(world):
    node = torch.autograd.graph.get_gradient_edge(world.model.weight).node
    with removing(node.register_hook(world.note("accumulated"))):
        yield


@scenario("hook")
def prehook_on_gradient_accumulator(world):
    node = torch.autograd.graph.get_gradient_edge(world.model.bias).node
    with removing(node.register_prehook(world.note("to accumulate"))):
        yield


@scenario("hook")
def multi_grad_hook(world):
    parameters = tuple(world.model.parameters())
    with removing(torch.autograd.graph.register_multi_grad_hook(parameters, world.note("all"))):
        yield


@scenario("saved")
def saved_tensors_hooks(world):
    def pack(tensor):
        world.log.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


@scenario("saved")
def save_on_cpu(world):
    with torch.autograd.graph.save_on_cpu():
        yield


# --- the optimizer ------------------------------------------------------------------------------


class HalvedSGD(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(0.5)
        return super().step(closure)


for _register in ("register_step_pre_hook", "register_step_post_hook"):

    @scenario("hook", name=f"optimizer {_register}")
    def optimizer_hook(world, register=_register):
        with removing(getattr(world.optimizer, register)(world.note(register))):
            yield

    @scenario("global optimizer hook", name=f"global optimizer {_register}")
    def global_optimizer_hook(world, register=_register):
        register = register.replace("register_", "register_optimizer_")
        with removing(getattr(optimizer_hooks, register)(world.note(register))):
            yield


@scenario("HalvedSGD")
def sgd_subclass(world):
    world.optimizer.__class__ = HalvedSGD
    yield
    world.optimizer.__class__ = torch.optim.SGD


@scenario("step", name="step of the optimizer replaced")
def instance_step(world):
    step = world.optimizer.step

    def twice():
        step()
        step()

    with attribute(world.optimizer, "step", twice):
        yield


@scenario("step", name="step of the optimizer replaced by a method, then a scheduler")
def instance_step_under_scheduler(world):
    """The scheduler's wrapper is no override; what it wraps may be one."""

    def doubled(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.mul_(2)
        return torch.optim.SGD.step(self, closure)

    with attribute(world.optimizer, "step", types.MethodType(doubled, world.optimizer)):
        torch.optim.lr_scheduler.ConstantLR(world.optimizer, factor=1.0)
        assert world.optimizer.step._wrapped_by_lr_sched
        yield


@scenario("step", name="step of the optimizer wrapped with functools.wraps")
def wrapped_step(world):
    step = world.optimizer.step

    @functools.wraps(step)
    def noted(*args):
        world.log.append("step")
        return step(*args)

    with attribute(world.optimizer, "step", noted):
        yield


@scenario("step", name="step patched in class SGD")
def class_step(world):
    step = torch.optim.SGD.step

    @functools.wraps(step)
    def doubled(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.mul_(2)
        return step(self, closure)

    with attribute(torch.optim.SGD, "step", doubled):
        yield


@scenario("zero_grad", name="zero_grad of the optimizer replaced")
def instance_zero_grad(world):
    with attribute(world.optimizer, "zero_grad", world.note("zero_grad")):
        yield
    world.optimizer.zero_grad()


@scenario("zero_grad", name="zero_grad patched in class Optimizer")
def class_zero_grad(world):
    def zero_grad(self, set_to_none=True):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.zero_()

    with attribute(torch.optim.Optimizer, "zero_grad", zero_grad):
        yield
    world.optimizer.zero_grad()


@scenario("zero_grad", name="zero_grad given to class SGD")
def sgd_class_zero_grad(world):
    with attribute(torch.optim.SGD, "zero_grad", world.note("zero_grad")):
        yield
    world.optimizer.zero_grad()


def init_group_of_signs(self, group, params, grads, momentum_buffers):
    """Makes sign-SGD of SGD."""
    for p in group["params"]:
        params.append(p)
        grads.append(p.grad.sign())
        momentum_buffers.append(self.state[p].get("momentum_buffer"))
    return False


@scenario("_init_group", name="_init_group of the optimizer replaced")
def instance_init_group(world):
    replaced = types.MethodType(init_group_of_signs, world.optimizer)
    with attribute(world.optimizer, "_init_group", replaced):
        yield


@scenario("_init_group", name="_init_group patched in class SGD")
def class_init_group(world):
    with attribute(torch.optim.SGD, "_init_group", init_group_of_signs):
        yield


@scenario("parameters")
def optimizer_with_an_extra_parameter(world):
    extra = nn.Parameter(torch.ones(2))
    world.optimizer.add_param_group({"params": [extra]})
    yield
    world.optimizer.param_groups.pop()


@scenario("parameters")
def extra_parameter_with_a_gradient(world):
    extra = nn.Parameter(torch.ones(2))
    extra.grad = torch.ones(2)
    world.optimizer.param_groups[0]["params"].append(extra)
    yield
    world.log.append(extra.detach().clone())
    world.optimizer.param_groups[0]["params"].pop()


@scenario("parameters")
def optimizer_without_the_bias(world):
    bias = world.optimizer.param_groups[0]["params"].pop()
    yield
    world.optimizer.param_groups[0]["params"].append(bias)
    world.model.zero_grad()


@scenario("parameters")
def optimizer_without_the_weight(world):
    weight = world.optimizer.param_groups[0]["params"].pop(0)
    yield
    world.optimizer.param_groups[0]["params"].insert(0, weight)
    world.model.zero_grad()


@scenario("parameters")
def parameter_in_two_groups(world):
    group = dict(world.optimizer.param_groups[0], params=[world.model.weight])
    world.optimizer.param_groups.append(group)
    yield
    world.optimizer.param_groups.pop()


@scenario("parameters")
def parameter_twice_in_a_group(world):
    world.optimizer.param_groups[0]["params"].append(world.model.bias)
    yield
    world.optimizer.param_groups[0]["params"].pop()


@scenario("parameters")
def no_groups(world):
    groups = world.optimizer.param_groups
    world.optimizer.param_groups = []
    yield
    world.optimizer.param_groups = groups
    world.model.zero_grad()


def without(world: World, option: str) -> Iterator[None]:
    group = world.optimizer.param_groups[0]
    value = group.pop(option)
    yield
    group[option] = value
    world.model.zero_grad()


@scenario("lacks one")
def group_without_nesterov(world):
    yield from without(world, "nesterov")


@scenario("lacks one")
def group_without_foreach(world):
    """The step asks for it, whatever it is."""
    yield from without(world, "foreach")


@scenario("lacks one")
def group_without_fused(world):
    yield from without(world, "fused")


class GroupOfTwiceTheRate(dict):
    """Its learning rate is not what lies in the dictionary."""

    def __getitem__(self, key):
        return 2 * super().__getitem__(key) if key == "lr" else super().__getitem__(key)


@scenario(name="group of a class of its own")
def group_of_a_class_of_its_own(world):
    groups = world.optimizer.param_groups
    plain = groups[0]
    groups[0] = GroupOfTwiceTheRate(plain)
    yield
    groups[0] = plain


def differentiable(world: World, *places: dict[str, Any]) -> Iterator[None]:
    for place in places:
        place["differentiable"] = True
    yield
    for place in places:
        place["differentiable"] = False
    world.model.zero_grad()


@scenario("differentiable")
def differentiable_optimizer(world):
    """SGD(differentiable=True): the plain loop's error, leaves are written under autograd."""
    yield from differentiable(world, world.optimizer.defaults, *world.optimizer.param_groups)


@scenario("differentiable")
def differentiable_in_the_defaults_only(world):
    """SGD.step looks it up in the defaults, not in the groups."""
    yield from differentiable(world, world.optimizer.defaults)


@scenario(plans=ANY_PLAN)
def differentiable_in_the_group_only(world):
    yield from differentiable(world, *world.optimizer.param_groups)


@scenario(comes_back=False)
def learning_rate_that_requires_grad(world):
    world.optimizer.param_groups[0]["lr"] = torch.tensor(0.05, requires_grad=True)
    yield
    world.optimizer.param_groups[0]["lr"] = 0.05


@scenario()
def learning_rate_of_two_elements(world):
    world.optimizer.param_groups[0]["lr"] = torch.tensor([0.05, 0.06])
    yield
    world.optimizer.param_groups[0]["lr"] = 0.05
    world.model.zero_grad()


@scenario(plans=ANY_PLAN)
def learning_rate_of_no_elements(world):
    world.optimizer.param_groups[0]["lr"] = torch.tensor([])
    yield
    world.optimizer.param_groups[0]["lr"] = 0.05
    world.model.zero_grad()


@scenario()
def learning_rate_that_is_no_number(world):
    world.optimizer.param_groups[0]["lr"] = "0.05"
    yield
    world.optimizer.param_groups[0]["lr"] = 0.05
    world.model.zero_grad()


@scenario()
def complex_learning_rate(world):
    world.optimizer.param_groups[0]["lr"] = 0.05 + 0.01j
    yield
    world.optimizer.param_groups[0]["lr"] = 0.05
    world.model.zero_grad()


for _option in ("lr", "weight_decay", "dampening"):

    @scenario("at most 60000", name=f"{_option} beyond the range of float32")
    def large_option(world, option=_option):
        group = world.optimizer.param_groups[0]
        before = group[option]
        group[option] = 1e39
        yield
        group[option] = before
        world.model.zero_grad()


@scenario("grad_dtype", name="gradients in a dtype of their own")
def grad_dtype(world):
    for p in world.model.parameters():
        p.grad_dtype = torch.bfloat16
    yield
    for p in world.model.parameters():
        p.grad_dtype = p.dtype


@scenario()
def weight_decay_tensor(world):
    world.optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.1)
    yield
    world.optimizer.param_groups[0]["weight_decay"] = 0.0


@scenario()
def weight_decay_that_requires_grad(world):
    world.optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.1, requires_grad=True)
    yield
    world.optimizer.param_groups[0]["weight_decay"] = 0.0
    world.model.zero_grad()


@scenario()
def momentum_tensor(world):
    world.optimizer.param_groups[0]["momentum"] = torch.tensor(0.5)
    yield
    world.optimizer.param_groups[0]["momentum"] = 0.9


@scenario()
def grad_scale_left_by_a_scaler(world):
    world.optimizer.grad_scale = torch.tensor(2.0)
    yield
    del world.optimizer.grad_scale
    world.model.zero_grad()


def with_buffer(world: World, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Exchanges the weight's momentum buffer for the time of the scenario."""
    state = world.optimizer.state[world.model.weight]
    old = state.get("momentum_buffer")
    state["momentum_buffer"] = change(torch.linspace(-1, 1, O * I).reshape(O, I))
    yield
    state["momentum_buffer"] = torch.zeros(O, I) if old is None else old.detach()
    world.model.zero_grad()


@scenario("momentum_buffer")
def momentum_buffer_in_float64(world):
    yield from with_buffer(world, Tensor.double)


@scenario("momentum_buffer")
def momentum_buffer_in_bfloat16(world):
    yield from with_buffer(world, Tensor.bfloat16)


@scenario("momentum_buffer")
def momentum_buffer_of_one_row(world):
    yield from with_buffer(world, lambda buffer: buffer[:1].clone())


@scenario("momentum_buffer")
def momentum_buffer_of_more_dimensions(world):
    yield from with_buffer(world, lambda buffer: buffer[None].clone())


@scenario("momentum_buffer")
def momentum_buffer_transposed(world):
    yield from with_buffer(world, lambda buffer: buffer.T.contiguous().T)


@scenario("momentum_buffer")
def momentum_buffer_expanded(world):
    yield from with_buffer(world, lambda buffer: buffer[:1].expand(O, I))


@scenario("momentum_buffer")
def momentum_buffer_that_requires_grad(world):
    yield from with_buffer(world, lambda buffer: buffer.requires_grad_())


@scenario("momentum_buffer|share memory")
def momentum_buffer_in_the_weights_own_memory(world):
    yield from with_buffer(world, lambda buffer: world.model.weight.detach())


@scenario()
def momentum_buffer_that_is_no_tensor(world):
    yield from with_buffer(world, lambda buffer: 0.5)


@scenario("share memory")
def momentum_buffer_in_the_inputs_memory(world):
    yield from with_buffer(world, lambda buffer: world.input[:O])
    world.input = torch.randn(B, I, generator=torch.Generator().manual_seed(8))


@scenario("hook|subclass|ordinary|Adam", replaces=True)
def adam(world):
    world.optimizer = torch.optim.Adam(world.model.parameters(), lr=0.01)
    yield


@scenario(plans=ANY_PLAN, replaces=True)
def foreach_sgd(world):
    world.optimizer = torch.optim.SGD(world.model.parameters(), lr=0.01, foreach=False)
    yield


# --- parameters ---------------------------------------------------------------------------------


@scenario("parameters")
def weight_replaced_by_a_new_parameter(world):
    """The plain loop then trains the bias only: the optimizer still holds the old weight."""
    old = world.model.weight
    world.model.weight = nn.Parameter(old.detach() * 2)
    yield
    world.log.append(old.detach().clone())
    world.model.weight = old


@scenario("parameters")
def bias_removed(world):
    bias = world.model.bias
    world.model.bias = None
    yield
    world.model.bias = bias


@scenario("Parameter", comes_back=False)
def weight_that_is_a_plain_tensor(world):
    weight = world.model.weight
    del world.model.weight
    world.model.weight = weight.detach() * 2
    yield


@scenario("Parameter")
def attribute_that_hides_the_weight(world):
    world.model.__dict__["weight"] = world.model.weight.detach() * 2
    yield
    del world.model.__dict__["weight"]


@scenario("frozen")
def frozen_weight(world):
    world.model.weight.requires_grad_(False)
    yield
    world.model.weight.requires_grad_(True)


@scenario("frozen")
def frozen_bias(world):
    world.model.bias.requires_grad_(False)
    yield
    world.model.bias.requires_grad_(True)


@scenario("frozen")
def frozen_model(world):
    world.model.requires_grad_(False)
    yield
    world.model.requires_grad_(True)


@scenario(r"\.grad is not None", steps=1)
def gradient_already_in_weight(world):
    """A gradient that is there is added to, as after loss.backward() of another batch."""
    world.model.weight.grad = torch.ones(O, I)
    yield
    world.model.zero_grad()


@scenario(r"\.grad is not None", steps=1)
def gradient_already_in_bias(world):
    world.model.bias.grad = torch.ones(O)
    yield
    world.model.zero_grad()


@scenario(r"\.grad is not None", steps=1)
def gradients_of_another_backward(world):
    F.l1_loss(world.model(world.input), world.target).backward()
    yield
    world.model.zero_grad()


@scenario("contiguous")
def transposed_weight(world):
    world.model.weight.data = world.model.weight.data.T.contiguous().T
    yield
    world.model.weight.data = world.model.weight.data.contiguous()


@scenario("contiguous")
def bias_with_stride(world):
    world.model.bias.data = torch.stack([world.model.bias.data] * 2, dim=1)[:, 0]
    yield
    world.model.bias.data = world.model.bias.data.clone()


@scenario("contiguous", comes_back=False)
def expanded_weight(world):
    world.model.weight.data = world.model.weight.data[:1].expand(O, I)
    yield


@scenario("share memory")
def bias_in_the_weights_memory(world):
    world.model.bias.data = world.model.weight.data.view(-1)[2 : 2 + O]
    yield
    world.model.bias.data = world.model.bias.data.clone()


@scenario(comes_back=False)
def weight_of_another_dtype_than_the_bias(world):
    world.model.weight.data = world.model.weight.data.double()
    yield


@scenario(plans=FUSED_PLANS, comes_back=False)
def bfloat16_everything(world):
    world.optimizer.state.clear()
    world.model.bfloat16()
    world.input, world.target = world.input.bfloat16(), world.target.bfloat16()
    yield


@scenario("float32, float64, bfloat16 or float16", comes_back=False)
def complex_everything(world):
    world.optimizer.state.clear()
    for parameter in world.model.parameters():
        parameter.data = parameter.data.to(torch.complex64)
    world.input, world.target = (a.to(torch.complex64) for a in (world.input, world.target))
    yield


@scenario(comes_back=False)
def weight_on_meta(world):
    world.optimizer.state.clear()
    world.model.weight = nn.Parameter(torch.empty(O, I, device="meta"))
    world.model.bias = nn.Parameter(torch.empty(O, device="meta"))
    world.optimizer.param_groups[0]["params"] = list(world.model.parameters())
    world.input, world.target = world.input.to("meta"), world.target.to("meta")
    yield


@scenario("Parameters of its own", comes_back=False)
def parametrized_weight(world):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(world.model, "weight", Doubled())
    yield


@scenario(comes_back=False)
def weight_norm(world):
    parametrizations.weight_norm(world.model)
    yield


@scenario(comes_back=False)
def pruned_weight(world):
    prune.custom_from_mask(world.model, "weight", torch.arange(O * I).reshape(O, I) % 2)
    yield


@scenario(comes_back=False)
def weight_of_a_tensor_subclass(world):
    weight = nn.Parameter(world.model.weight.detach().as_subclass(Tagged))
    world.model.weight = weight
    world.optimizer.param_groups[0]["params"][0] = weight
    yield


@scenario("Parameter|ordinary", comes_back=False)
def weight_of_a_distributed_tensor(world):
    """A DTensor has no memory of its own: writing to its data_ptr would crash."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    distribute_module(world.model, mesh)
    world.optimizer.state.clear()
    world.optimizer.param_groups[0]["params"] = list(world.model.parameters())
    world.input, world.target = (DTensor.from_local(a, mesh) for a in (world.input, world.target))
    yield
    for name in ("input", "target"):
        setattr(world, name, getattr(world, name).to_local())
    dist.destroy_process_group()


@scenario("Parameter", comes_back=False)
def weight_swapped_with_one_of_a_tensor_subclass(world):
    """torch.utils.swap_tensors exchanges the contents, and the class, of two objects."""
    with torch.no_grad():
        subclass = nn.Parameter(world.model.weight.detach().as_subclass(Doubling))
    torch.utils.swap_tensors(world.model.weight, subclass)
    yield


@scenario("Parameter")
def weight_whose_class_is_changed(world):
    world.model.weight.__class__ = DoublingParameter
    yield
    world.model.weight.__class__ = nn.Parameter


@scenario("momentum_buffer")
def momentum_buffer_whose_class_is_changed(world):
    state = world.optimizer.state[world.model.weight]
    buffer = state.setdefault("momentum_buffer", torch.zeros(O, I))
    buffer.__class__ = Negating
    yield
    buffer.__class__ = Tensor


@scenario("forward")
def forward_in_a_dictionary_that_replaces_the_modules(world):
    old = world.model.__dict__
    linear = world.model.forward
    world.model.__dict__ = {**old, "forward": lambda input: 2 * linear(input)}
    yield
    world.model.__dict__ = old


@scenario("replaced")
def step_in_a_dictionary_that_replaces_the_optimizers(world):
    old = world.optimizer.__dict__
    world.optimizer.__dict__ = {**old, "step": world.note("step")}
    yield
    world.optimizer.__dict__ = old
    world.model.zero_grad()


# --- data ---------------------------------------------------------------------------------------


class Tagged(Tensor):
    """A subclass that notes the functions it goes through."""

    log: list[str] | None = None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if cls.log is not None:
            cls.log.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


class Doubling(Tensor):
    """A subclass that changes what is computed."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        found = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * found.as_subclass(Tensor) if func is F.linear else found


class DoublingParameter(nn.Parameter):
    """A parameter that changes what is computed."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
            return 2 * found if func is F.linear else found


class Negating(Tensor):
    """A tensor that cannot be added to."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.add_:
                kwargs = {**(kwargs or {}), "alpha": -1}
            return func(*args, **(kwargs or {}))


class Wrapper(Tensor):
    """A tensor without storage that holds another one, unwrapped by __torch_dispatch__."""

    @staticmethod
    def __new__(cls, held):
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = torch.utils._pytree.tree_map_only(
            cls, lambda a: a.held, (args, kwargs or {})
        )
        return func(*args, **kwargs)


for _name in ("input", "target"):

    @scenario("itself", name=f"{_name} of a tensor subclass")
    def subclass(world, name=_name):
        Tagged.log = world.log
        setattr(world, name, getattr(world, name).as_subclass(Tagged))
        yield
        Tagged.log = None

    @scenario("itself", name=f"{_name} of a subclass that changes the result")
    def changing_subclass(world, name=_name):
        setattr(world, name, getattr(world, name).as_subclass(Doubling))
        yield

    @scenario("itself", name=f"{_name} of a wrapper subclass without storage")
    def wrapper_subclass(world, name=_name):
        setattr(world, name, Wrapper(getattr(world, name)))
        yield

    @scenario("gradient", name=f"{_name} requires grad")
    def requires_grad(world, name=_name):
        getattr(world, name).requires_grad_()
        yield

    @scenario("gradient", name=f"{_name} computed from a tensor that requires grad")
    def non_leaf(world, name=_name):
        leaf = getattr(world, name).clone().requires_grad_()
        setattr(world, name, leaf * 2)
        yield
        world.log.append(leaf.grad)
        world.model.zero_grad()

    @scenario(name=f"{_name} an inference tensor")
    def inference_tensor(world, name=_name):
        with torch.inference_mode():
            setattr(world, name, getattr(world, name).clone())
        yield

    @scenario("dtype", name=f"{_name} in float64")
    def float64(world, name=_name):
        """The loss promotes a float64 target; the layer refuses a float64 input."""
        setattr(world, name, getattr(world, name).double())
        yield
        world.model.zero_grad()

    for _dtype in (torch.bfloat16, torch.int64, torch.bool, torch.complex64):

        @scenario("dtype", name=f"{_name} in {_dtype}")
        def other_dtype(world, name=_name, dtype=_dtype):
            setattr(world, name, getattr(world, name).to(dtype))
            yield
            world.model.zero_grad()

    @scenario(name=f"{_name} on meta")
    def on_meta(world, name=_name):
        setattr(world, name, getattr(world, name).to("meta"))
        yield
        world.model.zero_grad()

    @scenario(name=f"{_name} sparse")
    def sparse(world, name=_name):
        setattr(world, name, getattr(world, name).to_sparse())
        yield
        world.model.zero_grad()

    @scenario(name=f"{_name} in the layout of MKL-DNN")
    def mkldnn(world, name=_name):
        setattr(world, name, getattr(world, name).to_mkldnn())
        yield
        world.model.zero_grad()

    @scenario(plans=ANY_PLAN, name=f"{_name} with a negative bit")
    def negative_bit(world, name=_name):
        held = getattr(world, name)
        lazy = torch.complex(torch.zeros_like(held), -held).conj().imag
        assert lazy.is_neg()
        setattr(world, name, lazy)
        yield

    @scenario(plans=ANY_PLAN, name=f"{_name} a Parameter without gradient")
    def parameter(world, name=_name):
        setattr(world, name, nn.Parameter(getattr(world, name), requires_grad=False))
        yield

    @scenario(name=f"{_name} a dual number of forward-mode differentiation")
    def dual(world, name=_name):
        with forward_ad.dual_level():
            held = getattr(world, name)
            setattr(world, name, forward_ad.make_dual(held, torch.ones_like(held)))
            yield
        world.model.zero_grad()


@scenario("leading dimensions")
def target_that_broadcasts(world):
    world.target = world.target[:, :1]
    yield


@scenario("leading dimensions")
def target_of_one_row(world):
    world.target = world.target[0]
    yield


@scenario("leading dimensions")
def target_of_no_dimensions(world):
    world.target = world.target[0, 0]
    yield


@scenario("leading dimensions")
def input_of_one_row_and_targets_of_many(world):
    world.input = world.input[0]
    yield


@scenario("leading dimensions")
def target_of_another_number_of_rows(world):
    world.target = world.target[: B - 1]
    yield
    world.model.zero_grad()


@scenario("leading dimensions")
def target_transposed(world):
    world.target = world.target.T
    yield
    world.model.zero_grad()


@scenario("leading dimensions")
def input_of_too_many_features(world):
    world.input = torch.cat([world.input, world.input[:, :1]], dim=1)
    yield


@scenario("leading dimensions")
def input_of_no_dimensions(world):
    world.input = world.input[0, 0]
    yield


@scenario("leading dimensions")
def target_with_one_more_leading_dimension(world):
    world.target = world.target[None]
    yield


@scenario("itself")
def target_that_is_a_number(world):
    world.target = 0.5
    yield


@scenario("itself")
def input_that_is_an_array(world):
    world.input = world.input.cpu().numpy()
    yield


@scenario("share memory")
def input_in_the_weights_memory(world):
    world.input = world.model.weight.detach()
    world.target = world.target[:O]
    yield


@scenario("share memory")
def target_in_the_weights_memory(world):
    world.target = world.model.weight.detach()[:, :O]
    world.input = world.input[:O]
    yield


@scenario("share memory")
def target_in_the_biases_memory(world):
    world.target = world.model.bias.detach().expand(B, O)
    yield


@scenario("share memory")
def input_with_its_last_row_in_the_weights_memory(world):
    joined = torch.randn(B * I + O * I, generator=torch.Generator().manual_seed(3))
    world.model.weight.data = joined[-O * I :].view(O, I)
    world.input = joined[I : I + B * I].view(B, I)
    yield
    world.model.weight.data = world.model.weight.data.clone()


@scenario(plans=FUSED_PLANS)
def input_right_before_the_weights_memory(world):
    joined = torch.randn(B * I + O * I, generator=torch.Generator().manual_seed(3))
    world.model.weight.data = joined[-O * I :].view(O, I)
    world.input = joined[: B * I].view(B, I)
    yield
    world.model.weight.data = world.model.weight.data.clone()


# --- losses -------------------------------------------------------------------------------------


@scenario("ShiftedMSE")
def loss_subclass(world):
    world.loss_function.__class__ = ShiftedMSE
    yield
    world.loss_function.__class__ = nn.MSELoss


@scenario("forward")
def instance_forward_of_loss(world):
    forward = world.loss_function.forward
    with attribute(world.loss_function, "forward", lambda *batch: 2 * forward(*batch)):
        yield


@scenario("_call_impl")
def instance_call_impl_of_loss(world):
    call = world.loss_function._call_impl
    with attribute(world.loss_function, "_call_impl", lambda *batch: 2 * call(*batch)):
        yield


@scenario("reduction")
def reduction_none(world):
    world.loss_function.reduction = "none"
    yield
    world.loss_function.reduction = "mean"
    world.model.zero_grad()


@scenario("reduction")
def reduction_none_of_one_element(world):
    """backward() takes a loss of one element, whatever its shape; the step returns that."""
    world.loss_function.reduction = "none"
    world.input, world.target = world.input[:1], world.target[:1, :1]
    yield
    world.loss_function.reduction = "mean"
    world.model.zero_grad()


@scenario("reduction")
def reduction_unknown(world):
    world.loss_function.reduction = "median"
    yield
    world.loss_function.reduction = "mean"


@scenario("reduction")
def reduction_that_is_no_string(world):
    world.loss_function.reduction = None
    yield
    world.loss_function.reduction = "mean"


# Losses that TrainStep is constructed with.
for _name, _loss in {
    "L1Loss": nn.L1Loss(),
    "SmoothL1Loss": nn.SmoothL1Loss(),
    "a function": lambda output, target: (output - target).abs().mean(),
    "partial with weights": functools.partial(F.mse_loss, weight=torch.ones(B, O)),
    "partial of another loss": functools.partial(F.l1_loss, reduction="sum"),
    "partial with reduction none": functools.partial(F.mse_loss, reduction="none"),
    "partial with legacy arguments": functools.partial(F.mse_loss, size_average=False),
    "partial with arguments in order": functools.partial(F.mse_loss, torch.zeros(B, O)),
    "partial with a wrong argument": functools.partial(F.mse_loss, reduction="mean", axis=0),
}.items():

    @scenario("loss", replaces=True, name=f"loss {_name}")
    def other_loss(world, loss=_loss):
        world.loss_function = loss
        yield


@scenario("Sequential|MLP", replaces=True)
def mlp(world):
    torch.manual_seed(1)
    world.model = nn.Sequential(nn.Linear(I, 7), nn.Tanh(), nn.Linear(7, O))
    world.optimizer = torch.optim.SGD(world.model.parameters(), lr=0.05, momentum=0.9)
    yield


@scenario("hooks", replaces=True, steps=1)
def lazy_linear(world):
    torch.manual_seed(1)
    world.model = nn.LazyLinear(O)
    world.optimizer = torch.optim.SGD(world.model.parameters(), lr=0.05)
    yield


# --- modes --------------------------------------------------------------------------------------


@scenario("gradients are disabled")
def no_grad(world):
    with torch.no_grad():
        yield


@scenario("gradients are disabled")
def inference_mode(world):
    with torch.inference_mode():
        yield


@scenario("autocast")
def autocast(world):
    with torch.autocast(DEVICE.type):
        yield


@scenario("autocast", name="autocast to float16")
def autocast_float16(world):
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        yield


@scenario(plans=ANY_PLAN)
def autocast_disabled(world):
    with torch.autocast(DEVICE.type, enabled=False):
        yield


@scenario("anomaly")
def anomaly_mode(world):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        anomaly = torch.autograd.detect_anomaly()
    with anomaly:
        yield


class NotingFunctions(TorchFunctionMode):
    def __init__(self, log):
        super().__init__()
        self.log = log

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.log.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class NotingDispatches(TorchDispatchMode):
    def __init__(self, log):
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.log.append(str(func))
        return func(*args, **(kwargs or {}))


@scenario("TorchFunctionMode")
def torch_function_mode(world):
    with NotingFunctions(world.log):
        yield


@scenario("TorchFunctionMode")
def device_context(world):
    with torch.device("cpu"):
        yield


@scenario("TorchFunctionMode")
def default_device(world):
    torch.set_default_device("cpu")
    yield
    torch.set_default_device(None)


@scenario("[Dd]ispatch")
def torch_dispatch_mode(world):
    with NotingDispatches(world.log):
        yield


@scenario("[Dd]ispatch")
def fake_tensor_mode(world):
    with FakeTensorMode():
        yield


@scenario("[Dd]ispatch|ordinary|itself")
def fake_input(world):
    with FakeTensorMode() as mode:
        world.input = mode.from_tensor(world.input)
        yield


@scenario("[Dd]ispatch|ordinary|itself")
def fake_input_outside_of_its_mode(world):
    world.input = FakeTensorMode().from_tensor(world.input)
    yield


@scenario("[Dd]ispatch")
def vmap(world):
    yield lambda step: torch.func.vmap(lambda unused: step())(torch.zeros(2))


@scenario("[Dd]ispatch")
def functorch_grad(world):
    yield lambda step: torch.func.grad(lambda unused: step())(torch.zeros(()))


@scenario("[Dd]ispatch")
def functorch_jvp(world):
    yield lambda step: torch.func.jvp(lambda unused: step(), (torch.zeros(()),), (torch.ones(()),))


@scenario("[Dd]ispatch")
def functionalize(world):
    yield lambda step: torch.func.functionalize(lambda unused: step())(torch.zeros(()))


@scenario(plans=ANY_PLAN)
def deterministic_algorithms(world):
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", autouse=True)
def _forward_ad_is_loaded() -> None:
    """Its first use compiles some of PyTorch's own functions, and warns that this is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


# === the tests ==================================================================================


def outcome(world: World, step: Callable[..., Tensor], via: Callable[..., Any] | None) -> list[Any]:
    """What one step returned, raised and warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # torch.compile's, once or twice, on Python 3.13.0.
        warnings.filterwarnings("ignore", "Guards may run slower", RuntimeWarning)
        call = functools.partial(step, world.input, world.target)
        try:
            found: Any = via(call) if via is not None else call()
        except Exception as error:
            found = (type(error), without_addresses(str(error)))
    return [found, [(w.category, without_addresses(str(w.message))) for w in caught]]


def without_addresses(message: str) -> str:
    """The message without what differs from object to object, or in the last digit."""
    message = re.sub(r"0x[0-9a-f]+", "0x…", message)
    message = re.sub(r"tensor\([^()]*\)", "tensor(…)", message)
    return re.sub(r"\bid\s*\d+|\d{9,}", "…", message).split("\n  File")[0]


def state_of(world: World) -> dict[str, Any]:
    """All that the world holds, copied."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        return _state_of(world)


def _state_of(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {"log": list(world.log)}
    parameters = dict(world.model.named_parameters())
    for number, group in enumerate(world.optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            parameters[f"group {number}, {position}"] = parameter
        found[f"group {number}"] = {k: v for k, v in group.items() if k != "params"}
    for name, parameter in parameters.items():
        found[name] = copied(parameter)
        found[f"{name}._version"] = version_of(parameter)
        found[f"{name}.grad"] = copied(parameter.grad)
        state = world.optimizer.state.get(parameter)
        found[f"state of {name}"] = state and {k: copied(v) for k, v in state.items()}
    for name in ("input", "target"):
        data = getattr(world, name)
        found[name] = copied(data)
        if isinstance(data, Tensor) and data.is_leaf:
            found[f"{name}.grad"] = copied(data.grad)
    return found


def version_of(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def copied(value: Any) -> Any:
    """A copy that later writes do not reach; of a tensor without values what can be told of it."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(value, Wrapper):
        return copied(value.held)
    if isinstance(value, DTensor):
        return copied(value.detach().to_local())
    if isinstance(value, torch._subclasses.FakeTensor) or value.is_meta:
        return (type(value), value.dtype, value.shape, value.device)
    if isinstance(value, nn.parameter.UninitializedParameter):
        return type(value)
    with torch.no_grad():
        value = value.detach()
        if value.is_sparse or value.is_mkldnn:
            value = value.to_dense()
        return value.clone()


def equal(a: Any, b: Any, is_close: bool = False) -> bool:
    """The same value, of tensors bit for bit or close; NaN is equal to NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        a, b = copied(a), copied(b)
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return a == b
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        if is_close:
            # A float64 buffer holds gradients of float32.
            eps = max(torch.finfo(a.dtype).eps, torch.finfo(torch.float32).eps)
            # Of values of order one: sums of 40 terms in two orders, some 8 roundings in each.
            tolerance = 16 * eps
            return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        return bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k], is_close) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(equal(x, y, is_close) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return type(a) is type(b) and bool(a == b)


def assert_equal(
    ours: dict[str, Any], twins: dict[str, Any], when: str, plan: str = "plain"
) -> None:
    assert ours.keys() == twins.keys()
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        for name in ours:
            if plan == "plain" or not name.endswith("._version"):
                assert equal(ours[name], twins[name], is_close=plan == "head"), (
                    f"{when}: {name}: {ours[name]} != {twins[name]}"
                )


def copy_state(source: World, destination: World) -> None:
    """Makes the destination's parameters and momentum the source's, bit for bit."""
    pairs = zip(source.model.parameters(), destination.model.parameters(), strict=True)
    for ours, other in pairs:
        with torch.no_grad():
            other.copy_(ours)
        torch._C._autograd._unsafe_set_version_counter((other,), (ours._version,))
        if ours in source.optimizer.state:
            destination.optimizer.state[other] = copy.deepcopy(source.optimizer.state[ours])


def compare_under(
    scenario: Scenario, ours: World, twin: World, step: Any, plans: tuple[str, ...]
) -> None:
    """Enters the cause in both worlds in turn, takes two steps in each, and compares.

    Args:
        plans: the plans that those steps may take.
        step: what trains `ours`; None: a TrainStep made once the cause is there.
    """
    inside, after = [], []
    for world in (ours, twin):
        with contextlib.contextmanager(scenario.cause)(world) as via:
            if world is ours:
                if step is None:
                    step = fused_step.TrainStep(ours.model, ours.loss_function, ours.optimizer)
                    check_explanation(scenario, ours, step, via)
                train = step
            else:
                train = functools.partial(
                    plain_step, twin.model, twin.loss_function, twin.optimizer
                )
            found = []
            for _ in range(scenario.steps):
                found += outcome(world, train, via)
                if world is ours:
                    assert step.plan in plans
            inside.append({"outcomes": found, **state_of(world)})
        after.append(state_of(world))
    if step.plan in LOOP_PLANS:
        assert_equal(inside[0], inside[1], "inside", step.plan)
        assert_equal(after[0], after[1], "afterwards", step.plan)
    else:
        for name in ("weight", "bias"):
            torch.testing.assert_close(inside[0][name], inside[1][name])


def check_explanation(scenario: Scenario, world: World, step: Any, via: Any) -> None:
    """explain() names a plan that may be taken, gives the reason, and leaves no trace."""
    before, plan = state_of(world), step.plan
    said: list[str] = []
    explain = functools.partial(step.explain, world.input, world.target)
    if via is None:
        said.append(explain())
    else:
        # The transform wants a tensor from what it calls.
        def tell() -> Tensor:
            said.append(explain())
            return torch.zeros(())

        with contextlib.suppress(Exception):
            via(tell)
    assert len(said) >= 1
    assert any(name in said[0] for name in scenario.plans), said[0]
    assert_equal(state_of(world), before, "explain")
    assert step.plan == plan
    if scenario.reason:
        assert_says(scenario.reason, said[0])


def assert_says(reason: str, said: str) -> None:
    assert re.search(reason, said), f"no {reason!r} in: {said}"


def skip_where_it_cannot_be(name: str) -> None:
    if DEVICE.type != "cpu" and name == "weight_of_a_distributed_tensor":
        pytest.skip("CPU only: a mesh of CPUs")
    if DEVICE.type != "cpu" and "MKL-DNN" in name:
        pytest.skip("CPU only: a layout of the CPU's")


@pytest.mark.parametrize("plans", [ONE_PASS, ("head",)], ids=["one-pass", "head"])
@pytest.mark.parametrize("name", [k for k, s in SCENARIOS.items() if not s.replaces])
def test_cause_arising_after_a_fused_step_lowers_the_plan_until_it_is_gone(name, plans):
    """TrainStep may not rely on what it found at the steps before.

    Nothing but those steps comes before: explain() might look at everything anew.
    """
    scenario = SCENARIOS[name]
    skip_where_it_cannot_be(name)
    ours, twin = build(scenario), build(scenario)
    if plans == ("head",):
        # No plan of a linear layer: the optimizer has a parameter more. It is no part of a world.
        for world in (ours, twin):
            world.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    batch = ours.input.clone(), ours.target.clone()
    step = fused_step.TrainStep(ours.model, ours.loss_function, ours.optimizer)
    for _ in range(3):
        step(*batch)
        assert step.plan in plans
    copy_state(ours, twin)
    compare_under(scenario, ours, twin, step, LOOP_PLANS if plans == ("head",) else scenario.plans)
    if scenario.comes_back:
        copy_state(ours, twin)
        step(*batch)
        assert step.plan in plans
        plain_step(twin.model, twin.loss_function, twin.optimizer, *batch)
        torch.testing.assert_close(ours.linear.weight, twin.linear.weight, equal_nan=True)


@pytest.mark.parametrize("name", SCENARIOS)
def test_step_constructed_under_the_cause_takes_a_lower_plan(name):
    scenario = SCENARIOS[name]
    skip_where_it_cannot_be(name)
    compare_under(scenario, build(scenario), build(scenario), None, scenario.plans)


@pytest.mark.parametrize("name", ["input", "target"])
def test_data_that_have_lost_their_storage_are_not_read(name):
    """The plain loop reads freed memory then; there is nothing to compare."""
    world = build(SCENARIOS["frozen_bias"])
    step = fused_step.TrainStep(world.model, world.loss_function, world.optimizer)
    getattr(world, name).untyped_storage().resize_(0)
    said = step.explain(world.input, world.target)
    assert "plan: optimizer" in said
    assert_says(f"{name} has lost its storage", said)


def test_explain_gives_every_reason_at_once():
    world = build(SCENARIOS["frozen_bias"])
    step = fused_step.TrainStep(world.model, world.loss_function, world.optimizer)
    world.model.bias.requires_grad_(False)
    world.model.weight.grad = torch.zeros(O, I)
    world.model.register_forward_hook(world.note("forward"))
    world.loss_function.reduction = "none"
    world.optimizer.register_step_pre_hook(world.note("step"))
    world.target.requires_grad_()
    with torch.no_grad(), torch.autocast(DEVICE.type):
        said = step.explain(world.input.double(), world.target)
    for reason in (
        "bias is frozen",
        "weight.grad",
        "linear layer has hooks",
        "reduction",
        "optimizer.*hook",
        "target needs a gradient",
        "input is not of the weight's dtype",
        "gradients are disabled",
        "autocast",
    ):
        assert_says(reason, said)


FIRST_IN_INFERENCE_MODE = """
import torch, fused_step
from torch import nn

model = nn.Linear(3, 1)
step = fused_step.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
x, t = torch.randn(5, 3), torch.randn(5, 1)
with torch.inference_mode():
    step.explain(x, t)
step(x, t)
print(step.plan)
"""


def test_what_an_ordinary_tensor_is_does_not_depend_on_the_first_call():
    done = subprocess.run(
        [sys.executable, "-c", FIRST_IN_INFERENCE_MODE], capture_output=True, text=True, check=True
    )
    assert done.stdout == "one-pass\n"


@pytest.mark.parametrize(
    "options", [{"weight_decay": True}, {"nesterov": True, "momentum": True}], ids=str
)
def test_a_bool_for_a_number_has_the_plain_loops_error(options):
    model = nn.Linear(I, O)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False, **options)
    step = fused_step.TrainStep(model, nn.MSELoss(), optimizer)
    with pytest.raises(RuntimeError, match="Boolean alpha"):
        step(torch.randn(B, I), torch.randn(B, O))
    assert torch.equal(model.weight, before)
