# SPDX-License-Identifier: MIT
"""Reads what a module's own forward() does last: whether that is to call another module.

Of ``return self.last(self.body(input))`` a code object can be made that does all but the last call.
It comes from the source, and only where that source compiles to the very bytecode that runs.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import linecache
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from operator import index, itemgetter, methodcaller
from types import CodeType, FunctionType, ModuleType
from typing import Any
from warnings import catch_warnings

Step = ast.Return | ast.Assign | ast.AnnAssign
Flatten = tuple[str, Callable[[Any], Any]]
Path = tuple[str | int, ...]
Forward = tuple[Path, CodeType | None, Flatten | None]

# What may be done to the result [*, 1] of the last call; see csrc/bindings/flattening.h.
_FLATTENINGS: dict[str, Flatten] = {
    ".squeeze(-1)": ("last", methodcaller("squeeze", -1)),
    ".squeeze(dim=-1)": ("last", methodcaller("squeeze", dim=-1)),
    "[..., 0]": ("last", itemgetter((..., 0))),
    ".squeeze(1)": ("of two", methodcaller("squeeze", 1)),
    ".squeeze(dim=1)": ("of two", methodcaller("squeeze", dim=1)),
    ".flatten()": ("of two", methodcaller("flatten")),
    ".flatten(0)": ("of two", methodcaller("flatten", 0)),
    ".view(-1)": ("of two", methodcaller("view", -1)),
    ".reshape(-1)": ("of two", methodcaller("reshape", -1)),
    "[:, 0]": ("of two", itemgetter((slice(None), 0))),
    ".squeeze()": ("all ones", methodcaller("squeeze")),
}
_NO_PLAIN_CALL = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
# The compiler warns of escapes in strings, asserted tuples and identity with literals; that was
# done when the module was imported.
_MAY_WARN = re.compile(r"""\\|\bassert\s*\(|\bis(\s+not)?\s+[-\d'"(\[{]""")
_WARNINGS = threading.RLock()  # over the process' filters
_NO_SOURCE = "has no source at hand that compiles to it"
_FUTURES = [getattr(__future__, name).compiler_flag for name in __future__.all_feature_names]


def read_forward(function: FunctionType) -> Forward | str | None:
    """What `function`, the forward() of a class, does last; or why that cannot be told.

    Returns:
        The names, and numbers in brackets, by which it comes from self to the module that it calls
        last, whose result it returns. Its code without that call, which returns the module and the
        argument instead; None where that argument is forward()'s own and nothing else is done. How
        it flattens the result, and a callable that does so; None where it does not.
        None alone: it could not be read just now, for want of memory or stack.
    """
    code = function.__code__
    if code.co_argcount < 2 or code.co_flags & _NO_PLAIN_CALL:
        return "takes no input, or is no plain function"
    try:
        linecache.checkcache(code.co_filename)
        lines = linecache.getlines(code.co_filename, function.__globals__)
        block = inspect.getblock(lines[code.co_firstlineno - 1 :])
        # Not for every source: it also makes the process forget which warnings were given once.
        may_warn = _MAY_WARN.search("".join(block)) is not None
        with _WARNINGS, catch_warnings(action="ignore") if may_warn else nullcontext():
            return _read(code, block, function.__globals__)
    except (RecursionError, MemoryError):
        return None
    except Exception:  # other source is there, or none; a loader that is asked for it may raise any
        return _NO_SOURCE


def _read(code: CodeType, block: list[str], module: dict[str, Any]) -> Forward | str:
    definition = _definition(code, _parse(code, block, ""))
    if _last_call(definition, code) is None:
        return "does not end in `return self.layer(...)`, its only return"
    for imports in _imports(definition, module):
        tree = _parse(code, block, imports)
        last = _last_call(_definition(code, tree), code)
        if last is not None and _codes_like(code, tree) == [code]:
            return last.path, _code_without(last, code, tree), last.flatten
    return _NO_SOURCE


def _code_without(last: _LastCall, code: CodeType, tree: ast.Module) -> CodeType | None:
    """What `tree`, in which the call is, has beside it; None where that is nothing."""
    (argument,) = last.call.args
    calls_only = all(map(_is_docstring, last.before)) and _is_argument(argument, 1, code)
    takes_one = code.co_argcount == 2 and not code.co_kwonlyargcount
    if calls_only and takes_one and all(isinstance(step, str) for step in last.path):
        return None
    if last.flattened is not None:
        step, value = last.flattened
        step.value = value
    pair = ast.Tuple([last.call.func, argument], ast.Load())
    last.step.value = ast.copy_location(pair, last.call)
    (without_call,) = _codes_like(code, tree)
    return without_call


def _parse(code: CodeType, block: list[str], imports: str) -> ast.Module:
    """The function's own lines, within what gives its names their meaning."""
    around = [f"import {imports}\n"] if imports else []
    names = code.co_qualname.split(".")[:-1]
    functions = [k for k, name in enumerate(names[1:]) if name == "<locals>"]
    cells = ", ".join(name for name in code.co_freevars if name != "__class__")
    for k, name in enumerate(names):
        indent = " " * k
        if k in functions:
            around.append(f"{indent}def {name}({cells if k == functions[-1] else ''}):\n")
        elif name != "<locals>":
            around.append(f"{indent}class {name}:\n")
    tree = ast.parse("".join([*around, *block]))
    ast.increment_lineno(tree, code.co_firstlineno - 1 - len(around))
    return tree


def _imports(definition: ast.FunctionDef, module: dict[str, Any]) -> Iterator[str]:
    """What the module may have imported: methods of such names compile in a way of their own.

    They are, most likely, those that are modules.
    """
    called = {
        node.func.value.id
        for node in ast.walk(definition)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
    }
    yield ", ".join(sorted(n for n in called if isinstance(module.get(n), ModuleType)))
    yield ", ".join(sorted(n for n in called if n in module))
    yield ""


def _definition(code: CodeType, tree: ast.Module) -> ast.FunctionDef:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            return node
    raise LookupError(f"no function {code.co_name}")


def _codes_like(code: CodeType, tree: ast.Module) -> list[CodeType]:
    """What `tree` compiles to where `code` was defined."""
    flags = sum(flag for flag in _FUTURES if code.co_flags & flag)

    def within(outer: CodeType) -> Iterator[CodeType]:
        yield outer
        for constant in outer.co_consts:
            if isinstance(constant, CodeType):
                yield from within(constant)

    module = compile(tree, code.co_filename, "exec", flags, dont_inherit=True)
    place = code.co_qualname, code.co_firstlineno
    return [c for c in within(module) if (c.co_qualname, c.co_firstlineno) == place]


@dataclass(frozen=True)
class _LastCall:
    """A call of one argument; the function returns nothing but its result, flattened or not."""

    before: list[ast.stmt]  # what comes before `step`
    step: Step  # whose value the call is, or is made of
    call: ast.Call
    path: Path
    flatten: Flatten | None
    flattened: tuple[Step, ast.expr] | None  # the statement that does that, and what it flattens


def _last_call(definition: ast.FunctionDef, code: CodeType) -> _LastCall | None:
    """Followed back from the end, through names of the function's own."""
    end = definition.body[-1]
    if not isinstance(end, ast.Return) or list(_returns(definition)) != [end]:
        return None
    flatten: Flatten | None = None
    flattened: tuple[Step, ast.expr] | None = None
    result: str | None = None  # the name that has it after `step`
    for step in reversed(definition.body):
        if not isinstance(step, Step) or (result is not None and not _assigns_only(step, result)):
            return None
        value = step.value
        match value:
            case ast.Call(func=ast.Attribute(value=receiver)) | ast.Subscript(value=receiver):
                how = ast.unparse(value).removeprefix(ast.unparse(receiver))
                if flatten is None and how in _FLATTENINGS:
                    flatten, flattened, value = _FLATTENINGS[how], (step, receiver), receiver
        match value:
            case ast.Name(id=name) if _is_local(name, code):
                result = name
            case ast.Call(args=[argument], keywords=[]) if not isinstance(argument, ast.Starred):
                path = _path(value.func, code)
                before = definition.body[: definition.body.index(step)]
                return _LastCall(before, step, value, path, flatten, flattened) if path else None
            case _:
                return None
    return None


def _returns(node: ast.AST) -> Iterator[ast.Return]:
    """Those of the function itself, not of others within."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Return):
            yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _returns(child)


def _assigns_only(step: ast.stmt, name: str) -> bool:
    match step:
        case ast.Assign(targets=[ast.Name(id=target)]) | ast.AnnAssign(target=ast.Name(id=target)):
            return target == name
    return False


def _is_local(name: str, code: CodeType) -> bool:
    """Whether nothing but the function sees it, not even a function within."""
    return name in code.co_varnames and name not in code.co_cellvars


def _path(function: ast.expr, code: CodeType) -> Path:
    """What is in ``self.name.name[-1]``; nothing of anything else, or where names are mangled."""
    path: list[str | int] = []
    while True:
        match function:
            case ast.Attribute(value=owner, attr=name) if name in code.co_names:
                path.insert(0, name)
            case ast.Subscript(value=owner):
                try:
                    path.insert(0, index(ast.literal_eval(function.slice)))
                except (TypeError, ValueError):
                    return ()
            case _:
                return tuple(path) if _is_argument(function, 0, code) else ()
        function = owner


def _is_argument(node: ast.expr, position: int, code: CodeType) -> bool:
    return isinstance(node, ast.Name) and node.id == code.co_varnames[position]


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
