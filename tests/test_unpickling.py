# SPDX-License-Identifier: MIT
"""Nothing here runs code that a file brings: torch.load is called with weights_only=True alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("fused_step", "tests", "benchmarks", "examples", "scripts", "docs")
# Loaders of torch that unpickle, by the last two parts of their names.
LOADERS = ("torch.load", "serialization.load", "hub.load_state_dict_from_url")


def sources() -> list[Path]:
    found = [ROOT / "setup.py"]
    for folder in FOLDERS:
        found += sorted((ROOT / folder).rglob("*.py"))
    return found


def snippets() -> Iterator[tuple[str, str]]:
    """Python of every source and of every page, each with where it stands."""
    for path in sources():
        yield str(path.relative_to(ROOT)), path.read_text()
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.S)):
            yield f"{path.relative_to(ROOT)}, snippet {number}", code


def dangerous_calls(code: str) -> list[int]:
    """The lines of calls that unpickle whatever a file says."""
    tree = ast.parse(code)
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported.update({a.asname: a.name for a in node.names if a.asname})
        elif isinstance(node, ast.ImportFrom):
            imported.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, *rest = ast.unparse(node.func).split(".")
        name = ".".join([imported.get(first, first), *rest])
        is_safe = any(
            k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True
            for k in node.keywords
        )
        is_loader = name.startswith("torch.") and name.endswith(LOADERS)
        if is_loader and not is_safe:
            lines.append(node.lineno)
    return lines


def test_no_file_is_loaded_but_its_weights():
    names, found = [], []
    for name, code in snippets():
        names.append(name)
        found += [f"{name}:{line}" for line in dangerous_calls(code)]
    assert not found
    assert len(names) > 50
    assert "README.md, snippet 0" in names


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("import torch\ntorch.load(f)", [2]),
        ("import torch\ntorch.load(f, weights_only=False)", [2]),
        ("import torch\ntorch.load(f, weights_only=flag)", [2]),
        ("import torch\ntorch.load(f, weights_only=True)", []),
        ("import torch as t\nt.load(f)", [2]),
        ("from torch import load as read\nread(f)", [2]),
        ("import torch\ntorch.serialization.load(f)", [2]),
        ("import json\njson.load(f)", []),
    ],
)
def test_what_counts_as_loading_more(code, lines):
    assert dangerous_calls(code) == lines
