# SPDX-License-Identifier: MIT
"""Holds pre-commit's hooks to `make lint` and its pinned tools."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = (ROOT / ".pre-commit-config.yaml").read_text()
TOOLS = set(re.findall(r"entry: \.venv/bin/([\w-]+)", CONFIG))


def test_hooks_are_the_tools_that_make_lint_runs():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    assert set(re.findall(r"\$\(BIN\)/([\w-]+)", recipe[1])) == TOOLS


def test_every_tool_of_a_hook_is_pinned_in_the_lint_requirements():
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "requirements/lint.txt").read_text(), re.MULTILINE)
    assert set(pinned) >= TOOLS


def test_no_hook_comes_from_elsewhere_with_a_version_of_its_own():
    assert re.findall(r"repo: (\S+)", CONFIG) == ["local"]
    entries = re.findall(r"entry: (\S+)", CONFIG)
    assert {e for e in entries if not e.startswith(".venv/bin/")} == {"git"}
