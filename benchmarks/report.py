# SPDX-License-Identifier: MIT
"""Makes tables and pictures from the JSON of runs; with runs of several devices, also a picture of
them side by side.

Usage: python benchmarks/report.py RESULTS.json|DIR... [--out DIR] [--publish]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness import page, report, results, side_by_side


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("results", nargs="+", type=Path, help="result files, or folders of them")
    parser.add_argument("--out", type=Path, help="folder to write to (default: beside the JSON)")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="also docs/performance.md with its pictures, and the README's section on speed",
    )
    arguments = parser.parse_args()
    paths: list[Path] = []
    for path in arguments.results:
        paths += sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not paths:
        parser.error("no result file found")
    loaded = [results.load(path) for path in paths]
    written = []
    for result, path in zip(loaded, paths, strict=True):
        written += report.write(result, path, arguments.out)
    written += side_by_side.write(loaded, arguments.out or paths[0].parent)
    if arguments.publish:
        written += page.publish(loaded, paths[0].parent)
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
