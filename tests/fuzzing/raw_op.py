# SPDX-License-Identifier: MIT
"""Door "op": torch.ops.fused_step.linear_mse_sgd_, which checks its arguments itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from oracle import Problem, assert_within_rule, scales
from torch import Tensor, nn

from fuzzing import training
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
from fuzzing.outcomes import Outcome, assert_refused, copied, is_same, recorded, roundings

OP = torch.ops.fused_step.linear_mse_sgd_
WRITTEN = ("weight", "bias", "weight_buffer", "bias_buffer")
OPTIONS = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")

CHOICES = with_seed(
    *LINEAR,
    Choice("reduction", ("mean", "sum"), ("none", "other", 3)),
    *(renamed(LAYOUT, f"{name}_layout") for name in ("input", "target", *WRITTEN)),
    *(renamed(OTHER_DTYPE, f"{name}_dtype") for name in ("input", "target", *WRITTEN[1:])),
    Choice("shared", (None,), training.SHARED),
    Choice("input_is", ("fitting",), ("wider", "scalar", "list", "None", "deeper")),
    Choice("target_is", ("fitting",), (
        "one column", "one row", "scalar", "wider", "more rows", "list", "None", "deeper")),
    Choice("weight_is", ("fitting",), ("flat", "deeper", "needs grad", "cut")),
    Choice("bias_is", ("fitting",), ("wider", "scalar", "deeper")),
    Choice("buffers", ("both",), ("none", "weight only", "wrong shape", "cut")),
    Choice("lr", (1.0,), (0.1, 0.0, -1.0, "nan", "text")),
    Choice("momentum", (0.0, 0.9), (-0.5, 1, 1.5)),
    Choice("dampening", (0.0, 0.3), (1.0, -0.5)),
    Choice("weight_decay", (0.0, 0.05), (1e-8, -0.1, 2)),
    Choice("nesterov", (False, True)),
    Choice("maximize", (False, True)),
    Choice("first_step", (True, False)),
)  # fmt: skip


def plan_of(case: Case) -> Plan:
    I, O = case["I"], case["O"]
    leading = training.leading_of(case)
    wrong = case["buffers"] == "wrong shape"
    shapes = {
        "input": training.reshaped((*leading, I), case["input_is"]),
        "target": training.reshaped((*leading, O), case["target_is"]),
        "weight": {"flat": (O * I,), "deeper": (1, O, I)}.get(case["weight_is"], (O, I)),
        "bias": training.reshaped((O,), case["bias_is"]),
        "weight_buffer": (I, O + 1) if wrong else (O, I),
        "bias_buffer": (O,),
    }
    return plan_of_shapes(case, shapes)


def given(case: Case) -> tuple[str, ...]:
    """The optional tensors that the case passes."""
    with_bias = case["bias"]
    names = ["bias"] if with_bias else []
    if case["buffers"] != "none":
        names.append("weight_buffer")
        if with_bias and case["buffers"] != "weight only":
            names.append("bias_buffer")
    return tuple(names)


def tensors_of(case: Case, memory: Memory) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (*WRITTEN, "input", "target"):
        t = memory.tensors[name]
        if name in WRITTEN[1:] and name not in given(case):
            found[name] = None
        elif case.get(f"{name}_is") == "list":
            found[name] = t.tolist()
        elif case.get(f"{name}_is") == "None":
            found[name] = None
        else:
            found[name] = t
    if case["weight_is"] == "needs grad":
        found["weight"] = found["weight"].detach().requires_grad_()
    if case["weight_is"] == "cut":
        found["weight"] = lost(found["weight"])
    if case["buffers"] == "cut" and found["weight_buffer"] is not None:
        found["weight_buffer"] = lost(found["weight_buffer"])
    return found


def lost(t: Tensor) -> Tensor:
    """A tensor like `t` whose storage was freed under it."""
    t = t.clone(memory_format=torch.contiguous_format)
    t.untyped_storage().resize_(0)
    return t


def why_not(case: Case, plan: Plan) -> list[str]:
    """What is wrong about the arguments."""
    places = plan.places
    dtype = DTYPES[case["dtype"]]
    leading, O, I = training.leading_of(case), case["O"], case["I"]
    found = []
    for name in ("weight", *given(case)):
        p = places[name]
        expected = {"weight": (O, I), "weight_buffer": (O, I)}.get(name, (O,))
        if p.shape != expected:
            found.append(f"{name} is {p.shape}")
        if p.dtype != dtype:
            found.append(f"{name} is {p.dtype}")
        if not Memory(plan).tensors[name].is_contiguous():
            found.append(f"{name} is not contiguous")
    for name, columns in (("input", I), ("target", O)):
        p = places[name]
        deeper = case["input_is"] == case["target_is"] == "deeper"
        if case[f"{name}_is"] in ("list", "None"):
            found.append(f"{name} is no tensor")
        if p.shape != ((1, *leading, columns) if deeper else (*leading, columns)):
            found.append(f"{name} is {p.shape}")
        widened = name == "input" and dtype == torch.float32 and p.dtype.itemsize == 2
        if p.dtype != dtype and not widened:
            found.append(f"{name} is {p.dtype}")
    has_elements = O * I > 0
    for what, is_wrong in {
        "reduction": case["reduction"] not in ("mean", "sum"),
        "lr": case["lr"] == "text",
        "weight needs grad": case["weight_is"] == "needs grad",
        "weight has no storage": case["weight_is"] == "cut" and has_elements,
        "buffer has no storage": case["buffers"] == "cut" and has_elements,
        "no buffers": case["momentum"] != 0
        and (case["buffers"] == "none" or (case["buffers"] == "weight only" and case["bias"])),
    }.items():  # fmt: skip
        if is_wrong:
            found.append(what)
    guest, host = case["shared"] or (None, None)
    used = {"weight", "input", "target", *given(case)}
    if case["momentum"] == 0:
        used -= {"weight_buffer", "bias_buffer"}
    if guest in used and host in used and places[guest].host is not None:
        a, b = places[guest], places[host]
        meet = max(a.offset, b.offset) < min(a.end, b.end)
        both = 0 not in a.shape and 0 not in b.shape
        if meet and both and (guest in WRITTEN or host in WRITTEN):
            found.append(f"{guest} lies in {host}")
    return found


def lr_of(case: Case) -> Any:
    if isinstance(case["lr"], str):
        return float("nan") if case["lr"] == "nan" else case["lr"]
    fitting = Case({**case, "input_is": "fitting", "target_is": "fitting"})
    return case["lr"] * training.stable_lr(fitting)


def by_op(case: Case, plan: Plan) -> Outcome:
    memory = Memory(plan)
    outcome = Outcome(gaps=memory.gaps)
    tensors = tensors_of(case, memory)
    options = {name: case[name] for name in (*OPTIONS, "reduction", "first_step")}
    with recorded(outcome):
        loss = OP(*tensors.values(), lr=lr_of(case), **options)
        outcome.tensors["loss"] = copied(loss)
    outcome.memory = {name: a.clone() for name, a in memory.arenas.items()}
    outcome.tensors.update({name: copied(memory.tensors[name]) for name in tensors})
    return outcome


def by_loop(case: Case, plan: Plan, in_float64: bool) -> dict[str, Tensor]:
    """The five lines on the same tensors; what they leave in each."""
    memory = Memory(plan, in_float64)
    tensors = tensors_of(case, memory)
    params = {
        name: nn.Parameter(tensors[name])
        for name in ("weight", "bias")
        if tensors[name] is not None
    }
    optimizer = torch.optim.SGD(params.values(), lr=0.1, foreach=False, fused=False)
    optimizer.param_groups[0].update({name: case[name] for name in OPTIONS}, lr=lr_of(case))
    if case["momentum"] != 0 and not case["first_step"]:
        for name, p in params.items():
            optimizer.state[p]["momentum_buffer"] = tensors[f"{name}_buffer"]
    input = tensors["input"].to(params["weight"].dtype)
    y = F.linear(input, params["weight"], params.get("bias"))
    loss = F.mse_loss(y, tensors["target"], reduction=case["reduction"])
    loss.backward()
    optimizer.step()
    found = {"loss": loss.detach(), **{name: t.detach() for name, t in memory.tensors.items()}}
    if case["momentum"] != 0:
        for name, p in params.items():
            found[f"{name}_buffer"] = optimizer.state[p]["momentum_buffer"]
    return found


def scales_of(case: Case, plan: Plan) -> dict[str, float]:
    tensors = Memory(plan, in_float64=True).tensors
    lr = lr_of(case)
    problem = Problem(
        **{name: tensors[name] for name in ("input", "target", "weight")},
        bias=tensors["bias"] if case["bias"] else None,
        reduction=case["reduction"],
        options={"lr": abs(lr) if lr == lr else 0.0},
        edits={name: case[name] for name in OPTIONS},
        weight_buffer=None if case["first_step"] else tensors["weight_buffer"].real,
        bias_buffer=None if case["first_step"] else tensors["bias_buffer"].real,
    )
    found = scales(problem, 1)
    found["loss"] = found.pop("loss of step 0")
    sums = roundings(max(problem.target.numel(), case["I"]), case)
    return {name: sums * scale for name, scale in found.items()}


def run_op(case: Case) -> str:
    plan = plan_of(case)
    torch.set_num_threads(case["threads"])
    try:
        ours = by_op(case, plan)
    finally:
        torch.set_num_threads(1)
    wrong = why_not(case, plan)
    memory = Memory(plan)
    if ours.error is not None:
        assert wrong, f"raised {ours.error!r}"
        if case["weight_is"] == "needs grad" and "leaf Variable" in str(ours.error):
            return "error of PyTorch"
        assert_refused(ours, Outcome(tensors=memory.tensors, memory=memory.arenas))
        return "error of our own"
    assert not wrong, f"did not raise: {wrong}"
    for name, gap in memory.gaps().items():
        assert is_same(ours.gaps()[name], gap), f"wrote beside {name}"
    plain, exact = (by_loop(case, plan, in_float64) for in_float64 in (False, True))
    kind = "same bits"
    for name in ("loss", "weight", "input", "target", *given(case)):
        mine, value = ours.tensors[name], plain[name]
        if not is_same(mine, value):
            kind = "by the rule"
            scale = scales_of(case, plan)
            assert name in scale, f"{name} has changed"
            assert_within_rule(name, mine, value, exact[name], scale[name])
    return kind


OP_DOOR = Door("op", CHOICES, run_op)
