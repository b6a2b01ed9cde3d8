# SPDX-License-Identifier: MIT
"""All that is made of the JSON of a run: its tables and its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness import curves, pictures, tables


def write(result: dict, json_path: Path, out: Path | None = None) -> list[Path]:
    """Writes NAME.md and the pictures beside the JSON, or into `out`."""
    folder = json_path.parent if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / f"{json_path.stem}.md"
    table.write_text(tables.markdown(result))
    return [table, *write_pictures(result, folder, json_path.stem)]


def write_pictures(result: dict, folder: Path, stem: str) -> list[Path]:
    """Those that the result has data for."""
    if not _can_draw():
        return []
    if curves.has_curves(result):
        return _save({stem: curves.figure(result)}, folder)
    figures = {
        stem: pictures.times(result),
        f"{stem}-speedup": pictures.speedups([result]),
        f"{stem}-memory": pictures.memory(result),
    }
    return _save(figures, folder)


def write_side_by_side(results: list[dict], path: Path) -> list[Path]:
    """Speed-ups on several devices beside each other."""
    if not _can_draw():
        return []
    return _save({path.stem: pictures.speedups(results)}, path.parent)


def _can_draw() -> bool:
    try:
        import matplotlib
    except ImportError as error:
        print(f"no pictures: {error}")
        return False
    matplotlib.use("Agg")
    return True


def _save(figures: dict[str, Any], folder: Path) -> list[Path]:
    from matplotlib import pyplot

    written = []
    for name, figure in figures.items():
        if figure is not None:
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=110)
            pyplot.close(figure)
    return written
