# SPDX-License-Identifier: MIT
"""docs/performance.md from the committed results: nothing in it is written by hand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from harness import BENCHMARKS, curves, pictures, readme, report, side_by_side, tables
from harness.results import MOST_BUSY_CPUS

_TITLES = {
    "cpu": "A training step of a linear layer, on the CPU",
    "cpu-cold": "The same with cold caches",
    "loss": "Loss and gradients: linear_mse_loss, on the CPU",
    "head": "A step of a network that ends in a linear layer, on the CPU",
    "optim": "The optimizer: fused_step.SGD, on the CPU",
    "sweep": "How a step grows, on the CPU",
    "gpu": "On a GPU",
}
_INTRODUCTION = """\
# Performance

Made from the committed result files by `python benchmarks/report.py benchmarks/results --publish`.
How it is measured: [benchmarks/README.md](../benchmarks/README.md); why it comes out so:
[how-it-is-fast.md](how-it-is-fast.md). Times are medians (p20 to p80), ratios medians of the ratios
of interleaved rounds. A target that was missed says **no**.
"""
_NO_GPU = """
## On a GPU

No result of a GPU has been committed: nothing is claimed.
"""


def publish(results: Sequence[dict], folder: Path) -> list[Path]:
    """Writes the page and its pictures, and the README's section; of complete results alone."""
    for result in results:
        if result["quick"] or not result["complete"]:
            raise SystemExit(f"not published: the result of {result['kind']} is not a complete one")
        if (result["busy_cpus"] or 0.0) > MOST_BUSY_CPUS:
            busy = tables.busy_words(result)
            raise SystemExit(f"not published: the result of {result['kind']}: {busy}")
    root = BENCHMARKS.parent
    page, images, front = root / "docs/performance.md", root / "docs/images", root / "README.md"
    images.mkdir(parents=True, exist_ok=True)
    written = [page, front]
    for result in results:
        written += report.write_pictures(result, images, result["kind"])
    if runs := side_by_side.comparable(results):
        written += report.write_side_by_side(runs, images / f"{side_by_side.NAME}.png")
    page.write_text(text(results, os.path.relpath(folder, page.parent), images.name))
    by_kind = {result["kind"]: result for result in results}
    front.write_text(readme.put_into(front.read_text(), by_kind))
    return written


def text(results: Sequence[dict], folder_of_results: str, folder_of_images: str) -> str:
    """The whole page. Both folders are as seen from the page."""
    by_kind = {result["kind"]: result for result in results}
    parts = [_INTRODUCTION]
    for kind, title in _TITLES.items():
        if kind in by_kind:
            parts.append(_section(by_kind[kind], title, folder_of_results, folder_of_images))
    if "gpu" not in by_kind:
        parts.append(_NO_GPU)
    if runs := side_by_side.comparable(results):
        image = f"![Speed-ups by device]({folder_of_images}/{side_by_side.NAME}.png)"
        parts.append("\n".join(["", "#" + side_by_side.lines(runs)[0], "", image, ""]))
    return "".join(parts)


def _section(result: dict, title: str, folder_of_results: str, folder_of_images: str) -> str:
    kind = result["kind"]
    lines = ["", f"## {title}", "", *tables.header_lines(result)[2:], ""]
    for name, what in _pictures(result).items():
        lines += [f"![{title}: {what}]({folder_of_images}/{name}.png)", ""]
    if targets := tables.target_lines(result["cases"]):
        lines += [*targets[5:], ""]
    elif not curves.has_curves(result):
        subject = tables.labels_of(result["cases"][0])[result["subject"]]
        lines += [f"How many times as long as {subject} the others take:", ""]
        lines += [*tables.ratio_lines(result), ""]
    lines += [
        f"Every row, with its spread and its floors: [{kind}.md]({folder_of_results}/{kind}.md).",
    ]
    return "\n".join(lines) + "\n"


def _pictures(result: dict) -> dict[str, str]:
    """Name and subject of those that report.write_pictures makes of it."""
    kind = result["kind"]
    if curves.has_curves(result):
        return {kind: "time against size, and the roofline"}
    made = {
        kind: "times, and the roofline where its floors were measured",
        f"{kind}-speedup": "times as long as fused_step takes",
    }
    if pictures.has_memory(result):
        made[f"{kind}-memory"] = "memory"
    return made
