# SPDX-License-Identifier: MIT
"""Makes a Markdown table and a picture from the JSON of each run.

Usage: python benchmarks/report.py RESULTS.json|DIR... [--out DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness import report, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="result files, or folders of them")
    parser.add_argument("--out", type=Path, help="folder to write to (default: beside the JSON)")
    arguments = parser.parse_args()
    paths: list[Path] = []
    for path in arguments.results:
        paths += sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not paths:
        parser.error("no result file found")
    for path in paths:
        for written in report.write(results.load(path), path, arguments.out):
            print(written)


if __name__ == "__main__":
    main()
