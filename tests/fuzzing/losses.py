# SPDX-License-Identifier: MIT
"""Door "loss": linear_mse_loss, its gradients, and the gradients of those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import device
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from fuzzing.training import AROUND, is_parameter, leading_of, reshaped

NAMES = ("input", "weight", "bias", "target")
WANTED = tuple(
    tuple(name for k, name in enumerate(NAMES) if bits >> k & 1) for bits in range(16)
)  # fmt: skip

CHOICES = with_seed(
    *LINEAR,
    Choice("reduction", ("mean", "sum", "none"), ("other", 3, "")),
    *(renamed(LAYOUT, f"{name}_layout") for name in NAMES),
    *(renamed(OTHER_DTYPE, f"{name}_dtype") for name in ("input", "bias", "target")),
    Choice("shared", (None,), (
        ("target", "input"), ("weight", "input"), ("bias", "weight"), ("weight", "target"))),
    Choice("input_is", ("fitting",), ("wider", "scalar", "list", "None", "parameter", "deeper")),
    Choice("target_is", ("fitting",), (
        "one column", "one row", "scalar", "wider", "more rows", "list", "None", "deeper")),
    Choice("weight_is", ("fitting",), ("flat", "deeper", "no leaf", "list")),
    Choice("bias_is", ("fitting",), ("wider", "scalar", "deeper")),
    Choice("cut", (None,), NAMES),
    Choice("wanted", (("weight", "bias"), *WANTED)),
    Choice("grad_output", ("random", "ones"), ("zeros", "expanded", "nan", "strided")),
    Choice("backward", ("once",), ("none", "twice", "second", "after a write")),
    Choice("around", ("nothing",), tuple(name for name in AROUND if name != "nothing")),
)  # fmt: skip


def composed(input, weight, target, *, linear_bias, reduction):
    """What the function stands for."""
    return F.mse_loss(F.linear(input, weight, linear_bias), target, reduction=reduction)


def plan_of(case: Case) -> Plan:
    I, O = case["I"], case["O"]
    leading = leading_of(case)
    weight = {"flat": (O * I,), "deeper": (1, O, I)}.get(case["weight_is"], (O, I))
    shapes = {
        "input": reshaped((*leading, I), case["input_is"]),
        "target": reshaped((*leading, O), case["target_is"]),
        "weight": weight,
        "bias": reshaped((O,), case["bias_is"]),
    }
    return plan_of_shapes(case, shapes)


def operands_of(case: Case, memory: Memory) -> dict[str, Any]:
    """The arguments, some of which require grad."""
    found: dict[str, Any] = {}
    for name in NAMES:
        t = memory.tensors[name].detach()
        if name == "bias" and not case["bias"]:
            found[name] = None
            continue
        how = case[f"{name}_is"]
        if how in ("list", "None"):
            found[name] = t.tolist() if how == "list" else None
            continue
        if name in case["wanted"] and is_parameter(t):
            t.requires_grad_()
        if how == "parameter" and is_parameter(t):
            t = nn.Parameter(t, requires_grad=t.requires_grad)
        found[name] = t
    return found


def grad_output_of(case: Case, loss: Tensor) -> Tensor:
    how = case["grad_output"]
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    if how == "expanded":
        return torch.full((), 0.5, dtype=loss.dtype).expand(loss.shape)
    if how in ("ones", "zeros", "nan"):
        return torch.full_like(loss, {"ones": 1.0, "zeros": 0.0, "nan": float("nan")}[how])
    values = torch.randn((*loss.shape, 2), generator=generator, dtype=torch.float64)
    # Rounded to what the case's own loss has, in float64, too.
    values = values.to(DTYPES[case["dtype"]]).to(loss.dtype)
    return values[..., 0] if how == "strided" else values[..., 0].contiguous()


def evaluate(
    case: Case,
    plan: Plan,
    function: Callable[..., Any],
    in_float64: bool = False,
    absolute: bool = False,
) -> Outcome:
    """Calls a function on the case's tensors, or with `absolute` on tensors that are positive."""
    memory = Memory(plan, in_float64)
    outcome = Outcome()
    operands = operands_of(case, memory)
    around = "nothing" if in_float64 else case["around"]
    weight = operands["weight"]
    if case["weight_is"] == "no leaf" and isinstance(weight, Tensor):
        weight = weight * 1
    with recorded(outcome), AROUND[around]():
        loss = function(
            operands["input"],
            weight,
            -operands["target"] if absolute else operands["target"],
            linear_bias=operands["bias"],
            reduction=case["reduction"],
        )
        outcome.tensors["loss"] = copied(loss)
        outcome.facts["loss needs grad"] = loss.requires_grad
        wanted = [t for t in operands.values() if isinstance(t, Tensor) and t.requires_grad]
        if case["backward"] != "none" and loss.requires_grad and wanted:
            grad_output = grad_output_of(case, loss)
            if absolute:
                grad_output = grad_output.abs().nan_to_num(0.0)
            differentiate(case, loss, grad_output, wanted, operands)
    for name, t in operands.items():
        if isinstance(t, Tensor):
            outcome.tensors[name] = copied(t)
            outcome.tensors[f"{name}.grad"] = copied(t.grad)
    outcome.memory = {name: a.clone() for name, a in memory.arenas.items()}
    outcome.gaps = memory.gaps
    return outcome


def differentiate(
    case: Case,
    loss: Tensor,
    grad_output: Tensor,
    wanted: list[Tensor],
    operands: dict[str, Any],
) -> None:
    if case["backward"] == "second":
        grads = torch.autograd.grad(loss, wanted, grad_output, create_graph=True)
        total = sum((g * g).sum() for g in grads if g.requires_grad)
        if isinstance(total, Tensor):
            total.backward()
        return
    # No derivative has a use for the bias; but the plain loop's may have one for what it lies in.
    may_write = isinstance(operands["bias"], Tensor) and case["shared"] != ("bias", "weight")
    if case["backward"] == "after a write" and may_write:
        with torch.no_grad():
            operands["bias"].add_(1)
    loss.backward(grad_output, retain_graph=case["backward"] == "twice")
    if case["backward"] == "twice":
        loss.backward(grad_output)


def scales_of(case: Case, plan: Plan) -> dict[str, float]:
    """The magnitude of what is added up to make each result, see `oracle.scales`.

    The same formulas on absolute values, with a target of the other sign, have none that cancel.
    A result counts once for each product that it goes through: the loss for its square, a gradient
    for its sum and for the factor s·grad_output, a gradient of the gradients' squares for four.
    """
    absolute = Plan(plan.seed, plan.data, plan.places)
    for name, (start, covered) in plan.starts.items():
        start = start.to(torch.float64).abs() if start.is_floating_point() else start
        absolute.starts[name] = start.nan_to_num(0.0, 0.0, 0.0), covered
    terms = evaluate(case, absolute, composed, in_float64=True, absolute=True).tensors
    times = {"second": 4}.get(case["backward"], 2)
    sums = roundings(max(plan.places["target"].numel, case["I"]), case)
    return {
        name: (1 if name == "loss" else times) * sums * float(t.abs().max())
        for name, t in terms.items()
        if t is not None and t.numel() > 0 and (name == "loss" or name.endswith(".grad"))
    }


def run_cut(case: Case, plan: Plan) -> str:
    """With a tensor whose storage was freed: of some PyTorch reads what is not there and dies."""
    operands = operands_of(case, Memory(plan))
    cut = operands[case["cut"]]
    if not isinstance(cut, Tensor) or cut.numel() == 0:
        return "same bits"
    if device.DEVICE.type == "cuda" and case["around"].startswith("autocast"):
        return "same bits"  # PyTorch's, and it reads
    cut.untyped_storage().resize_(0)
    outcome = Outcome()
    with recorded(outcome), AROUND[case["around"]]():
        fused_step.linear_mse_loss(
            operands["input"],
            operands["weight"],
            operands["target"],
            linear_bias=operands["bias"],
            reduction=case["reduction"],
        )
    assert outcome.error is not None, "did not raise"
    return "error of a storage that is gone"


def run_loss(case: Case) -> str:
    if case["dtype"] == "float16" and case["backward"] == "second":
        case = Case({**case, "backward": "once"})  # a second derivative leaves its range
    plan = plan_of(case)
    if case["cut"] is not None:
        return run_cut(case, plan)
    torch.set_num_threads(case["threads"])
    try:
        ours = evaluate(case, plan, fused_step.linear_mse_loss)
        plain = evaluate(case, plan, composed)
    finally:
        torch.set_num_threads(1)
    # Target and bias do not broadcast, and types do not mix, as they may in the composition.
    is_strict = any(case[f"{name}_is"] != "fitting" for name in NAMES) or any(
        case[f"{name}_dtype"] != "same" for name in ("input", "bias", "target")
    )
    return assert_like_plain(
        ours,
        plain,
        start=lambda: start_of(case, plan),
        exact=lambda: evaluate(case, plan, composed, in_float64=True),
        scales=lambda: scales_of(case, plan),
        is_fused=True,
        # In the plain loop one of the gradients may be there when the next one raises.
        whole_steps=lambda: [start_of(case, plan)],
        may_refuse=ours.tensors.get("loss") is None and (plain.error is not None or is_strict),
    )


def start_of(case: Case, plan: Plan) -> Outcome:
    memory = Memory(plan)
    start = Outcome(memory=memory.arenas, gaps=memory.gaps)
    for name, t in operands_of(case, memory).items():
        if isinstance(t, Tensor):
            start.tensors[name], start.tensors[f"{name}.grad"] = copied(t), None
    return start


LOSS = Door("loss", CHOICES, run_loss)
