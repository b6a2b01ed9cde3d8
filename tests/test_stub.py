# SPDX-License-Identifier: MIT
"""Holds the stub _C.pyi, which mypy reads, to the compiled module: names and parameters."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType

from fused_step._extension import _C

STUB = Path(__file__).resolve().parents[1] / "fused_step" / "_C.pyi"
CUDA_ONLY = {"cuda_archs", "use_cuda_plan"}


def parameters_in_stub(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    return [a.arg for a in arguments.posonlyargs + arguments.args if a.arg != "self"]


def read_stub(body: list[ast.stmt], prefix: str = "") -> dict[str, list[str] | None]:
    """The public names, with the names of their parameters; None where there are none to have."""
    found: dict[str, list[str] | None] = {}
    for node in body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)):
                found[prefix + name] = None
            case ast.FunctionDef(name=name, decorator_list=[]):
                found[prefix + name] = parameters_in_stub(node)
            case ast.FunctionDef(name=name):
                found[prefix + name] = None  # a property
            case ast.ClassDef(name=name):
                found[prefix + name] = None
                found |= read_stub(node.body, f"{name}.")
    return found


def parameters_in_doc(function: object) -> list[str] | None:
    """The names in the signature that opens a built-in function's docstring."""
    signature = re.match(r"\w+\((.*?)\)(?: ->|$)", function.__doc__ or "", re.MULTILINE)
    if signature is None:
        return None
    names = [re.match(r"\s*(\w+)", part) for part in signature[1].split(",")]
    return [name[1] for name in names if name is not None and name[1] != "self"]


def read_module(owner: ModuleType | type, prefix: str = "") -> dict[str, list[str] | None]:
    found: dict[str, list[str] | None] = {}
    for name, value in vars(owner).items():
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(value, type):
            found[prefix + name] = None
            found |= read_module(value, f"{name}.")
        else:
            found[prefix + name] = parameters_in_doc(value) if callable(value) else None
    return found


def test_stub_has_the_names_and_parameters_of_the_module():
    stub = read_stub(ast.parse(STUB.read_text()).body)
    if not hasattr(_C, "cuda_archs"):
        for name in CUDA_ONLY:
            del stub[name]
    assert stub == read_module(_C)


def test_a_name_or_a_parameter_that_only_one_of_them_has_is_a_difference():
    stub = read_stub(ast.parse("def f(a: int, b: int = 0) -> int: ...\n").body)
    assert stub == {"f": ["a", "b"]}

    def f() -> None:
        """f(a: typing.SupportsInt, b: int = 0) -> int"""

    module = ModuleType("m")
    module.f = f
    assert read_module(module) == stub
    module.g = 1
    assert read_module(module) != stub
    f.__doc__ = "f(a: int, c: int = 0) -> int"
    assert read_module(module)["f"] != stub["f"]
