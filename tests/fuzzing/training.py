# SPDX-License-Identifier: MIT
"""Doors "step" and "run": a model, a loss and an optimizer of many kinds, trained by TrainStep."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import device
import torch
import torch.nn.functional as F
from oracle import Problem, largest_curvature, scales
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fused_step
from fuzzing.cases import Case, Choice, Door, renamed, with_seed
from fuzzing.memory import (
    DTYPES,
    LAYOUT,
    LINEAR,
    OTHER_DTYPE,
    Memory,
    Plan,
    plan_of_shapes,
)
from fuzzing.outcomes import Outcome, assert_like_plain, copied, recorded, roundings

# Those whose bits need not be the plain loop's.
FUSED_PLANS = ("tiny", "one-pass", "gemm", "head")
# Each tensor of a step, and those in whose memory it may lie.
HOSTS = {
    "target": ("input",),
    "weight": ("input", "target"),
    "bias": ("input", "target", "weight"),
    "weight_buffer": ("input", "target", "weight", "bias"),
    "bias_buffer": ("input", "target", "weight", "bias", "weight_buffer"),
}
SHARED = tuple((name, host) for name, hosts in HOSTS.items() for host in hosts)

CHOICES = with_seed(
    *LINEAR,
    Choice("reduction", ("mean", "sum"), ("none", "other")),
    *(
        renamed(LAYOUT, f"{name}_layout")
        for name in ("input", "target", "weight", "bias", "weight_buffer", "bias_buffer")
    ),
    *(
        renamed(OTHER_DTYPE, f"{name}_dtype")
        for name in ("input", "target", "bias", "weight_buffer")
    ),
    Choice("shared", (None,), SHARED),
    Choice("input_is", ("fitting",), ("wider", "scalar", "list", "None", "parameter", "deeper")),
    Choice(
        "target_is",
        ("fitting",),
        ("one column", "one row", "scalar", "wider", "more rows", "list", "None", "deeper"),
    ),
    Choice("needs_grad", (None,), ("input", "target", "both", "input not a leaf")),
    Choice("frozen", (None,), ("weight", "bias", "both")),
    Choice("grad", (None,), ("weight", "bias", "zeros")),
    Choice("model", ("linear", "sequential", "loss module", "frozen body", "trained body",
                     "own class", "own frozen body", "own trained body", "squeezed"), (
        "subclass", "network", "forward hook", "forward", "parameter hook", "accumulate hook")),
    Choice("loss", ("module", "function", "partial", "own function", "own class"), (
        "l1", "closure", "hook")),
    Choice("optimizer", ("torch", "fused"), ("adam", "subclass", "step hook", "foreach")),
    Choice("groups", ("one",), ("two", "no bias", "one more")),
    Choice("buffers", ("none", "both"), (
        "weight only", "None", "wrong shape", "needs grad", "parameter")),
    Choice("lr", (1.0,), (0.1, 0.0, -1.0, "int", "tensor", "vector", "nan")),
    Choice("momentum", (0.0, 0.9), (-0.5, 1, 1.5)),
    Choice("dampening", (0.0, 0.3), (1.0, -0.5)),
    Choice("weight_decay", (0.0, 0.05), (1e-8, -0.1, 2)),
    Choice("nesterov", (False, True)),
    Choice("maximize", (False, True)),
    Choice("around", ("nothing",), (
        "no_grad", "inference_mode", "autocast", "autocast without cache", "saved tensors hooks",
        "anomaly", "function mode", "dispatch mode", "global hook", "device")),
)  # fmt: skip


OWN_LOSSES = {
    "mean": lambda output, target: ((output - target) ** 2).mean(),
    "sum": lambda output, target: torch.sum(torch.square(target - output)),
}


class OwnLoss(nn.Module):
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        error = output - target
        return (error * error).mean()


class Network(nn.Module):
    """A layer that no fused plan takes, with the parameters of one that it would take."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, input: Tensor) -> Tensor:
        return torch.tanh(self.linear(input))


class Scale(nn.Module):
    """What comes before the last layer: the same values, with or without a gradient to give."""

    def __init__(self, is_trained: bool) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64), is_trained)

    def forward(self, input: Tensor) -> Tensor:
        return input * self.factor  # a scalar, which leaves the input its dtype


class Regression(nn.Module):
    """A layer by itself, in a class of one's own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, input: Tensor) -> Tensor:
        return self.linear(input)


class SqueezedRegression(Regression):
    def forward(self, input: Tensor) -> Tensor:
        return self.linear(input).squeeze(-1)


class ScaledRegression(nn.Module):
    """The same with something before it."""

    def __init__(self, is_trained: bool, linear: nn.Linear) -> None:
        super().__init__()
        self.scale, self.linear = Scale(is_trained), linear

    def forward(self, input: Tensor) -> Tensor:
        output = self.linear(self.scale(input))
        return output


def _same(t: Tensor) -> Tensor:
    return t


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class OwnSGD(torch.optim.SGD):
    pass


class _FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _global_hook() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        yield
    finally:
        handle.remove()


AROUND: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast(device.DEVICE.type, torch.bfloat16),
    "autocast without cache": lambda: torch.autocast(
        device.DEVICE.type, torch.bfloat16, cache_enabled=False
    ),
    "saved tensors hooks": lambda: torch.autograd.graph.saved_tensors_hooks(_same, _same),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "function mode": _FunctionMode,
    "dispatch mode": _DispatchMode,
    "global hook": _global_hook,
    "device": lambda: torch.device("cpu"),
}  # fmt: skip


def leading_of(case: Case) -> tuple[int, ...]:
    B = case["B"]
    return {"rows": (B,), "none": (), "two": (B, 2), "three": (2, 1, B)}[case["leading"]]


def reshaped(shape: tuple[int, ...], how: str) -> tuple[int, ...]:
    """A shape as a case wants it, wrong ones among them."""
    if how in ("wider", "one column"):
        last = 1 if how == "one column" else shape[-1] + 1
        return (*shape[:-1], last)
    if how == "deeper":
        return (1, *shape)
    if how == "scalar":
        return ()
    if how == "one row" and len(shape) > 1:
        return (1, *shape[1:])
    if how == "more rows":
        return (shape[0] + 1, *shape[1:])
    return shape


def plan_of(case: Case) -> Plan:
    I, O = case["I"], case["O"]
    leading = leading_of(case)
    shapes = {
        "input": reshaped((*leading, I), case["input_is"]),
        "target": reshaped((*leading, O), case["target_is"]),
        "weight": (O, I),
        "bias": (O,),
        "weight_buffer": (O, I + 1) if case["buffers"] == "wrong shape" else (O, I),
        "bias_buffer": (O,),
    }
    return plan_of_shapes(case, shapes)


def is_parameter(t: Tensor) -> bool:
    return t.dtype.is_floating_point or t.dtype.is_complex


class World:
    """The objects of a case, made anew for each way to train them."""

    def __init__(
        self,
        case: Case,
        plan: Plan,
        in_float64: bool = False,
        off_by: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.case = case
        self.memory = Memory(plan, in_float64, off_by, seed)
        self.tensors = self.memory.tensors
        self.loss_calls = 0
        # Exactly it is the composition, which takes a target of any dtype.
        self._gives_loss = case["model"] == "loss module" and not in_float64
        self._make_model()
        self._make_loss()
        self._make_optimizer()
        self.input = self._data("input", case["input_is"])
        self.target = self._data("target", case["target_is"])

    def _data(self, name: str, how: str) -> Any:
        t = self.tensors[name]
        if name == "target" and self.case["model"] == "squeezed" and t.dim() > 1:
            t = t.squeeze(-1)  # as the model does with its output
        if how == "list":
            return t.tolist()
        if how == "None":
            return None
        if how == "parameter" and is_parameter(t):
            return nn.Parameter(t, requires_grad=False)
        needs = self.case["needs_grad"]
        if needs is not None and is_parameter(t) and (needs == "both" or needs.startswith(name)):
            t = t.detach().requires_grad_()
            self.tensors[name] = t
            if needs == "input not a leaf":
                t = t * 1
        return t

    def _make_model(self) -> None:
        case, tensors = self.case, self.tensors
        kind = OwnLinear if case["model"] == "subclass" else nn.Linear
        if self._gives_loss:
            model = fused_step.LinearMSELoss(1, 1, reduction="mean")
            linear = model.linear
        else:
            linear = kind(1, 1)
            model = {
                "sequential": nn.Sequential,
                "network": Network,
                "frozen body": lambda linear: nn.Sequential(Scale(False), linear),
                "own class": Regression,
                "squeezed": SqueezedRegression,
                "own frozen body": functools.partial(ScaledRegression, False),
                "own trained body": functools.partial(ScaledRegression, True),
                "trained body": lambda linear: nn.Sequential(Scale(True), linear),
            }.get(case["model"], lambda linear: linear)(linear)
        frozen = case["frozen"]
        linear.weight = nn.Parameter(tensors["weight"], frozen not in ("weight", "both"))
        bias = tensors["bias"]
        may_need = is_parameter(bias) and frozen not in ("bias", "both")
        linear.bias = nn.Parameter(bias, may_need) if case["bias"] else None
        linear.out_features, linear.in_features = linear.weight.shape
        self.model, self.linear = model, linear
        if case["grad"] is not None:
            for name, p in (("weight", linear.weight), ("bias", linear.bias)):
                if p is not None and case["grad"] in (name, "zeros"):
                    p.grad = torch.full_like(p, 0.0 if case["grad"] == "zeros" else 0.5)
        if case["model"] == "forward hook":
            linear.register_forward_hook(lambda module, args, output: output * 2)
        elif case["model"] == "forward":
            linear.forward = lambda input: F.linear(input, linear.weight, linear.bias) * 2
        elif case["model"] == "parameter hook" and linear.weight.requires_grad:
            linear.weight.register_hook(lambda grad: grad * 2)
        elif case["model"] == "accumulate hook" and linear.weight.requires_grad:
            linear.weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2))

    def _make_loss(self) -> None:
        reduction = self.case["reduction"]
        if self._gives_loss:
            self.loss = None
            self.model.reduction = reduction
            return
        kind = self.case["loss"] if self.case["model"] != "loss module" else "partial"
        # A name that is none of the three is an error of the call.
        if kind == "l1":
            self.loss = nn.L1Loss(reduction=reduction)
        elif kind == "module" or kind == "hook":
            self.loss = nn.MSELoss(reduction=reduction)
            if kind == "hook":
                self.loss.register_forward_hook(lambda module, args, output: output * 2)
        elif kind == "function" and reduction == "mean":
            self.loss = F.mse_loss
        elif kind == "own function" and reduction in OWN_LOSSES:
            self.loss = OWN_LOSSES[reduction]
        elif kind == "own class" and reduction == "mean":
            self.loss = OwnLoss()
        elif kind == "closure":
            self.loss = lambda output, target: F.mse_loss(output, target, reduction=reduction)
        else:
            self.loss = functools.partial(F.mse_loss, reduction=reduction)

    def _make_optimizer(self) -> None:
        case = self.case
        params = [p for p in (self.linear.weight, self.linear.bias) if p is not None]
        groups: list[dict[str, Any]] = [{"params": params}]
        if case["groups"] == "two":
            groups = [{"params": [p]} for p in params]
        elif case["groups"] == "no bias":
            groups = [{"params": params[:1]}]
        elif case["groups"] == "one more":
            groups.append({"params": [nn.Parameter(torch.ones(2))]})
        kind = case["optimizer"]
        if kind == "adam":
            self.optimizer = torch.optim.Adam(groups, lr=0.01, foreach=False)
            return
        if kind == "fused":
            self.optimizer = self._sgd(fused_step.SGD, groups)
        else:
            foreach = kind == "foreach"
            made = OwnSGD if kind == "subclass" else torch.optim.SGD
            self.optimizer = self._sgd(made, groups, foreach=foreach, fused=False)
        if kind == "step hook":
            self.optimizer.register_step_post_hook(lambda *args: None)

    def _sgd(self, kind: type, groups: list[dict[str, Any]], **keywords: Any) -> Any:
        case = self.case
        optimizer = kind(groups, lr=0.1, **keywords)
        lr = {
            "int": 0,
            "tensor": torch.tensor(stable_lr(case)),
            "vector": torch.tensor([stable_lr(case)]),
            "nan": math.nan,
        }.get(case["lr"])
        if lr is None:
            lr = case["lr"] * stable_lr(case)
        names = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
        for number, group in enumerate(optimizer.param_groups):
            group.update({name: case[name] for name in names}, lr=lr)
            if number == 1 and case["groups"] == "two":
                group["lr"] = lr * 0.5
        self._give_buffers(optimizer)
        return optimizer

    def _give_buffers(self, optimizer: Any) -> None:
        how = self.case["buffers"]
        if how == "none":
            return
        for name, p in (("weight", self.linear.weight), ("bias", self.linear.bias)):
            if p is None or (how == "weight only" and name == "bias"):
                continue
            buffer: Tensor | None = self.tensors[f"{name}_buffer"]
            if how == "None":
                buffer = None
            elif how == "needs grad" and is_parameter(buffer):
                buffer = buffer.detach().requires_grad_()
            elif how == "parameter" and is_parameter(buffer):
                buffer = nn.Parameter(buffer, requires_grad=False)
            optimizer.state[p]["momentum_buffer"] = buffer

    def plain_step(self, input: Any, target: Any) -> Tensor:
        """The five lines."""
        if self.loss is None:
            loss = self.model(input, target)
        else:
            output = self.model(input)
            loss = self.loss(output, target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def take(self, outcome: Outcome) -> Outcome:
        """Copies all that the objects have become."""
        linear, optimizer = self.linear, self.optimizer
        found = outcome.tensors
        named = {"weight": linear.weight, "bias": linear.bias, "input": self.tensors["input"]}
        for name, t in named.items():
            found[name] = copied(t)
            found[f"{name}.grad"] = copied(None if t is None else t.grad)
        found["target"] = copied(self.tensors["target"])
        for name in ("weight", "bias"):
            state = optimizer.state.get(named[name], {})
            found[f"{name}_buffer"] = copied(state.get("momentum_buffer"))
        outcome.memory = {name: a.clone() for name, a in self.memory.arenas.items()}
        outcome.gaps = self.memory.gaps
        outcome.facts["state"] = [sorted(entry) for entry in optimizer.state.values()]
        outcome.facts["needs grad"] = [p.requires_grad for p in self.model.parameters()]
        outcome.facts["generator"] = int(torch.randint(1 << 30, ()))
        return outcome


@functools.lru_cache(maxsize=4)
def _curvature(shape: tuple[Any, ...]) -> float:
    return largest_curvature(_problem(Case(shape)))


def stable_lr(case: Case) -> float:
    """At which descent on the case's data contracts: half of what the largest curvature allows."""
    if case["input_is"] != "fitting" or case["target_is"] != "fitting":
        return 0.01
    names = ("B", "I", "O", "dtype", "bias", "reduction", "leading", "data", "input_layout")
    others = ("seed", "shared", "shift", "input_dtype", "target_layout", "target_dtype")
    key = tuple((name, case[name]) for name in (*names, *others))
    curvature = _curvature(key)
    momentum = case["momentum"]
    slower = 1 - momentum if 0 < momentum < 1 else 1.0
    return 0.5 * slower / max(curvature, 1e-3)


def _problem(case: Case) -> Problem:
    full = Case({**{c.name: c.simplest for c in CHOICES}, **case})
    tensors = Memory(plan_of(full), in_float64=True).tensors
    input, target = tensors["input"].real.double(), tensors["target"].real.double()
    if full["target_is"] != "fitting":
        # As the plain loop has it: output and target broadcast.
        shape = torch.broadcast_shapes((*input.shape[:-1], full["O"]), target.shape)
        input, target = input.expand(*shape[:-1], -1), target.expand(shape)
    return Problem(
        input=input,
        target=target,
        weight=tensors["weight"],
        bias=tensors["bias"].real.double() if full["bias"] else None,
        reduction="sum" if full["reduction"] == "sum" else "mean",
        options={"lr": 0.1},
    )


def scales_of(case: Case, world: World, steps: int, factor: float) -> dict[str, float]:
    """The scale of each tensor that training changes, at the options the optimizer has."""
    groups = world.optimizer.param_groups
    lrs = [abs(float(group["lr"])) for group in groups]
    lrs = [lr if lr == lr else 0.0 for lr in lrs]
    names = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
    given = world.case["buffers"] in ("both", "weight only", "parameter", "needs grad")
    tensors = Memory(plan_of(case), in_float64=True).tensors
    tensors = {name: t.real.double() for name, t in tensors.items()}
    problem = _problem(case)
    weight, bias = problem.weight, problem.bias
    buffers = [None, None]
    if given:
        buffers = [tensors["weight_buffer"], tensors["bias_buffer"]]
        if case["buffers"] == "weight only":
            buffers[1] = None
    if case["grad"] is not None:
        # A first step by gradients of 0.5 more, at most.
        weight = weight.abs() + lrs[0] * 0.5
        bias = None if bias is None else bias.abs() + lrs[-1] * 0.5
        buffers = [0.5 + (torch.zeros(()) if b is None else b.abs()) for b in buffers]
        buffers = [buffers[0].expand_as(weight), buffers[1].expand(weight.shape[0])]
    problem = dataclasses.replace(
        problem,
        weight=weight,
        bias=bias,
        options={"lr": lrs[0]},
        bias_options={"lr": lrs[1]} if case["groups"] == "two" and case["bias"] else None,
        edits={name: groups[0][name] for name in names if name in groups[0]},
        weight_buffer=buffers[0],
        bias_buffer=buffers[1],
    )
    factor *= roundings(max(problem.target.numel(), case["I"]), case)
    found = {name: factor * scale for name, scale in scales(problem, steps).items()}
    if case["grad"] is not None:
        found["weight.grad"] += 0.5
        found["bias.grad"] += 0.5
    # A buffer with fewer digits than the parameters makes them as coarse.
    for name in ("weight_buffer_dtype", "bias_buffer_dtype"):
        dtype = DTYPES.get(case.get(name))
        if dtype is not None and dtype.is_floating_point:
            coarser = torch.finfo(dtype).eps / torch.finfo(DTYPES[case["dtype"]]).eps
            found = {key: max(coarser, 1) * scale for key, scale in found.items()}
    changed = [found[name] for name in ("weight", "bias", "weight_buffer", "bias_buffer")]
    if case["optimizer"] == "adam":
        # It moves by lr whatever the gradient's size, and so by the sign of what rounding left.
        later = [f"loss of step {number}" for number in range(1, steps)]
        found.update(dict.fromkeys((*found.keys() - {"loss of step 0"}, *later), math.inf))
    # What shares its memory with a parameter has changed with it.
    return {"input": max(changed), "target": max(changed), **found}


# An element's way through a step: product and sum of the gradient, its factor, decay, momentum,
# dampening, the learning rate and the update.
ROUNDINGS_OF_A_STEP = 8
# Random ones, whose effects are added: one alone may happen to cancel.
DISTURBANCES = 4
# Less than this times the data does not stand out from float64's own rounding after a few steps.
SMALLEST_SHOWN = 2.0**-40


def writes_what_it_reads(case: Case) -> bool:
    """Whether an update changes more than the elements it is for."""
    written = ("weight", "bias", "weight_buffer", "bias_buffer")
    return case["shared"] is not None or any(
        case[f"{name}_layout"] in ("sliding", "one element", "expanded") for name in written
    )


def add_amplified(
    scales: dict[str, float], outcome: Callable[..., Outcome], eps: float, factor: float
) -> None:
    """Adds to each scale what data that are off by one rounding come to.

    Such a training has no bound of its own for what becomes of a rounding: an update may be read as
    data by the next step, and may be made of other updates. So it is measured, in float64.
    """
    exact = outcome(ours=False, in_float64=True)
    off_by = max(eps, SMALLEST_SHOWN)
    for seed in range(DISTURBANCES):
        off = outcome(ours=False, in_float64=True, off_by=off_by, seed=seed)
        for name, value in exact.tensors.items():
            other = off.tensors.get(name)
            if value is None or other is None or name not in scales or value.numel() == 0:
                continue
            largest = float((other - value).abs().nan_to_num(0.0).max())
            scales[name] += ROUNDINGS_OF_A_STEP * factor * largest / off_by


def assert_like_the_loop(
    case: Case,
    train: Callable[[World, Outcome, bool], None],
    steps: int,
    factor: float = 1.0,
    may_refuse: bool = False,
) -> str:
    """Trains a case by TrainStep and by the plain loop, each in a world of its own."""
    plan = plan_of(case)

    def outcome(
        ours: bool, in_float64: bool = False, off_by: float = 0.0, seed: int = 0
    ) -> Outcome:
        world = World(case, plan, in_float64, off_by, seed)
        result = Outcome()
        torch.default_generator.manual_seed(case["seed"])
        around = "nothing" if in_float64 else case["around"]
        with recorded(result), AROUND[around]():
            train(world, result, ours)
        return world.take(result)

    torch.set_num_threads(case["threads"])
    try:
        ours, plain = outcome(ours=True), outcome(ours=False)
    finally:
        torch.set_num_threads(1)

    def start() -> Outcome:
        world = World(case, plan)
        torch.default_generator.manual_seed(case["seed"])
        return world.take(Outcome())

    # Of the coarser parameter: what is made of both is no more exact.
    dtypes = (DTYPES.get(case[name]) for name in ("dtype", "bias_dtype"))
    eps = max(torch.finfo(d).eps for d in dtypes if d is not None and d is not torch.int64)

    def tensor_scales() -> dict[str, float]:
        found = scales_of(case, World(case, plan), steps, factor)
        if writes_what_it_reads(case):
            add_amplified(found, outcome, eps, factor)
        return found

    plans = ours.plans
    is_fused = any(p in FUSED_PLANS for p in plans)
    # Door 3 computes 16-bit parameters in float32 and rounds once.
    has_narrow = not {case["dtype"], case["bias_dtype"]}.isdisjoint(("bfloat16", "float16"))
    is_narrow = has_narrow and (case["optimizer"] == "fused" or "optimizer" in plans)
    kind = assert_like_plain(
        ours,
        plain,
        start=start,
        exact=lambda: outcome(ours=False, in_float64=True),
        scales=tensor_scales,
        is_fused=is_fused or is_narrow,
        may_refuse=may_refuse or case["model"] == "loss module",
        eps=eps,
    )
    if ours.error is not None:
        return kind
    return f"{plans[-1]}, {kind}"


# --- step ---------------------------------------------------------------------------------------


def run_steps(case: Case) -> str:
    def train(world: World, outcome: Outcome, ours: bool) -> None:
        one: Any = world.plain_step
        if ours:
            one = fused_step.TrainStep(world.model, world.loss, world.optimizer)
        for number in range(case["steps"]):
            if ours:
                said = one.explain(world.input, world.target).splitlines()[0]
            try:
                loss = one(world.input, world.target)
            finally:
                if ours:
                    outcome.plans.append(one.plan)
            outcome.tensors[f"loss of step {number}"] = copied(loss)
            outcome.facts[f"loss {number} needs grad"] = loss.requires_grad
            if ours:
                # What a body gives is seen in the step alone.
                is_open = said == "plan: head" and case["model"].endswith("body")
                expected = ("plan: optimizer", "plan: plain", said) if is_open else (said,)
                if said == "plan: optimizer":  # as far as it can tell before there are gradients
                    expected = (said, "plan: plain")
                assert f"plan: {one.plan}" in expected, f"said {said}, taken was {one.plan}"

    return assert_like_the_loop(case, train, case["steps"])


STEP = Door("step", (*CHOICES, Choice("steps", (1, 2, 3))), run_steps)


# --- run ----------------------------------------------------------------------------------------


def batches(n: int, case: Case, generator: torch.Generator) -> Iterator[Any]:
    """What indexes the rows of each batch of a run."""
    size = n if case["batch_size"] is None else case["batch_size"]
    for _ in range(case["epochs"]):
        order = torch.randperm(n, generator=generator) if case["shuffle"] else None
        for first in range(0, n, max(size, 1)):
            rows = slice(first, first + size)
            yield rows if order is None else order[rows]


def for_many_steps(case: Case) -> Case:
    """A case whose steps stay stable, and few enough."""
    case = Case(case)
    if isinstance(case["lr"], float):
        case["lr"] *= 0.01  # a batch of few rows has a larger curvature than all of them
    if abs(case["momentum"]) >= 1:
        case["momentum"] = 0.9
    if case["B"] > 100 and case["batch_size"] is not None:
        case["batch_size"] *= 100
    if case["shared"] is not None:
        # Some batches would share nothing and be fused.
        case["shuffle"], case["batch_size"] = False, None
    return case


def run_run(drawn: Case) -> str:
    case = for_many_steps(drawn)

    def train(world: World, outcome: Outcome, ours: bool) -> None:
        generator = torch.Generator().manual_seed(case["seed"])
        try:
            if ours:
                step = fused_step.TrainStep(world.model, world.loss, world.optimizer)
                try:
                    losses = step.run(
                        world.input,
                        world.target,
                        epochs=case["epochs"],
                        batch_size=case["batch_size"],
                        shuffle=case["shuffle"],
                        generator=generator,
                    )
                finally:
                    outcome.plans.append(step.plan)
            else:
                losses = [
                    world.plain_step(world.input[rows], world.target[rows])
                    for rows in batches(world.input.shape[0], case, generator)
                ]
            # None of them where a step has raised.
            outcome.tensors.update(
                (f"loss of step {number}", copied(loss)) for number, loss in enumerate(losses)
            )
        finally:
            outcome.facts["order"] = int(torch.randint(1 << 30, (), generator=generator))

    shapes = {name: place.shape for name, place in plan_of(case).places.items()}
    n = max(shapes["input"][0] if shapes["input"] else 1, 1)
    size = min(case["batch_size"] or n, n)
    # run() itself wants two tensors with as many rows.
    no_tensor = {case["input_is"], case["target_is"]} & {"list", "None"}
    refused = no_tensor or not shapes["input"] or shapes["input"][:1] != shapes["target"][:1]
    return assert_like_the_loop(
        case,
        train,
        case["epochs"] * math.ceil(n / size),
        factor=n / size,
        may_refuse=bool(refused),
    )


RUN = Door(
    "run",
    (
        *CHOICES,
        Choice("epochs", (1, 2, 3), (0,)),
        Choice("batch_size", (None, 2, 1, 3, 7, 16), (1000, 1 << 40, 1 << 70)),
        Choice("shuffle", (False, True)),
    ),
    run_run,
)
