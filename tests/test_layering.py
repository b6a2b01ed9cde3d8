# SPDX-License-Identifier: MIT
"""Holds every file of csrc/ to the include table in csrc/README.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh", ".inc"})

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(<[^>]*>|"[^"]*"|\S+)', re.MULTILINE)
# What the table's words for families of headers stand for.
FAMILIES = {
    "C++ standard library": re.compile(r"[a-z_]+"),
    "CUDA toolkit": re.compile(r"(?:cuda|cublas|cooperative_groups|mma|cub/).*"),
    "anything": re.compile(r".*"),
}


@dataclass(frozen=True)
class Layer:
    """A row of the table."""

    folders: frozenset[str]  # whose files it may include
    headers: frozenset[str]  # other headers it may include, by name
    families: tuple[str, ...]  # and by family

    def allows(self, include: str) -> bool:
        """Whether a file of this layer may include `include`, given with its quotes."""
        name = include[1:-1]
        if include.startswith('"'):
            return name.split("/")[0] in self.folders and (CSRC / name).is_file()
        return name in self.headers or any(FAMILIES[f].fullmatch(name) for f in self.families)


def read_table() -> dict[str, Layer]:
    """The table of csrc/README.md, by folder."""
    layers = {}
    for line in (CSRC / "README.md").read_text().splitlines():
        if not re.match(r"\| `\w+/` \|", line):
            continue
        folder, own, others, _ = (cell.strip() for cell in line.strip("|").split("|"))
        layers[folder.strip("`/")] = Layer(
            folders=frozenset(re.findall(r"`(\w+)/`", own)),
            headers=frozenset(re.findall(r"`<([^>]+)>`", others)),
            families=tuple(family for family in FAMILIES if family in others),
        )
    return layers


LAYERS = read_table()


def violations(folder: str, text: str) -> list[str]:
    """The includes in `text` that a file of `folder` may not have."""
    return [found for found in INCLUDE.findall(text) if not LAYERS[folder].allows(found)]


def test_table_names_the_layers():
    assert set(LAYERS) == {"core", "cpu", "cuda", "bindings", "units"}


def test_every_source_is_in_a_layer():
    assert SOURCES
    strangers = [p for p in SOURCES if p.relative_to(CSRC).parts[0] not in LAYERS]
    assert strangers == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_source_includes_only_what_its_layer_may(path):
    assert violations(path.relative_to(CSRC).parts[0], path.read_text()) == []


def test_only_bindings_and_units_may_include_bindings():
    includers = [name for name, layer in LAYERS.items() if "bindings" in layer.folders]
    assert includers == ["bindings", "units"]


def test_units_include_nothing_else():
    assert violations("units", '#include <vector>\n#include "cpu/kernels.h"') == [
        "<vector>",
        '"cpu/kernels.h"',
    ]


def test_each_source_of_bindings_is_in_one_unit_and_included_nowhere_else():
    included = [
        include.strip('"')
        for path in SOURCES
        for include in INCLUDE.findall(path.read_text())
        if include.endswith('.cpp"')
    ]
    bindings = [f"bindings/{p.name}" for p in SOURCES if p.match("bindings/*.cpp")]
    assert sorted(included) == bindings
    assert all('.cpp"' not in p.read_text() for p in SOURCES if p.parent.name != "units")


@pytest.mark.parametrize(
    ("folder", "include"),
    [
        ("core", "<vector>"),
        ("core", "<cuda_runtime.h>"),
        ("core", "<torch/extension.h>"),
        ("core", '"bindings/module.cpp"'),
        ("cpu", "<ATen/ATen.h>"),
        ("cpu", "<c10/util/BFloat16.h>"),
        ("cpu", "<omp.h>"),
        ("cpu", "<cuda_runtime.h>"),
        ("cpu", '"bindings/module.cpp"'),
        ("cuda", "<torch/types.h>"),
        ("cuda", "<vector>"),
        ("bindings", '"core/no_such_file.h"'),
        ("bindings", '"module.cpp"'),  # exists, but not by its path from csrc/
        ("cpu", "SOME_MACRO"),  # hides what it includes
    ],
)
def test_foreign_include_is_found(folder, include):
    assert violations(folder, f"#include <cstdint>\n  #  include {include}\n") == [include]


@pytest.mark.parametrize(
    ("folder", "include"),
    [
        ("core", "<cstdint>"),
        ("cpu", "<algorithm>"),
        ("cpu", "<cstddef>"),
        ("cpu", "<immintrin.h>"),
        ("cuda", "<cuda_runtime.h>"),
        ("cuda", "<cuda_bf16.h>"),
        ("cuda", "<cublasLt.h>"),
        ("bindings", "<torch/library.h>"),
        ("bindings", '"bindings/module.cpp"'),
    ],
)
def test_own_include_is_allowed(folder, include):
    assert violations(folder, f"#include {include}\n") == []
