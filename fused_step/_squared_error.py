# SPDX-License-Identifier: MIT
"""Tells whether a function of the user's own is a mean or sum of squared errors, and nothing else.

The ways to write one are few. They are written down here and compiled by the Python that runs: a
function is one of them if its bytecode is. That needs no source, so a lambda may be one as well.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F

# A path of names, from a global one on through modules, and the function that is at its end.
Place = tuple[tuple[str, ...], Callable[..., Any]]
Shape = tuple[object, ...]

_GLOBAL = "_global_"  # stands for a global name, whichever the user has
_SQUARES: list[tuple[str, Callable[..., Any] | None]] = [
    ("{0} ** 2", None),
    ("{0} * {0}", None),
    ("{0}.pow(2)", None),
    ("{0}.square()", None),
    (f"{_GLOBAL}.pow({{0}}, 2)", torch.pow),
    (f"{_GLOBAL}.square({{0}})", torch.square),
]
_REDUCTIONS = {"mean": torch.mean, "sum": torch.sum}
_NAMES = {"pow", "square", "mean", "sum", "nn", "functional", "mse_loss"}
_MOST_CODE = 300  # bytes: far more than any of the ways, and no work for most other losses
_PATHS_TO_MSE_LOSS = [
    (),
    ("mse_loss",),
    ("functional", "mse_loss"),
    ("nn", "functional", "mse_loss"),
]
# How a function is called, and whether that runs it.
_KIND_OF_CALL = (
    inspect.CO_VARARGS
    | inspect.CO_VARKEYWORDS
    | inspect.CO_GENERATOR
    | inspect.CO_COROUTINE
    | inspect.CO_ASYNC_GENERATOR
)


def read_squared_error(
    function: FunctionType, is_method: bool
) -> tuple[str, tuple[Place, ...]] | None:
    """What `function` is if it is the squared error of an output and a target, otherwise None.

    Args:
        function: a function, or the forward() of a class.
        is_method: whether it is the latter, with self before its arguments.

    Returns:
        "mean" or "sum"; and what it calls by global names: it is that only while they lead there.
    """
    code = function.__code__
    if len(code.co_code) > _MOST_CODE or len({*code.co_names} - _NAMES) > 1:
        return None
    constants = code.co_consts
    if constants and isinstance(constants[0], str):
        constants = (None, *constants[1:])  # where a docstring stands
    try:
        ways = _known(is_method).get(_shape(code, constants), [])
    except (TypeError, RecursionError, MemoryError):  # a constant has no hash; no stack or memory
        return None
    for way, names in ways:
        renamed = dict(zip(names, code.co_names, strict=True))
        if all(new == old for old, new in renamed.items() if old != _GLOBAL):
            return way.reduction, tuple(
                ((renamed[_GLOBAL], *path), called) for path, called in way.calls
            )
    return None


@dataclass(frozen=True)
class _Way:
    """A way to write the squared error of a and b."""

    lines: tuple[str, ...]
    reduction: str
    calls: tuple[Place, ...]  # by the names after the global one


def _ways() -> Iterator[_Way]:
    for reduction, of_torch in _REDUCTIONS.items():
        reduced = ((f"{{0}}.{reduction}()", None), (f"{_GLOBAL}.{reduction}({{0}})", of_torch))
        for difference, square, mean in itertools.product(("a - b", "b - a"), _SQUARES, reduced):
            calls = tuple(((f.__name__,), f) for _, f in (square, mean) if f is not None)
            for lines in _lines(difference, square[0], mean[0]):
                yield _Way(lines, reduction, calls)
        keywords = [f", reduction={reduction!r}", *([""] if reduction == "mean" else [])]
        for path, arguments, keyword in itertools.product(
            _PATHS_TO_MSE_LOSS, ("a, b", "b, a"), keywords
        ):
            call = f"{'.'.join([_GLOBAL, *path])}({arguments}{keyword})"
            for lines in _lines(call):
                yield _Way(lines, reduction, ((path, F.mse_loss),))


def _lines(value: str, *steps: str) -> Iterator[tuple[str, ...]]:
    """Of a value, and of steps from each value to the next: any of them may be named first."""
    for are_named in itertools.product((False, True), repeat=len(steps) + 1):
        lines, now = [], value
        for k, (is_named, step) in enumerate(zip(are_named, (*steps, "return {0}"), strict=True)):
            if is_named:
                lines.append(f"value_{k} = {now}")
            now = step.format(f"value_{k}" if is_named else f"({now})")
        yield (*lines, now)


@functools.cache
def _known(is_method: bool) -> dict[Shape, list[tuple[_Way, tuple[str, ...]]]]:
    """The ways, each with the names that it looks up, by their shapes."""
    known: dict[Shape, list[tuple[_Way, tuple[str, ...]]]] = {}
    ways = list(_ways())
    arguments = "self, a, b" if is_method else "a, b"
    # On lines of their own, as users write them: Python 3.13 joins instructions within a line.
    definitions = ["\n ".join([f"def way({arguments}):", *way.lines]) for way in ways]
    # Methods of what the module itself imports compile in a way of their own.
    for imports in ("", f"import {_GLOBAL}"):
        module = compile("\n".join([imports, *definitions]), __file__, "exec", dont_inherit=True)
        codes = [constant for constant in module.co_consts if isinstance(constant, CodeType)]
        for way, code in zip(ways, codes, strict=True):
            known.setdefault(_shape(code, code.co_consts), []).append((way, code.co_names))
    return known


def _shape(code: CodeType, constants: tuple[object, ...]) -> Shape:
    """All that `code` does, but for the names that it looks up."""
    return (
        code.co_code,
        tuple((type(constant), constant) for constant in constants),
        len(code.co_names),
        code.co_argcount,
        code.co_kwonlyargcount,
        code.co_flags & _KIND_OF_CALL,
        code.co_freevars,
        code.co_cellvars,
        code.co_exceptiontable,
    )
