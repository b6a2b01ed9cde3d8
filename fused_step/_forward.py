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
import warnings
from collections.abc import Iterator
from types import CodeType, FunctionType

_NO_PLAIN_CALL = (
    inspect.CO_VARARGS
    | inspect.CO_VARKEYWORDS
    | inspect.CO_GENERATOR
    | inspect.CO_COROUTINE
    | inspect.CO_ASYNC_GENERATOR
)
_FUTURES = [getattr(__future__, name).compiler_flag for name in __future__.all_feature_names]
_NO_SOURCE = "has no source at hand that compiles to it"

Step = ast.Return | ast.Assign | ast.AnnAssign


def read_forward(function: FunctionType) -> tuple[tuple[str, ...], CodeType | None] | str:
    """What `function`, the forward() of a class, does last; or why that cannot be told.

    Returns:
        The names by which it comes from self to the module that it calls last, whose result it
        returns; and its code without that call, which returns the module and the argument instead.
        None in place of the code where that argument is forward()'s own and nothing else is done.
    """
    code = function.__code__
    if code.co_argcount != 2 or code.co_kwonlyargcount or code.co_flags & _NO_PLAIN_CALL:
        return "takes something else than one input"
    linecache.checkcache(code.co_filename)
    source = "".join(linecache.getlines(code.co_filename, function.__globals__))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the source were given when it was imported
            return _read(code, ast.parse(source))
    except (SyntaxError, ValueError, RecursionError):
        return _NO_SOURCE


def _read(code: CodeType, tree: ast.Module) -> tuple[tuple[str, ...], CodeType | None] | str:
    definition = _definition(code, tree)
    if definition is None:
        return _NO_SOURCE
    step = _last_step(definition, code)
    call = None if step is None else step.value
    path = _path(call.func, code) if isinstance(call, ast.Call) else ()
    if step is None or not isinstance(call, ast.Call) or not path:
        return "does not end in `return self.layer(...)`, its only return"
    if _codes_like(code, tree) != [code]:
        return _NO_SOURCE
    before = definition.body[: definition.body.index(step)]
    if all(map(_is_docstring, before)) and _is_argument(call.args[0], 1, code):
        return path, None
    step.value = ast.copy_location(ast.Tuple([call.func, call.args[0]], ast.Load()), call)
    (without_call,) = _codes_like(code, tree)
    return path, without_call


def _definition(code: CodeType, tree: ast.Module) -> ast.FunctionDef | None:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            lines = [node.lineno, *(d.lineno for d in node.decorator_list)]
            if min(lines) == code.co_firstlineno:
                return node
    return None


def _codes_like(code: CodeType, tree: ast.Module) -> list[CodeType]:
    """What `tree` compiles to where `code` was defined."""
    flags = sum(flag for flag in _FUTURES if code.co_flags & flag)
    flags |= ast.PyCF_ALLOW_TOP_LEVEL_AWAIT  # as in a notebook

    def within(outer: CodeType) -> Iterator[CodeType]:
        yield outer
        for constant in outer.co_consts:
            if isinstance(constant, CodeType):
                yield from within(constant)

    module = compile(tree, code.co_filename, "exec", flags, dont_inherit=True)
    place = code.co_name, code.co_firstlineno
    return [c for c in within(module) if (c.co_name, c.co_firstlineno) == place]


def _last_step(definition: ast.FunctionDef, code: CodeType) -> Step | None:
    """The statement whose value, a call of one argument, is what the function returns."""
    end = definition.body[-1]
    if not isinstance(end, ast.Return) or list(_returns(definition)) != [end]:
        return None
    step: ast.stmt = end
    if isinstance(end.value, ast.Name) and len(definition.body) > 1:  # result = ...; return result
        step = definition.body[-2]
        if not _assigns_only(step, end.value.id) or not _is_local(end.value.id, code):
            return None
    if not isinstance(step, Step):
        return None
    match step.value:
        case ast.Call(args=[argument], keywords=[]) if not isinstance(argument, ast.Starred):
            return step
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


def _path(function: ast.expr, code: CodeType) -> tuple[str, ...]:
    """The names in ``self.name.name``; none of anything else."""
    names: list[str] = []
    while isinstance(function, ast.Attribute):
        names.insert(0, function.attr)
        function = function.value
    return tuple(names) if _is_argument(function, 0, code) else ()


def _is_argument(node: ast.expr, position: int, code: CodeType) -> bool:
    return isinstance(node, ast.Name) and node.id == code.co_varnames[position]


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
