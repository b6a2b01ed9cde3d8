# SPDX-License-Identifier: MIT
"""What a call left behind, and which of two such outcomes are allowed to stand side by side."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import assert_within_rule, same_bits
from torch import Tensor

from fuzzing.cases import Case

# What the project's errors begin with.
OURS = ("fused_step", "TrainStep", "linear_mse")
ALLOWED_ERRORS = (ValueError, TypeError, RuntimeError, AttributeError, IndexError)


@dataclass
class Outcome:
    """Everything that can be told apart from outside."""

    error: Exception | None = None
    # Copies: what was returned, parameters, gradients, buffers; None where there is none.
    tensors: dict[str, Tensor | None] = field(default_factory=dict)
    # Copies of all memory that the case's tensors lie in; gaps() is what in it belongs to none.
    memory: dict[str, Tensor] = field(default_factory=dict)
    gaps: Callable[[], dict[str, Tensor]] = dict
    # Warnings, flags, states.
    facts: dict[str, Any] = field(default_factory=dict)
    plans: list[str | None] = field(default_factory=list)


@contextmanager
def recorded(outcome: Outcome) -> Iterator[None]:
    """Notes the exception and the warnings of what runs inside."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except ALLOWED_ERRORS as error:
            outcome.error = error.with_traceback(None)
    outcome.facts["warnings"] = [
        (w.category.__name__, str(w.message))
        for w in caught
        if "Traceback of forward call" not in str(w.message)  # anomaly detection's, of other lines
    ]


def copied(t: Tensor | None) -> Tensor | None:
    """A copy, dense; a sparse one made dense."""
    if t is None:
        return None
    t = t.detach()
    return t.to_dense() if t.layout is not torch.strided else t.clone()


def is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """Two copies, bit for bit but for the bits of a NaN."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if torch.equal(a, b):
        return True
    if a.dtype.is_complex:
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    return a.dtype.is_floating_point and same_bits(a, b)


def differences(ours: Outcome, other: Outcome) -> list[str]:
    """The names of tensors and memory that differ."""
    names = [f"{n}" for n in {**ours.tensors, **other.tensors} if not is_same(
        ours.tensors.get(n), other.tensors.get(n))]  # fmt: skip
    return names + [f"memory of {n}" for n, a in ours.memory.items() if not is_same(
        a, other.memory[n])]  # fmt: skip


def different_facts(ours: Outcome, other: Outcome) -> list[str]:
    """The facts that differ, in words."""
    return [
        f"{name}: {ours.facts.get(name)}, in the plain loop {value}"
        for name, value in other.facts.items()
        if ours.facts.get(name) != value
    ]


# Anomaly detection names the node that it found, which is another one where there are fewer.
_NODE = re.compile("Function '.*' returned nan values in its .*")


def is_same_error(a: Exception | None, b: Exception | None) -> bool:
    return type(a) is type(b) and _NODE.sub("", str(a)) == _NODE.sub("", str(b))


def roundings(terms: int, case: Case) -> float:
    """How often a sum of `terms` counts, when it is held to a scale that is its terms' magnitude.

    A sum in blocks, lanes and chunks, as every engine makes it, is off by about log2(terms)
    roundings when all of them go one way; in a million cases one does. Of equal terms they all do,
    and PyTorch's GEMM adds rows one after the other: its float64, the oracle, is off by up to
    terms/8 of them then (measured up to 100 000 rows, where the fused step is off by 4).
    """
    summed = 1 + math.log2(max(terms, 1))
    is_off = case.get("dtype") == "float64" and case.get("data") == "ones"
    return max(summed, terms / 8) if is_off else summed


def assert_refused(ours: Outcome, start: Outcome) -> None:
    """An error of the project's own: it says whose it is, and nothing has changed."""
    message = str(ours.error)
    assert isinstance(ours.error, ValueError | TypeError | RuntimeError), repr(ours.error)
    assert message.startswith(OURS) or "fused_step::" in message, f"whose error? {ours.error!r}"
    changed = differences(ours, start)
    assert not changed, f"{ours.error!r} has changed {changed}"


def assert_like_plain(
    ours: Outcome,
    plain: Outcome,
    *,
    start: Callable[[], Outcome],
    exact: Callable[[], Outcome],
    scales: Callable[[], dict[str, float]],
    is_fused: bool,
    may_refuse: bool = False,
    whole_steps: Callable[[], list[Outcome]] = list,
    eps: float = 0.0,
) -> str:
    """Holds an outcome to the plain loop's, and says what kind it was.

    Args:
        ours: of the door.
        plain: of what the door stands for.
        start: makes what there was before the call.
        exact: makes the plain outcome in float64.
        scales: makes the scale of each tensor, see `oracle.scales`; infinite: whatever it is.
        is_fused: whether other bits than the plain loop's are allowed, by the rule of tolerance.
        may_refuse: whether the door may raise where the plain loop does not, or otherwise than it.
        whole_steps: makes what there is before the first step and after each. Where the plain loop
            raises within a step, the door may have left that step undone.
        eps: of the parameters: what is wider, and made of them, is no more exact than they are.
    """
    if ours.error is not None and not is_same_error(ours.error, plain.error):
        assert may_refuse, f"raised {ours.error!r}, the plain loop {plain.error!r}"
        assert_refused(ours, start())
        return "error of our own"
    assert ours.error is not None or plain.error is None, (
        f"did not raise {plain.error!r}, plans {ours.plans}"
    )
    facts = different_facts(ours, plain)
    assert not facts, f"{facts}, plans {ours.plans}"
    different = differences(ours, plain)
    if plain.error is not None:
        for before in whole_steps():
            since = differences(ours, before)
            different = [name for name in different if name in since]
        if "head" in ours.plans:
            # Which gradients are there when backward() raises is a matter of autograd's order.
            different = [name for name in different if not name.endswith(".grad")]
    if not different:
        return "error of the plain loop" if plain.error is not None else "same bits"
    assert is_fused, f"{different} differ from the plain loop's, plans {ours.plans}"
    gaps = start().gaps()
    for name, gap in ours.gaps().items():
        assert is_same(gap, gaps[name]), f"wrote beside {name}, plans {ours.plans}"
    truth, scale = exact(), scales()
    for name in (name for name in plain.tensors if name in different):
        mine, value = ours.tensors[name], plain.tensors[name]
        assert (mine is None) == (value is None), f"{name} is {mine}, in the plain loop {value}"
        if value is not None:
            assert name in scale, f"{name} differs from the plain loop's, plans {ours.plans}"
            if math.isinf(scale[name]):
                continue
            exactly = truth.tensors[name]
            if mine.is_complex():
                mine, value, exactly = (torch.view_as_real(t) for t in (mine, value, exactly))
            wider = max(1.0, eps / torch.finfo(mine.dtype).eps)
            # At least its own size, to which it is rounded; nothing more where data are not finite.
            finite = exactly[exactly.isfinite()].double().abs()
            size = float(finite.max()) if finite.numel() else 0.0
            size = size if math.isnan(scale[name]) else max(size, scale[name])
            assert_within_rule(name, mine, value, exactly.double(), wider * size)
    return "by the rule"
