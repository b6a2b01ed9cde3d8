# SPDX-License-Identifier: MIT
"""The command line that every bench_*.py shares: progress, results after each case, report."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from harness import floors, machine, memory, report, results
from harness.case import Case
from harness.contestant import Contestant
from harness.protocol import Protocol, measure
from harness.remote import BENCHMARKS

MakeContestants = Callable[[int], Sequence[Contestant]]
MeasureMemory = Callable[[Case, int], dict]


def _parse(description: str, cases: Sequence[Case]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    names = ", ".join(case.name for case in cases)
    parser.add_argument("--rounds", type=int, help="rounds a case (quick: 8)")
    parser.add_argument("--quick", action="store_true", help="few rounds, under 90 s; not to quote")
    parser.add_argument("--cases", help=f"comma-separated, of: {names}")
    parser.add_argument("--contestants", help="comma-separated keys; default all")
    parser.add_argument("--threads", type=int, help="default: what torch takes")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory check")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of results (default: benchmarks/results if full, else build/benchmarks)",
    )
    arguments = parser.parse_args()
    for name in ("rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    known = {case.name: case for case in cases}
    arguments.selected = list(cases)
    if arguments.cases:
        wanted = arguments.cases.split(",")
        if unknown := [name for name in wanted if name not in known]:
            parser.error(f"--cases: {', '.join(unknown)} is none of: {names}")
        arguments.selected = [case for case in cases if case.name in wanted]
    arguments.keys = set(arguments.contestants.split(",")) if arguments.contestants else None
    # A partial or quick run must not replace the results of a full one.
    full = not (arguments.quick or arguments.cases or arguments.contestants or arguments.rounds)
    if arguments.out is None:
        root = BENCHMARKS.parent
        arguments.out = BENCHMARKS / "results" if full else root / "build" / "benchmarks"
    return arguments


def _protocol(arguments: argparse.Namespace, full: Protocol) -> Protocol:
    protocol = Protocol(rounds=8, case_seconds=3.0) if arguments.quick else full
    if arguments.rounds:
        protocol = Protocol(rounds=arguments.rounds, case_seconds=protocol.case_seconds)
    return protocol


def _start(kind: str, subject: str, arguments: argparse.Namespace, protocol: Protocol) -> dict:
    now = datetime.datetime.now(datetime.UTC)
    load = machine.load_average()
    return {
        "schema": results.SCHEMA_VERSION,
        "kind": kind,
        "subject": subject,
        "created": now.isoformat(timespec="seconds"),
        "complete": False,
        "quick": arguments.quick,
        "machine": machine.machine(),
        "versions": machine.versions(),
        "commit": machine.commit(BENCHMARKS.parent),
        "threads": torch.get_num_threads(),
        "load_average": {"before": load, "after": load},
        "protocol": protocol.as_json(),
        "cases": [],
    }


def _case_table(case: dict, subject: str) -> Table:
    noise = report.percent(case["aa"]["noise"]) if case["aa"] else "not measured"
    caption = f"{case['rounds']} rounds, A/A noise {noise}"
    table = Table(title=case["title"], caption=caption, title_justify="left")
    table.add_column("")
    table.add_column("µs a step (p20–p80)", justify="right")
    table.add_column(f"time / {subject}'s", justify="right")
    table.add_column("plan")
    for contestant in case["contestants"]:
        if contestant["status"] != "ok":
            words = f"[red]{contestant['status']}[/]"
            table.add_row(contestant["label"], words, "", contestant["reason"])
            continue
        style = "dim" if contestant["role"] == "floor" else None
        table.add_row(
            contestant["label"],
            report.spread(contestant["microseconds"]),
            report.against_subject(contestant),
            contestant["facts"].get("plan", ""),
            style=style,
        )
    return table


def _target_table(cases: Sequence[dict]) -> Table:
    table = Table(title="Targets", title_justify="left")
    for column in ("case", "target", "measured (p20–p80)", "reached"):
        table.add_column(column)
    for case in cases:
        labels = {c["key"]: c["label"] for c in case["contestants"]}
        for target in case["targets"]:
            style = {True: "green", False: "red", None: "dim"}[target["reached"]]
            table.add_row(
                case["title"],
                report.target_words(target, labels),
                report.spread(target["measured"], "×"),
                f"[{style}]{report.reached_words(target).replace('*', '')}[/]",
            )
    return table


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Redrawn rarely: the display is a thread of this process and takes time from who is measured.
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        yield progress


def run(
    kind: str,
    description: str,
    cases: Sequence[Case],
    make_contestants: MakeContestants,
    subject: str,
    again: str,
    measure_memory: MeasureMemory | None = memory.measure,
    full: Protocol | None = None,
) -> None:
    """Parses the command line, measures, prints, and writes KIND.json, KIND.md and KIND.png.

    Args:
        kind: stem of the result files.
        description: the first line of --help.
        cases: all cases of this benchmark.
        make_contestants: from a number of threads to the contestants of one case, floors included.
        subject: key of the contestant that the others are compared with.
        again: key of its second entry, for the A/A noise.
        measure_memory: from a case and a number of threads to its memory; None: not measured.
        full: the protocol of a run that is not quick.
    """
    arguments = _parse(description, cases)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    threads = torch.get_num_threads()
    protocol = _protocol(arguments, full or Protocol())
    result = _start(kind, subject, arguments, protocol)
    path = arguments.out / f"{kind}.json"
    console.print(
        f"{result['machine']['cpu']}; {threads} threads of torch, "
        f"CPUs {result['machine']['affinity']}; load average {result['load_average']['before']}"
    )
    if result["load_average"]["before"][0] > 0.5:
        console.print("[yellow]the machine is busy with something else: do not quote this run[/]")
    with console.status("building the floors"):
        console.print(floors.build())

    interrupted = False
    with _progress(console) as progress:
        all_cases = progress.add_task("cases", total=len(arguments.selected))
        current = progress.add_task("", total=protocol.rounds)
        for case in arguments.selected:

            def say(what: str, done: int, total: int, case: Case = case) -> None:
                progress.update(
                    current, description=f"{case.title} {what}", completed=done, total=total
                )

            contestants = [
                contestant
                for contestant in make_contestants(threads)
                if arguments.keys is None or contestant.key in arguments.keys
            ]
            measured = measure(case, contestants, protocol, say)
            interrupted = measured.interrupted
            used = None
            if not (interrupted or arguments.no_memory or measure_memory is None):
                say("memory", measured.rounds, measured.rounds)
                try:
                    used = measure_memory(case, threads)
                except KeyboardInterrupt:
                    interrupted = True
            if measured.rounds:
                row = results.case_result(measured, subject, again, used)
                result["cases"].append(row)
                result["load_average"]["after"] = machine.load_average()
                result["complete"] = len(result["cases"]) == len(cases) and not interrupted
                results.save(result, path)
                console.print(_case_table(row, subject))
            if interrupted:
                break
            progress.advance(all_cases)

    if not result["cases"]:
        console.print("nothing was measured")
        raise SystemExit(130)
    console.print(_target_table(result["cases"]))
    written = report.write(result, path)
    console.print("written:", *(os.path.relpath(file) for file in (path, *written)))
    if interrupted:
        console.print("interrupted: what was complete is kept")
        raise SystemExit(130)
