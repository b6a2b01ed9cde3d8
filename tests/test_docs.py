# SPDX-License-Identifier: MIT
"""The figures of the documentation are those of the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


def test_counted_operators_and_bytes_are_those_of_the_page():
    counted = subprocess.run(
        [sys.executable, "benchmarks/traffic.py", "4096x1024x1"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    page = (ROOT / "docs/how-it-is-fast.md").read_text()
    table = [line for line in page.splitlines() if re.match(r"\| (`|\*\*the)", line)]
    in_page = [re.findall(r"\| \**([\d ]+?)\** (?=\|)", line) for line in table]
    in_page = [[int(n.replace(" ", "")) for n in numbers] for numbers in in_page]
    lines = counted.splitlines()[1:]
    by_script = [[int(n.replace(",", "")) for n in line.split()[-2:]] for line in lines]
    plan = by_script.pop(-2)  # one operator, which is the fused step's sum
    assert plan == by_script[-1]
    assert in_page == by_script


def test_page_of_results_is_what_the_committed_results_give():
    sys.path.insert(0, str(BENCHMARKS))
    from harness import page, results

    loaded = [results.load(path) for path in sorted((BENCHMARKS / "results").glob("*.json"))]
    text = page.text(loaded, "../benchmarks/results", "images")
    assert (ROOT / "docs/performance.md").read_text() == text
    for image in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (ROOT / "docs" / image).is_file(), image
