# SPDX-License-Identifier: MIT
"""The figures of the documentation are those of the code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import bench_cpu
import bench_head
import bench_loss
import bench_optim
import bench_sweep
import pytest
from harness import page, readme, results, tables
from test_readme import run_snippets

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


def test_figures_of_the_page_are_those_of_the_committed_results_and_counts():
    """Times within 10 %, which rounding takes; instructions within `make bench-check`'s 5 %."""
    text = " ".join((ROOT / "docs/how-it-is-fast.md").read_text().split())

    def figure(pattern: str) -> float:
        (found,) = re.findall(pattern, text)
        return float(found.replace(" ", ""))

    counts = json.loads((BENCHMARKS / "baseline.json").read_text())["counts"]
    step = figure(r"about (\d[\d ]*\d) instructions in all")
    assert step == pytest.approx(counts["step() 3x2x1"], rel=0.05)
    step_of_run = figure(r"a step is about (\d+) instructions")
    assert step_of_run == pytest.approx(counts["run() 3x2x1"], rel=0.05)

    cases = {c["name"]: c for c in results.load(BENCHMARKS / "results/cpu.json")["cases"]}
    timed = {
        name: {c["key"]: (c["microseconds"] or {}).get("median") for c in case["contestants"]}
        for name, case in cases.items()
    }
    small = timed["3x2x1"]
    call = figure(r"that alone takes about ([\d.]+) µs")
    assert call == pytest.approx(small["floor_call"], rel=0.2)
    five_lines = figure(r"the five lines take ([\d.]+) ms")
    assert five_lines * 1e3 == pytest.approx(small["eager"], rel=0.1)
    assert "less than a tenth of that" in text
    assert small["hand"] * 10 < small["eager"]

    milliseconds = figure(r"for that read they take ([\d.]+) ms")
    assert milliseconds * 1e3 == pytest.approx(timed["65536x1024x1"]["floor_read"], rel=0.1)
    gb_per_s = figure(r"the (\d+) GB/s that our results have")
    assert gb_per_s * milliseconds == pytest.approx(65536 * 1024 * 4 / 1e6, rel=0.05)


@pytest.mark.parametrize("page", [p.name for p in sorted((ROOT / "docs").glob("*.md"))])
def test_snippets_of_a_page_run_in_order(page):
    run_snippets(ROOT / "docs" / page)


def test_tests_that_a_page_names_are_there():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "csrc/README.md"]
    named = {name for page in pages for name in re.findall(r"`(test_\w+)`", page.read_text())}
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    assert named
    assert named <= set(re.findall(r"def (test_\w+)", tests))


def test_budgets_of_the_benchmarks_are_those_of_their_page():
    benchmarks = [
        m.BENCHMARK for m in (bench_cpu, bench_loss, bench_head, bench_optim, bench_sweep)
    ]
    budgets = [b.full.budget_seconds for b in benchmarks]
    budgets.append(bench_cpu.BENCHMARK.cold.budget_seconds)
    text = (BENCHMARKS / "README.md").read_text()
    assert f"each benchmark has a budget of seconds, {sum(budgets):.0f} in all\n" in text


def committed_results() -> list[dict]:
    return [results.load(path) for path in sorted((BENCHMARKS / "results").glob("*.json"))]


def test_figures_of_the_readme_are_those_of_the_committed_results():
    by_kind = {result["kind"]: result for result in committed_results()}
    text = (ROOT / "README.md").read_text()
    assert text == readme.put_into(text, by_kind)
    in_prose = re.sub(rf"{readme.BEGIN}.*?{readme.END}", "", text, flags=re.DOTALL)
    assert re.findall(r"\d+(?:\.\d+)?×(?!\d)", in_prose) == []


def test_tables_beside_the_committed_results_are_made_of_them():
    for result in committed_results():
        table = (BENCHMARKS / "results" / f"{result['kind']}.md").read_text()
        assert table == tables.markdown(result), result["kind"]


def test_page_of_results_is_what_the_committed_results_give():
    text = page.text(committed_results(), "../benchmarks/results", "images")
    assert (ROOT / "docs/performance.md").read_text() == text
    for image in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (ROOT / "docs" / image).is_file(), image
