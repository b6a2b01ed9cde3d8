# SPDX-License-Identifier: MIT
"""docs/performance.md from the committed results: nothing in it is written by hand."""

from __future__ import annotations

from harness import report

_TITLES = {
    "cpu": "A training step of a linear layer, on the CPU",
    "loss": "Loss and gradients: linear_mse_loss, on the CPU",
    "optim": "The optimizer: fused_step.SGD, on the CPU",
    "sweep": "How a step grows, on the CPU",
    "gpu": "On a GPU",
}
_INTRODUCTION = """\
# Performance

Made from the committed result files by `python benchmarks/report.py benchmarks/results --page
docs/performance.md`. How it is measured: [benchmarks/README.md](../benchmarks/README.md); why it
comes out so: [how-it-is-fast.md](how-it-is-fast.md). Times are medians (p20 to p80), ratios medians
of the ratios of interleaved rounds. A target that was missed says **no**.
"""
_NO_GPU = """
## On a GPU

No result of a GPU has been committed: nothing is claimed.
"""


def text(results: list[dict], folder_of_results: str, folder_of_images: str) -> str:
    """The whole page. Both folders are as seen from the page."""
    by_kind = {result["kind"]: result for result in results}
    parts = [_INTRODUCTION]
    for kind, title in _TITLES.items():
        if kind in by_kind:
            parts.append(_section(by_kind[kind], title, folder_of_results, folder_of_images))
    if "gpu" not in by_kind:
        parts.append(_NO_GPU)
    return "".join(parts)


def _section(result: dict, title: str, folder_of_results: str, folder_of_images: str) -> str:
    kind = result["kind"]
    lines = ["", f"## {title}", "", *report.header_lines(result)[2:], ""]
    lines += [f"![{title}]({folder_of_images}/{kind}.png)", ""]
    lines += report.target_lines(result)[5:]
    lines += [
        "",
        f"Every row, with its spread and its floors: [{kind}.md]({folder_of_results}/{kind}.md).",
    ]
    return "\n".join(lines) + "\n"
