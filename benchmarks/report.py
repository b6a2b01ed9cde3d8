# SPDX-License-Identifier: MIT
"""Makes a Markdown table and a picture from the JSON of each run.

Usage: python benchmarks/report.py RESULTS.json|DIR... [--out DIR] [--page docs/performance.md]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from harness import page, report, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="result files, or folders of them")
    parser.add_argument("--out", type=Path, help="folder to write to (default: beside the JSON)")
    parser.add_argument("--page", type=Path, help="write the page of all of them, pictures beside")
    arguments = parser.parse_args()
    paths: list[Path] = []
    for path in arguments.results:
        paths += sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not paths:
        parser.error("no result file found")
    if arguments.page:
        write_page(paths, arguments.page)
        return
    for path in paths:
        for written in report.write(results.load(path), path, arguments.out):
            print(written)


def write_page(paths: list[Path], page_path: Path) -> None:
    images = page_path.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    loaded = [results.load(path) for path in paths]
    for result in loaded:
        report.picture_of(result, images / f"{result['kind']}.png")
    folder = os.path.relpath(paths[0].parent, page_path.parent)
    page_path.write_text(page.text(loaded, folder, images.name))
    print(page_path)


if __name__ == "__main__":
    main()
