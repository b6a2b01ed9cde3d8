# SPDX-License-Identifier: MIT
"""Door "sgd": fused_step.SGD beside torch.optim.SGD's for-loop, over parameters of every kind."""

from __future__ import annotations

from typing import Any

import device
import torch
from torch import Tensor, nn

import fused_step
from fuzzing.cases import Case, Choice, Door, renamed, with_seed
from fuzzing.memory import DTYPE, DTYPES, LAYOUT, Memory, Plan
from fuzzing.outcomes import Outcome, assert_like_plain, copied, recorded, roundings
from fuzzing.training import AROUND

COUNT = 3
NARROW = (torch.bfloat16, torch.float16)
OPTIONS = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
LAYOUTS = Choice("layout", ("contiguous", "contiguous", "transposed"), LAYOUT.rare)

EACH = (
    Choice("shape", ((3, 2), (5,), (1,), (), (17,), (4, 8), (2, 3, 5)), (
        (0,), (2, 0), (70,), (1000,), (33_000,), (1, 1))),
    Choice("dtype", DTYPE.usual, ("complex64",)),
    LAYOUTS,
    renamed(LAYOUTS, "grad_layout"),
    renamed(LAYOUTS, "buffer_layout"),
    Choice("grad", ("random",), (
        "none", "zeros", "sparse", "nan", "inf", "needs grad", "the parameter", "the first's")),
    Choice("buffer", ("none", "given"), (
        "None", "float64", "float32", "needs grad", "parameter", "the gradient", "the parameter")),
)  # fmt: skip

CHOICES = with_seed(
    Choice("count", (1, 2, 3)),
    *(renamed(c, f"{c.name}_{k}") for k in range(COUNT) for c in EACH),
    Choice("groups", ("one",), ("each", "no momentum in the last")),
    Choice("lr", (0.1,), (0.0, 1, "tensor", "vector", "nan", -0.1)),
    Choice("momentum", (0.0, 0.9), (-0.5, 1, 1.5)),
    Choice("dampening", (0.0, 0.3), (1.0, -0.5)),
    Choice("weight_decay", (0.0, 0.05), (1e-8, -0.1, 2, "tensor")),
    Choice("nesterov", (False, True)),
    Choice("maximize", (False, True)),
    Choice("momentum_dtype", (None,), ("float32",)),
    Choice("max_grad_norm", (None,), (0.5, 0, 1e9, "inf")),
    Choice("scaler", (None,), ("scale", "overflow")),
    Choice("zero_grad", (False, True)),
    Choice("set_to_none", (True, False)),
    Choice("closure", (False,), (True,)),
    Choice("hook", (None,), ("before", "after", "subclass")),
    Choice("between", (None,), (
        "lr", "momentum off", "momentum on", "buffer gone", "grad gone", "group added", "data")),
    Choice("around", ("nothing",), ("no_grad", "inference_mode", "autocast", "function mode",
        "dispatch mode", "anomaly")),
    Choice("threads", (1,), (2, 3)),
    Choice("steps", (1, 2, 3)),
)  # fmt: skip


class OwnSGD(fused_step.SGD):
    pass


def max_norm_of(case: Case) -> float | None:
    return None if case["max_grad_norm"] is None else float(case["max_grad_norm"])


def plan_of(case: Case) -> Plan:
    plan = Plan(case["seed"])
    for k in range(case["count"]):
        shape, dtype = case[f"shape_{k}"], DTYPES[case[f"dtype_{k}"]]
        buffer = case[f"buffer_{k}"]
        plan.add(f"param {k}", shape, dtype, _layout(case, f"layout_{k}"))
        host = {"the parameter": f"param {k}", "the first's": "grad 0"}.get(case[f"grad_{k}"])
        plan.add(f"grad {k}", shape, dtype, case[f"grad_layout_{k}"], host)
        host = {"the parameter": f"param {k}", "the gradient": f"grad {k}"}.get(buffer)
        if case["momentum_dtype"] is not None:
            host = None  # torch has no such option, and so no word on what it would overwrite
        layout = _layout(case, f"buffer_layout_{k}")
        plan.add(f"buffer {k}", shape, DTYPES.get(buffer, dtype), layout, host)
        for name in (f"param {k}", f"grad {k}", f"buffer {k}"):
            place = plan.places[name]
            there = plan.places.get(place.host or "")
            if there is not None and there.shape != shape:
                place.host = None  # a gradient has the size of its parameter
    return plan


def _layout(case: Case, name: str) -> str:
    """The layout of what is written. Memory that is written twice has no one result where another
    of torch's kernels does it, as with a buffer of another type."""
    if case[name] == "sliding" and case["momentum_dtype"] is not None:
        return "contiguous"
    return case[name]


class World:
    """Parameters with gradients, and an optimizer over them."""

    def __init__(
        self,
        case: Case,
        plan: Plan,
        kind: type,
        *,
        in_float64: bool = False,
        absolute: bool = False,
    ) -> None:
        self.case, self.absolute = case, absolute
        self.memory = Memory(plan, in_float64)
        tensors = self.memory.tensors
        if absolute:
            for name, arena in self.memory.arenas.items():
                # p - lr·g has no terms that cancel.
                arena.copy_(arena.abs() if name.startswith("param") else -arena.abs())
        self.params = [nn.Parameter(tensors[f"param {k}"]) for k in range(case["count"])]
        for k, p in enumerate(self.params):
            # torch 2.13 counts the offset in a storage twice when it adds a sparse tensor, and
            # writes to other memory: such a parameter has memory of its own, and no momentum.
            if case[f"grad_{k}"] == "sparse":
                p.data = p.data.clone()
        self.is_ours = issubclass(kind, fused_step.SGD)
        groups: list[dict[str, Any]] = [{"params": self.params}]
        if case["groups"] != "one":
            groups = [{"params": [p]} for p in self.params]
        keywords: dict[str, Any] = {"foreach": False, "fused": False}
        if self.is_ours:
            dtype = case["momentum_dtype"]
            keywords = {
                "momentum_dtype": None if dtype is None else DTYPES[dtype],
                "max_grad_norm": max_norm_of(case),
            }
            kind = OwnSGD if case["hook"] == "subclass" else kind
        self.optimizer = kind(groups, lr=0.1, **keywords)
        for number, group in enumerate(self.optimizer.param_groups):
            group.update({name: self._option(name) for name in ("lr", *OPTIONS)})
            if number > 0 and case["groups"] == "no momentum in the last":
                group["momentum"] = 0.0
        self._give_buffers()
        self.calls = 0
        hook = {
            "before": self.optimizer.register_step_pre_hook,
            "after": self.optimizer.register_step_post_hook,
        }.get(case["hook"])
        if hook is not None:
            hook(self._count)

    def _count(self, *args: Any) -> None:
        self.calls += 1

    def _option(self, name: str) -> Any:
        value = self.case[name]
        if name == "lr":
            value = {
                "tensor": torch.tensor(0.1),
                "vector": torch.tensor([0.1]),
                "nan": float("nan"),
            }.get(value, value)
        elif name == "weight_decay" and value == "tensor":
            value = torch.tensor(0.05)
        if not self.absolute:
            return value
        if name in ("maximize", "nesterov"):
            return value and name == "nesterov"
        value = float(value)
        size = abs(value) if value == value else 0.0
        return {"dampening": 1 - abs(1 - value), "weight_decay": -size}.get(name, size)

    def _give_buffers(self) -> None:
        for k, p in enumerate(self.params):
            how = self.case[f"buffer_{k}"]
            if how == "none":
                continue
            t: Tensor | None = self.memory.tensors[f"buffer {k}"]
            if how == "None":
                t = None
            elif how == "needs grad":
                t = t.detach().requires_grad_()
            elif how == "parameter":
                t = nn.Parameter(t, requires_grad=False)
            self.optimizer.state[p]["momentum_buffer"] = t

    def set_grads(self) -> None:
        for k in range(self.case["count"]):
            p, how = self.params[k], self.case[f"grad_{k}"]
            t: Tensor | None = self.memory.tensors[f"grad {k}"]
            if how == "none":
                t = None
            elif how == "zeros":
                t = torch.zeros_like(t)
            elif how == "sparse":
                # torch 2.13 adds a sparse complex gradient beyond the end of its parameter.
                has_momentum = self.case["momentum"] != 0 or self.case["between"] == "momentum on"
                is_served = t.dim() > 0 and not t.is_complex() and not has_momentum
                t = t.to_sparse() if is_served else t
            elif how in ("nan", "inf") and t.numel() > 0 and not self.absolute:
                t = t.clone()
                t[(0,) * t.dim()] = float(how)
            elif how == "needs grad":
                t = t.detach().requires_grad_()
            p.grad = t

    def scale_grads(self) -> None:
        """What a GradScaler puts on the optimizer."""
        how = self.case["scaler"]
        if how is None or self.absolute:
            return
        self.optimizer.grad_scale = torch.tensor(4.0)
        self.optimizer.found_inf = torch.tensor(float(how == "overflow"))

    def change(self, number: int) -> None:
        """What a program may do between two steps."""
        how, optimizer = self.case["between"], self.optimizer
        group = optimizer.param_groups[0]
        if how == "lr":
            group["lr"] = 0.05
        elif how == "momentum off":
            group["momentum"] = 0.0
        elif how == "momentum on":
            group["momentum"] = 0.9
        elif how == "buffer gone":
            optimizer.state.pop(self.params[0], None)
        elif how == "grad gone":
            self.params[0].grad = None
        elif how == "group added" and number == 1:
            new = nn.Parameter(torch.ones(2, dtype=self.params[0].dtype))
            new.grad = torch.ones_like(new)
            optimizer.add_param_group({"params": [new], "lr": 0.1})
            self.params.append(new)
        elif how == "data":
            self.params[0].data = self.params[0].data.clone()

    def plain_step(self) -> None:
        """torch.optim.SGD with what fused_step.SGD does beyond it done by hand."""
        optimizer, case = self.optimizer, self.case
        scale, found_inf = (optimizer.__dict__.pop(n, None) for n in ("grad_scale", "found_inf"))
        if found_inf is not None and float(found_inf) != 0:
            self.calls += case["hook"] in ("before", "after")  # step() is called, and skips
            return
        if scale is not None:
            with torch.no_grad():
                for p in self.params:
                    if p.grad is not None:
                        p.grad.mul_(0.25)
        kept = [p.grad for p in self.params]
        if case["max_grad_norm"] is not None:
            for p in self.params:
                p.grad = None if p.grad is None else p.grad.clone()
            if not self.absolute:
                # On, it refuses norms of float16.
                with torch.autocast(device.DEVICE.type, enabled=False):
                    nn.utils.clip_grad_norm_(self.params, max_norm_of(case), foreach=False)
        try:
            optimizer.step()
        finally:
            for p, grad in zip(self.params, kept, strict=True):
                p.grad = grad

    def step(self) -> Any:
        case, optimizer = self.case, self.optimizer
        closure = (lambda: 7) if case["closure"] else None
        if self.is_ours:
            return optimizer.step(
                closure, zero_grad=case["zero_grad"], set_to_none=case["set_to_none"]
            )
        self.plain_step()
        if case["zero_grad"]:
            optimizer.zero_grad(case["set_to_none"])
        return 7 if closure is not None else None

    def take(self, outcome: Outcome) -> Outcome:
        for k, p in enumerate(self.params):
            outcome.tensors[f"param {k}"] = copied(p)
            outcome.tensors[f"grad {k}"] = copied(p.grad)
            buffer = self.optimizer.state.get(p, {}).get("momentum_buffer")
            outcome.tensors[f"buffer {k}"] = copied(buffer)
            outcome.facts[f"grad {k} needs grad"] = p.grad is not None and p.grad.requires_grad
        outcome.memory = {name: a.clone() for name, a in self.memory.arenas.items()}
        outcome.gaps = self.memory.gaps
        if outcome.error is None:
            outcome.facts["hook"] = self.calls
        # Empty entries come and go where nothing is updated.
        if outcome.error is None and self.case["scaler"] != "overflow":
            outcome.facts["state"] = sorted(
                (k, sorted(self.optimizer.state[p]))
                for k, p in enumerate(self.params)
                if p in self.optimizer.state
            )
        return outcome


def train(case: Case, plan: Plan, kind: type, **how: bool) -> Outcome:
    world = World(case, plan, kind, **how)
    outcome = Outcome()
    around = "nothing" if how else case["around"]
    with recorded(outcome), AROUND[around]():
        world.set_grads()
        for number in range(case["steps"]):
            if number > 0:
                world.change(number)
            world.scale_grads()
            outcome.facts[f"returned {number}"] = world.step()
            for name in ("grad_scale", "found_inf"):
                world.optimizer.__dict__.pop(name, None)
            if case["zero_grad"] and case["set_to_none"]:
                world.set_grads() if number + 1 < case["steps"] else None
    return world.take(outcome)


def scales_of(case: Case, plan: Plan) -> dict[str, float]:
    """The magnitude of what is added up to make each tensor: the training of absolute values."""
    # PyTorch may refuse a buffer that is the gradient, unless maximize has made another of it.
    buffers = {
        f"buffer_{k}": "given" for k in range(COUNT) if case[f"buffer_{k}"] == "the gradient"
    }
    if buffers:
        case = Case({**case, **buffers})
        plan = plan_of(case)
    terms = train(case, plan, torch.optim.SGD, in_float64=True, absolute=True).tensors
    has_norm = case["max_grad_norm"] is not None
    sums = roundings(sum(p.numel for p in plan.places.values()) if has_norm else 1, case)
    found = {
        name: sums * float(t.abs().nan_to_num(0.0).max())
        for name, t in terms.items()
        if t is not None and t.numel() > 0
    }
    for k in range(case["count"]):
        dtype = DTYPES[case[f"dtype_{k}"]]
        if dtype in NARROW and f"buffer {k}" in found:
            # In another type, too, it is made of what is rounded to 16 bit at each step.
            finest = torch.finfo(
                torch.float64 if case[f"buffer_{k}"] == "float64" else torch.float32
            )
            found[f"buffer {k}"] *= torch.finfo(dtype).eps / finest.eps
    return found


def start_of(case: Case, plan: Plan) -> Outcome:
    world = World(case, plan, torch.optim.SGD)
    world.set_grads()
    return world.take(Outcome())


def run_sgd(case: Case) -> str:
    if case["max_grad_norm"] is not None:
        # A norm is as exact as the least exact of its gradients.
        same = case["dtype_0"] if case["dtype_0"] != "complex64" else "float32"
        case = Case({**case, **{f"dtype_{k}": same for k in range(COUNT)}})
        if same == "float16" and case["max_grad_norm"] == 0:
            case["max_grad_norm"] = 0.5  # torch's 1e-6 beside a norm of 0 is none there: 0 / 0
    plan = plan_of(case)
    shorter = [Case({**case, "steps": steps}) for steps in range(1, case["steps"])]
    torch.set_num_threads(case["threads"])
    try:
        ours = train(case, plan, fused_step.SGD)
        plain = train(case, plan, torch.optim.SGD)
    finally:
        torch.set_num_threads(1)
    if plain.error is not None and shorter:
        run_sgd(shorter[-1])
    if case["momentum_dtype"] is not None:
        for k, p in enumerate(plan.places[f"param {k}"] for k in range(case["count"])):
            mine, theirs = (o.tensors.get(f"buffer {k}") for o in (ours, plain))
            is_made = case[f"buffer_{k}"] in ("none", "None") or (
                k == 0 and case["between"] == "buffer gone" and case["steps"] > 1
            )
            if p.dtype in NARROW and is_made and theirs is not None:
                assert mine is None or mine.dtype == torch.float32, "not momentum_dtype"
                plain.tensors[f"buffer {k}"] = theirs.float()
    if device.DEVICE.type == "cuda" and case["scaler"] == "overflow":
        # The host does not know there that the step is skipped: a first one leaves zeros.
        for name, t in ours.tensors.items():
            if name.startswith("buffer") and plain.tensors.get(name) is None and t is not None:
                plain.tensors[name] = torch.zeros_like(t)
    has_narrow = any(case[f"dtype_{k}"] in ("bfloat16", "float16") for k in range(case["count"]))
    return assert_like_plain(
        ours,
        plain,
        start=lambda: start_of(case, plan),
        exact=lambda: train(case, plan, torch.optim.SGD, in_float64=True),
        scales=lambda: scales_of(case, plan),
        # 16-bit parameters are rounded once; a norm is another sum.
        is_fused=has_narrow or case["max_grad_norm"] is not None,
        # Of fewer steps, which are held to the plain loop above.
        whole_steps=lambda: [
            start_of(case, plan),
            *(train(c, plan, fused_step.SGD) for c in shorter),
        ],
    )


SGD = Door("sgd", CHOICES, run_sgd)
