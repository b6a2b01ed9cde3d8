# SPDX-License-Identifier: MIT
"""Tensors in memory of every layout, that share it or not, with NaN around and between them.

A `Plan` says where each tensor lies; `Memory` makes it, any number of times with the same values,
in the dtypes of the plan or all in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fuzzing.cases import Case, Choice

# Elements before and after a tensor: 64 bytes of float32, so that `contiguous` is aligned, too.
GUARD = 16

Shape = tuple[int, ...]


def _contiguous(shape: Shape, unit: int = 1) -> list[int]:
    strides, stride = [], unit
    for size in reversed(shape):
        strides.append(stride)
        stride *= max(size, 1)
    return strides[::-1]


def _rows_apart(shape: Shape) -> list[int]:
    if len(shape) < 2:
        return _contiguous(shape)
    return [*_contiguous((*shape[:-1], shape[-1] + 3))[:-1], 1]


def _first_dimension(shape: Shape, stride: int) -> list[int]:
    return [stride, *_contiguous(shape)[1:]] if shape else []


LAYOUTS: dict[str, Callable[[Shape], list[int]]] = {
    "contiguous": _contiguous,
    "offset": _contiguous,
    "rows apart": _rows_apart,
    "every second": lambda shape: _contiguous(shape, 2),
    "transposed": lambda shape: _contiguous(shape[::-1])[::-1],
    "expanded": lambda shape: _first_dimension(shape, 0),
    "one element": lambda shape: [0] * len(shape),
    "sliding": lambda shape: _first_dimension(shape, 1),
    "astray": lambda shape: [
        7919 if size == 1 else stride
        for size, stride in zip(shape, _contiguous(shape), strict=True)
    ],
}
LAYOUT = Choice("layout", ("contiguous",), tuple(LAYOUTS)[1:])

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.complex64
)}  # fmt: skip
DTYPE = Choice("dtype", ("float32", "float64", "bfloat16", "float16"))
OTHER_DTYPE = Choice("other_dtype", ("same",), tuple(DTYPES))


@dataclass
class Place:
    """Where one tensor lies: in memory of its own, or in that of `host`, `shift` elements on."""

    shape: Shape
    dtype: torch.dtype
    layout: str = "contiguous"
    host: str | None = None
    shift: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def strides(self) -> list[int]:
        return LAYOUTS[self.layout](self.shape)

    @property
    def offset(self) -> int:
        return GUARD + (3 if self.layout == "offset" else 0) + self.shift

    @property
    def end(self) -> int:
        if 0 in self.shape:
            return self.offset
        return self.offset + 1 + sum(
            (size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)
        )  # fmt: skip


@dataclass
class Plan:
    """The tensors of a case by name, and the memory they start with."""

    seed: int
    data: str = "random"
    places: dict[str, Place] = field(default_factory=dict)
    # By host, once made: the elements, in the host's dtype, and which of them belong to tensors.
    starts: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(
        self,
        name: str,
        shape: Shape,
        dtype: torch.dtype,
        layout: str = "contiguous",
        host: str | None = None,
        shift: int = 0,
    ) -> None:
        # Memory is of one dtype, and a host lies in memory of its own.
        there = self.places.get(host) if host is not None else None
        if there is None or there.dtype != dtype or there.host is not None:
            host, shift = None, 0
        self.places[name] = Place(shape, dtype, layout, host, shift)

    def fill(self) -> None:
        """Makes what every Memory starts with, NaN where no tensor is."""
        generator = torch.Generator().manual_seed(self.seed)
        for name, place in self.places.items():
            if place.host is not None:
                continue
            members = [p for k, p in self.places.items() if k == name or p.host == name]
            size = max(p.end for p in members) + GUARD
            covered = torch.zeros(size, dtype=torch.bool)
            for p in members:
                positions = torch.arange(size).as_strided(p.shape, p.strides, p.offset)
                covered[positions.reshape(-1)] = True
            start = torch.full(
                (size,), math.nan if place.dtype.is_floating_point else 7, dtype=place.dtype
            )
            values = _values(self.data, int(covered.sum()), generator, name, place.dtype)
            start[covered] = values.to(place.dtype)
            self.starts[name] = start, covered


DATA = Choice("data", ("random",), ("zeros", "ones", "nan", "inf", "large"))

# What every case of a linear layer chooses.
LINEAR = (
    Choice("B", (3, 1, 2, 4, 5, 8, 17, 33), (0, 64, 130, 700, 3000)),
    Choice("I", (2, 1, 3, 4, 5, 8, 13, 16, 17), (0, 33, 64, 70, 136, 257)),
    Choice("O", (1, 2, 3, 4, 5, 8, 9), (0, 16, 17, 32, 33, 40, 131)),
    DTYPE,
    Choice("bias", (True, False)),
    Choice("leading", ("rows",), ("none", "two", "three")),
    DATA,
    Choice("shift", (0, 1, 3, 16)),
    Choice("threads", (1,), (2, 3)),
)


def plan_of_shapes(case: Case, shapes: dict[str, Shape]) -> Plan:
    """The tensors of those names, each in the layout and dtype that the case has for it."""
    plan = Plan(case["seed"], case["data"])
    guest, host = case["shared"] or (None, None)
    for name, shape in shapes.items():
        own = case.get(f"{name}_dtype", "same")
        dtype = DTYPES[case["dtype"] if own == "same" else own]
        layout = case[f"{name}_layout"]
        plan.add(name, shape, dtype, layout, host if name == guest else None, case["shift"])
    return plan


class Memory:
    """The tensors of a plan, in memory of their own.

    Args:
        plan: what they are.
        in_float64: floating-point ones are float64.
        off_by: relative, at most; each element by another share of it, up or down.
        seed: of those shares.
    """

    def __init__(
        self, plan: Plan, in_float64: bool = False, off_by: float = 0.0, seed: int = 0
    ) -> None:
        if not plan.starts:
            plan.fill()
        self._plan = plan
        self.arenas: dict[str, Tensor] = {}
        for name, (start, _) in plan.starts.items():
            is_wide = in_float64 and start.dtype.is_floating_point
            self.arenas[name] = start.to(torch.float64 if is_wide else start.dtype, copy=True)
            if off_by != 0.0 and start.dtype.is_floating_point:
                generator = torch.Generator().manual_seed(seed)
                shares = torch.rand(start.shape, generator=generator, dtype=torch.float64) * 2 - 1
                self.arenas[name] *= 1 + off_by * shares
        self.tensors: dict[str, Tensor] = {
            name: self.arenas[p.host or name].as_strided(p.shape, p.strides, p.offset)
            for name, p in plan.places.items()
        }

    def gaps(self) -> dict[str, Tensor]:
        """What lies around and between the tensors, and belongs to none."""
        return {name: a[~self._plan.starts[name][1]] for name, a in self.arenas.items()}


def _values(data: str, n: int, generator: torch.Generator, name: str, dtype: torch.dtype) -> Tensor:
    values = torch.randn(n, generator=generator, dtype=torch.float64)
    if data in ("zeros", "ones"):
        values = torch.full_like(values, float(data == "ones"))
    elif data == "large" and dtype != torch.float16:  # whose range a second step would leave
        values *= 100
    elif data in ("nan", "inf") and name == "input" and n > 0:
        values[n // 2] = float(data)
    return values
