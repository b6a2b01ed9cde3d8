# SPDX-License-Identifier: MIT
"""Bars from the JSON of runs: times under their roofline, speed-ups, memory. Returns figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from harness import roofline, tables

OURS, OTHERS = "#c1440e", "#7a8ba0"
ROOFLINE = "#111111"
PARTS = {"call": "#2a9d8f", "bytes": "#d19000", "flops": "#8457a8"}


def times(result: dict) -> Any:
    """Time per step of every contestant, one panel a case, under its roofline."""
    cases = [case for case in result["cases"] if _bars(case)]
    if not cases:
        return None
    figure, panels = _panels(len(cases), "Time per training step", [result])
    for panel, case in zip(panels, cases, strict=True):
        _times_panel(panel, result, case)
    return figure


def speedups(results: Sequence[dict]) -> Any:
    """How many times as long as the subject's step each contestant's takes: a column of panels for
    each result, a panel for each case."""
    columns = [[c for c in result["cases"] if _compared(result, c)] for result in results]
    rows = max(map(len, columns))
    if not rows:
        return None
    if len(results) == 1:
        figure, panels = _panels(rows, "Time of a step over that of fused_step's", results)
        places = [(panel, results[0], case) for panel, case in zip(panels, columns[0], strict=True)]
    else:
        figure, grid = _grid(rows, len(results), "Time of a step over that of fused_step's")
        places = []
        for column, (result, cases) in enumerate(zip(results, columns, strict=True)):
            for row in range(rows):
                if row < len(cases):
                    places.append((grid[row][column], result, cases[row]))
                else:
                    grid[row][column].set_visible(False)
    for panel, result, case in places:
        where = f", {tables.device_name(result)}" if len(results) > 1 else ""
        _speedup_panel(panel, result, case, case["title"] + where)
    return figure


def has_memory(result: dict) -> bool:
    return bool(_cases_with_memory(result))


def memory(result: dict) -> Any:
    """Peak memory of a step beyond data and parameters, one panel a case."""
    cases = _cases_with_memory(result)
    if not cases:
        return None
    figure, panels = _panels(len(cases), "Memory of a step beyond data and parameters", [result])
    for panel, case in zip(panels, cases, strict=True):
        bars = [c for c in _bars(case) if _bytes_used(c) is not None]
        sizes = [_bytes_used(c) / 2**20 for c in bars]
        _draw(panel, bars, sizes, [tables.size(size * 2**20) for size in sizes], result["subject"])
        panel.set_xlim(0, 1.25 * max([*sizes, 0.1]))
        _finish(panel, case["title"], "MiB")
    return figure


def _panels(count: int, title: str, results: Sequence[dict]) -> tuple[Any, list[Any]]:
    """`count` panels in two columns."""
    columns = min(2, count)
    rows = math.ceil(count / columns)
    threads = f"{results[0]['threads']} threads"
    title = f"{title}, {tables.device_name(results[0])}, {threads}"
    if results[0]["protocol"]["cold"]:
        title += ", cold caches"
    figure, grid = _grid(rows, columns, title)
    panels = [panel for row in grid for panel in row]
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure, panels[:count]


def _grid(rows: int, columns: int, title: str) -> tuple[Any, list[list[Any]]]:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        rows, columns, figsize=(7.0 * columns, 3.4 * rows), squeeze=False, layout="constrained"
    )
    figure.suptitle(title, size=12)
    return figure, [list(row) for row in panels]


def _bars(case: dict) -> list[dict]:
    """Who is drawn, from below: everybody who was timed, once."""
    again = case["aa"]["again"] if case["aa"] else None
    timed = [c for c in case["contestants"] if c["microseconds"]]
    return [c for c in timed if c["role"] == "contestant" and c["key"] != again][::-1]


def _compared(result: dict, case: dict) -> list[dict]:
    return [c for c in _bars(case) if c["ratio"]]


def _cases_with_memory(result: dict) -> list[dict]:
    return [case for case in result["cases"] if any(map(_bytes_used, case["contestants"]))]


def _bytes_used(contestant: dict) -> int | None:
    used = contestant["memory"] or {}
    resident = used.get("resident_bytes")
    return used.get("aten_bytes") if resident is None else resident


def _draw(
    panel: Any, bars: list[dict], values: list[float], words: list[str], subject: str
) -> None:
    labels = [c["label"] for c in bars]
    colors = [OURS if c["key"] in (subject, "run") else OTHERS for c in bars]
    panel.barh(labels, values, color=colors, height=0.65)
    for place, (value, text) in enumerate(zip(values, words, strict=True)):
        _beside(panel, value, place, text)


def _beside(panel: Any, value: float, place: int, text: str) -> None:
    offset = {"xytext": (4, 0), "textcoords": "offset points"}
    panel.annotate(text, (value, place), va="center", size=8, **offset)


def _whiskers(panel: Any, spreads: list[dict]) -> None:
    for place, spread in enumerate(spreads):
        panel.plot((spread["p20"], spread["p80"]), (place, place), color="#222222", linewidth=1.0)


def _finish(panel: Any, title: str, unit: str) -> None:
    panel.set_title(title, size=11)
    panel.set_xlabel(unit, size=8)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _times_panel(panel: Any, result: dict, case: dict) -> None:
    """The axis begins at 0, unless the bars span so much that it must be logarithmic."""
    bars = _bars(case)
    spreads = [c["microseconds"] for c in bars]
    medians = [spread["median"] for spread in spreads]
    highs = [spread["p80"] for spread in spreads]
    # What is less than 2 % of the shortest bar would only hide the axis.
    roof = roofline.of(result, case).parts()
    parts = [part for part in roof if part.time > 0.02 * min(medians)]
    if max(medians) > 20 * min(medians):
        panel.set_xscale("log")
        panel.set_xlim(min([*medians, *(part.time for part in parts)]) / 2, max(highs) * 5)
        unit = "µs a step (log)"
    else:
        panel.set_xlim(0, 1.2 * max([*highs, *(part.time for part in parts)]))
        unit = "µs a step"
    _draw(panel, bars, medians, [""] * len(bars), result["subject"])
    _whiskers(panel, spreads)
    for place, (median, high) in enumerate(zip(medians, highs, strict=True)):
        _beside(panel, high, place, tables.number(median))
    for rank, part in enumerate(parts):
        label = f"{part.words}, {tables.number(part.time)}"
        if rank == 0:  # the largest of the three is the roofline
            style = {"color": ROOFLINE, "linewidth": 1.8, "label": f"roofline: {label}"}
        else:
            style = {"color": PARTS[part.key], "linestyle": "--", "label": label}
        panel.axvline(part.time, **style)
    if parts:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": len(parts)}
        panel.legend(fontsize=7, frameon=False, **place)
    _finish(panel, case["title"], unit)


def _speedup_panel(panel: Any, result: dict, case: dict, title: str) -> None:
    bars = _compared(result, case)
    spreads = [c["ratio"] for c in bars]
    medians = [spread["median"] for spread in spreads]
    words = [_equal_or(c) for c in bars]
    _draw(panel, bars, medians, [""] * len(bars), result["subject"])
    _whiskers(panel, spreads)
    for place, (spread, text) in enumerate(zip(spreads, words, strict=True)):
        _beside(panel, max(spread["p80"], spread["median"]), place, text)
    if max(medians) > 20 * min(medians):
        panel.set_xscale("log")
        panel.set_xlim(min(medians) / 2, max(s["p80"] for s in spreads) * 5)
    else:
        panel.set_xlim(0, 1.25 * max(s["p80"] for s in spreads))
    noise = case["aa"]["noise"] if case["aa"] else 0.0
    panel.axvspan(1.0 / (1.0 + noise), 1.0 + noise, color=OURS, alpha=0.15, linewidth=0)
    panel.axvline(1.0, color=OURS, linewidth=1.2)
    label = tables.labels_of(case)[result["subject"]]
    _finish(panel, title, f"times {label}'s time; shaded: the A/A noise")


def _equal_or(contestant: dict) -> str:
    words = f"{tables.number(contestant['ratio']['median'])}×"
    return f"equal ({words})" if contestant["verdict"] == "equal" else words
