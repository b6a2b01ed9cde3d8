# SPDX-License-Identifier: MIT
"""Curves of a sweep: time of a step against the rows, inputs, outputs, and the steps of a run."""

from __future__ import annotations

import re
from typing import Any

from harness import roofline, tables
from harness.pictures import OURS, PARTS, ROOFLINE

_EXTENTS = {"rows": "batch", "inputs": "inputs", "outputs": "outputs"}
_PARTS = {
    "call": "a call",
    "bytes": "bytes over bandwidth",
    "flops": "FLOPs over rate of GEMMs",
}


def has_curves(result: dict) -> bool:
    """Whether this is the result of a sweep."""
    return any(case["note"] in _EXTENTS for case in result["cases"])


def figure(result: dict) -> Any:
    """One panel for each extent that is swept, with the roofline and its three parts drawn in, and
    one for the number of steps in a call of run()."""
    from matplotlib import pyplot

    made, panels = pyplot.subplots(2, 2, figsize=(14.0, 9.6), layout="constrained")
    for panel, note in zip(panels.flat, _EXTENTS, strict=False):
        cases = [case for case in result["cases"] if case["note"] == note]
        if cases:
            _extent_panel(panel, result, cases, note)
    _steps_panel(panels.flat[-1], [c for c in result["cases"] if c["note"] == "rows"])
    where = f"{tables.device_name(result)}, {result['threads']} threads"
    made.suptitle(f"Time per training step, {where}", size=12)
    return made


def _medians(case: dict) -> dict[str, float]:
    return {c["key"]: c["microseconds"]["median"] for c in case["contestants"] if c["microseconds"]}


def _extent_panel(panel: Any, result: dict, cases: list[dict], note: str) -> None:
    extent = _EXTENTS[note]
    labels = {c["key"]: c["label"] for case in cases for c in case["contestants"]}
    longest_run = max((k for k in labels if k.startswith("run_")), key=_steps_of, default="")
    styles = {
        "eager": {"color": "#444444", "marker": "o"},
        "hand": {"color": "#7a8ba0", "marker": "s"},
        "step": {"color": OURS, "marker": "o", "linewidth": 2.0},
        longest_run: {"color": "#e08a5b", "marker": "^"},
    }
    for key, style in styles.items():
        points = [(c[extent], _medians(c)[key]) for c in cases if key in _medians(c)]
        if points:
            panel.plot(*zip(*sorted(points), strict=True), label=labels[key], markersize=4, **style)
    _draw_roofline(panel, [(c[extent], roofline.of(result, c)) for c in cases])
    fixed = {
        "rows": "{inputs} inputs, {outputs} output",
        "inputs": "{batch} rows, {outputs} output",
        "outputs": "{batch} rows, {inputs} inputs",
    }
    _finish(panel, f"{note}, at {fixed[note].format(**cases[0])}", note)


def _draw_roofline(panel: Any, points: list[tuple[int, roofline.Roofline]]) -> None:
    points = sorted(points, key=lambda point: point[0])
    for part, label in _PARTS.items():
        line = [(n, time) for n, roof in points if (time := getattr(roof, part)) is not None]
        if line:
            style = {"linestyle": "--", "linewidth": 1.0, "color": PARTS[part]}
            panel.plot(*zip(*line, strict=True), label=label, **style)
    line = [(n, roof.parts()[0].time) for n, roof in points if roof.parts()]
    if line:
        style = {"linestyle": "-", "linewidth": 1.8, "color": ROOFLINE}
        panel.plot(*zip(*line, strict=True), label="roofline", **style)


def _steps_panel(panel: Any, cases: list[dict]) -> None:
    for case in cases:
        points = [(_steps_of(k), t) for k, t in _medians(case).items() if k.startswith("run_")]
        if len(points) > 1:
            panel.plot(
                *zip(*sorted(points), strict=True),
                marker="o",
                markersize=4,
                label=f"{case['batch']} rows",
            )
    _finish(panel, "steps in one call of run(), 64 inputs, 1 output", "steps a call")


def _steps_of(key: str) -> int:
    match = re.fullmatch(r"run_(\d+)", key)
    return int(match[1]) if match else 0


def _finish(panel: Any, title: str, axis: str) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_title(title, size=11)
    panel.set_xlabel(axis, size=9)
    panel.set_ylabel("µs a step", size=9)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.lines:
        panel.legend(fontsize=7, frameon=False)
