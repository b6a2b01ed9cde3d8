# SPDX-License-Identifier: MIT
"""Measures speed-ups anew and holds them against the committed results.

Usage: python benchmarks/ratios.py [--fresh DIR] [--committed DIR]

A ratio has lost if it is less than 80 % of the committed one, less the A/A noise of both runs on
top. Exit status 1 if one has lost, 2 if there was nothing to compare: ratios hold for one machine
and one number of threads. Without --fresh it measures: a quick run of some contestants, two to
three minutes. Not a part of CI, whose machines are busy.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from harness import BENCHMARKS, results, tables

ALLOWED_LOSS = 0.20
# What is measured of each benchmark: who is compared, and the subject twice.
CONTESTANTS = {
    "cpu": "eager,hand,numpy,step,step_again",
    "loss": "eager,loss,loss_again",
    "head": "eager,eager_fused,step,step_again",
    "optim": "forloop,foreach,fused,ours,ours_again",
}


class Ratio(NamedTuple):
    case: str
    contestant: str
    before: float  # that many times the subject's time
    now: float
    noise: float  # of both runs

    @property
    def lost(self) -> bool:
        return self.now < self.before * (1.0 - ALLOWED_LOSS - self.noise)


def compare(committed: dict, fresh: dict) -> Iterator[Ratio]:
    """Every ratio that both runs have; floors have none that is anybody's merit."""
    before = _ratios(committed)
    for place, (now, noise) in _ratios(fresh).items():
        if place in before:
            ratio, earlier_noise = before[place]
            yield Ratio(*place, ratio, now, math.hypot(noise, earlier_noise))


def _ratios(result: dict) -> dict[tuple[str, str], tuple[float, float]]:
    """By case and contestant: the median ratio to the subject, and the A/A noise."""
    found = {}
    for case in result["cases"]:
        if case["aa"] is None:
            continue
        for contestant in case["contestants"]:
            is_again = contestant["key"] == case["aa"]["again"]
            if contestant["ratio"] and contestant["role"] == "contestant" and not is_again:
                place = (case["title"], contestant["label"])
                found[place] = (contestant["ratio"]["median"], case["aa"]["noise"])
    return found


def comparable(committed: dict, fresh: dict) -> bool:
    """Whether both ran on the same kind of machine with as many threads."""
    return all(
        committed[field] == fresh[field]
        if field == "threads"
        else committed["machine"][field] == fresh["machine"][field]
        for field in ("cpu", "caches", "threads")
    )


def load_folder(folder: Path) -> dict[str, dict]:
    """The result files of CONTESTANTS' benchmarks in it, by kind."""
    paths = {kind: folder / f"{kind}.json" for kind in CONTESTANTS}
    return {kind: results.load(path) for kind, path in paths.items() if path.is_file()}


def report(committed: Mapping[str, dict], fresh: Mapping[str, dict]) -> int:
    """Prints a table of all ratios and returns the exit status."""
    compared = []
    for kind, result in fresh.items():
        if kind not in committed:
            print(f"{kind}: not compared: there is no committed result")
        elif not comparable(committed[kind], result):
            print(f"{kind}: not compared: the committed result is of another machine")
        else:
            compared += list(compare(committed[kind], result))
    for ratio in compared:
        numbers = f"{tables.number(ratio.before):>9}× {tables.number(ratio.now):>9}×"
        noise = f"noise {tables.percent(ratio.noise):>8}"
        verdict = "LOST" if ratio.lost else "ok"
        print(f"{ratio.case:24} {ratio.contestant:28} {numbers}  {noise}  {verdict}")
    if not compared:
        return 2
    lost = sum(ratio.lost for ratio in compared)
    print(f"{len(compared)} ratios, {lost} lost more than {tables.percent(ALLOWED_LOSS)} and noise")
    return 1 if lost else 0


def measure(out: Path) -> None:
    for kind, contestants in CONTESTANTS.items():
        script = str(BENCHMARKS / f"bench_{kind}.py")
        options = ["--rounds", "12", "--seconds", "50", "--no-memory", "--out", str(out)]
        command = [sys.executable, script, "--contestants", contestants, *options]
        subprocess.run(command, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", type=Path, help="results to judge; default: measured now")
    parser.add_argument("--committed", type=Path, default=BENCHMARKS / "results")
    arguments = parser.parse_args()
    fresh = arguments.fresh
    if fresh is None:
        fresh = BENCHMARKS.parent / "build" / "benchmarks" / "ratios"
        measure(fresh)
    return report(load_folder(arguments.committed), load_folder(fresh))


if __name__ == "__main__":
    sys.exit(main())
