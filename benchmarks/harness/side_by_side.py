# SPDX-License-Identifier: MIT
"""Runs of a training step on several devices beside each other: a table, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness import report, tables

NAME = "side-by-side"
_KINDS = ("cpu", "gpu")  # of a training step; other kinds measure something else


def comparable(results: Sequence[dict]) -> list[dict]:
    """The runs of a step, if they are of at least two devices; the CPUs first."""
    runs = [result for result in results if result["kind"] in _KINDS and result["cases"]]
    runs.sort(key=lambda result: _KINDS.index(result["kind"]))
    return runs if len({tables.device_name(run) for run in runs}) > 1 else []


def lines(runs: Sequence[dict]) -> list[str]:
    """A row for each case of each run: the step's time, its roofline, and the eager step's."""
    rows = []
    for run in runs:
        for case in run["cases"]:
            times = {c["key"]: c for c in case["contestants"]}
            step, eager = times.get(run["subject"]), times.get("eager")
            if step is None or not step["microseconds"]:
                continue
            slower = eager["ratio"] if eager else None
            rows.append(
                [
                    tables.device_name(run),
                    case["title"],
                    tables.spread(step["microseconds"]),
                    tables.spread(slower, "×"),
                    tables.memory_words(step["memory"]),
                    tables.roofline_words(run, case),
                ]
            )
    header = ["device", "B×I→O", "step(), µs", "eager / step()", "memory", "roofline"]
    return ["# Devices side by side", "", *tables.table_lines(header, rows)]


def write(results: Sequence[dict], folder: Path) -> list[Path]:
    """Writes both into `folder`; nothing if there is one device alone."""
    runs = comparable(results)
    if not runs:
        return []
    table = folder / f"{NAME}.md"
    table.write_text("\n".join(lines(runs)) + "\n")
    return [table, *report.write_side_by_side(runs, folder / f"{NAME}.png")]
