# SPDX-License-Identifier: MIT
"""Random calls of every door, held to the plain loop; a failing case prints a line to repeat it.

Usage: python tests/fuzz.py [--cases N] [--seed S] [--jobs J] [--door NAME ...] [--case TEXT]
           [--device cuda]

Case k of a seed is the same whatever the number of jobs. `random` draws the cases, not hypothesis:
drawing one takes 0.05 ms of some 5, where hypothesis takes longer for forty draws than the case
itself; and a case is a flat list of answers, made smaller by setting one after the other to the
simplest.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import random
import sys
import time

import device
import torch
from fuzzing.cases import Case, Door
from fuzzing.doors import DOORS

# No case takes a second, but on a machine that others use, too.
HANGING_S = 600.0


def prepare(where: str = "cpu") -> None:
    """Settings of a process that runs cases: warnings that come once would depend on the order."""
    if where != "cpu":
        device.use(where)
    torch.set_num_threads(1)
    torch.set_warn_always(True)


def case_of(doors: list[Door], seed: int, number: int) -> tuple[Door, Case]:
    """Case `number` of a seed."""
    source = random.Random(f"{seed} {number}")
    door = doors[number % len(doors)]
    return door, door.draw(source)


def repro(door: Door, case: Case) -> str:
    return f'python tests/fuzz.py --case "{case.text(door.choices)}"'


def work(where: str, doors: list[Door], seed: int, numbers: range, at, results) -> None:
    """Runs cases of one process; `at` says which, should it die."""
    prepare(where)
    kinds: collections.Counter[str] = collections.Counter()
    failures = []
    for number in numbers:
        at.value = number
        door, case = case_of(doors, seed, number)
        try:
            kinds[f"{door.name}: {door.run(case)}"] += 1
        except Exception:
            kinds[f"{door.name}: FAILED"] += 1
            smaller = door.shrink(case)
            failure = f"FAILED: {door.failure(smaller)}\n  {repro(door, smaller)}"
            if failure not in failures:
                failures.append(failure)
                print(failure, flush=True)
    results.put((kinds, failures))


def run(
    where: str, doors: list[Door], seed: int, cases: int, jobs: int
) -> tuple[collections.Counter, int]:
    """Runs cases in processes; how often each kind of outcome came, and how many failed."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = []
    for job in range(jobs):
        at = context.Value("q", -1)
        numbers = range(job, cases, jobs)
        process = context.Process(target=work, args=(where, doors, seed, numbers, at, results))
        process.start()
        workers.append([process, at, -1, time.monotonic()])
    kinds: collections.Counter[str] = collections.Counter()
    failed = 0
    waiting = len(workers)
    while waiting:
        while not results.empty():
            found, failures = results.get()
            kinds += found
            failed += len(failures)
            waiting -= 1
        for worker in list(workers):
            process, at, last, since = worker
            if at.value != last:
                worker[2:] = [at.value, time.monotonic()]
            hangs = process.is_alive() and time.monotonic() - since > HANGING_S and last >= 0
            died = not process.is_alive() and process.exitcode != 0
            if hangs:
                process.kill()
            if hangs or died:
                door, case = case_of(doors, seed, at.value)
                what = "hung" if hangs else f"died, exit code {process.exitcode}"
                print(f"FAILED: the process {what}\n  {repro(door, case)}", flush=True)
                failed += 1
                waiting -= 1
            if hangs or not process.is_alive():
                workers.remove(worker)
        time.sleep(0.1)
    return kinds, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--door", action="append", choices=list(DOORS), help="these alone")
    parser.add_argument("--case", help="one case, as a failure has printed it")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    arguments = parser.parse_args()
    if arguments.case is not None:
        prepare(arguments.device)
        door = DOORS[arguments.case.split(";")[0].strip()]
        print(door.run(door.parse(arguments.case)))
        return
    doors = [DOORS[name] for name in arguments.door or DOORS]
    print(f"fuzz: {arguments.cases} cases, seed {arguments.seed}", flush=True)
    start = time.monotonic()
    kinds, failed = run(arguments.device, doors, arguments.seed, arguments.cases, arguments.jobs)
    for kind, count in sorted(kinds.items()):
        print(f"{count:9} {kind}")
    print(f"fuzz: {sum(kinds.values())} cases in {time.monotonic() - start:.0f} s, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
