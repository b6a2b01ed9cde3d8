# SPDX-License-Identifier: MIT
"""The command line that every bench_*.py shares: progress, results after each case, report."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from harness import BENCHMARKS, display, machine, places, report, results, tables
from harness.contestant import Contestant
from harness.protocol import MIN_ROUNDS, Budget, Entry, Measured, Protocol, Say, failure, measure

QUICK = Protocol(rounds=8, case_seconds=2.0, budget_seconds=70.0)
COLD = Protocol(rounds=20, case_seconds=12.0, budget_seconds=125.0)
# Of a case's share of the time, for its memory.
_SHARE_OF_MEMORY = 0.3


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What a bench_*.py is.

    Args:
        kind: stem of the result files.
        description: its docstring: the first line of --help.
        cases: all of them.
        contestants: makes those of one case, floors included.
        subject: key of the contestant that the others are compared with.
        again: key of its second entry, for the A/A noise.
        judge_memory: from a case and its entries by key to whether the subject kept within what it
            may use; None: no limit.
        place: where contestants run.
        full: the protocol of a run that is not quick.
        quick: the protocol of --quick.
        cold: the protocol of --cold.
        with_memory: whether memory is measured.
        rehearsed: from a case to a small one on the CPU, for --rehearse.
    """

    kind: str
    description: str
    cases: Sequence[Any]
    contestants: Callable[[], Sequence[Contestant]]
    subject: str
    again: str
    judge_memory: Callable[[Any, Mapping[str, Entry]], dict | None] | None = None
    place: Any = dataclasses.field(default_factory=places.Cpu)
    full: Protocol = dataclasses.field(default_factory=Protocol)
    quick: Protocol = QUICK
    cold: Protocol = COLD
    with_memory: bool = True
    rehearsed: Callable[[Any], Any] | None = None


def run(benchmark: Benchmark, command_line: Sequence[str] | None = None) -> None:
    """Parses the command line, measures, prints, and writes KIND.json and its report."""
    options = _parse(benchmark, command_line)
    place = places.Rehearsal() if options.rehearse else benchmark.place
    if reason := place.missing():
        print(f"{reason}, nothing was measured", file=sys.stderr)
        raise SystemExit(2)
    if options.threads:
        torch.set_num_threads(options.threads)
    # torch.compile and JAX warn of what cannot be changed here, in the middle of a table.
    warnings.simplefilter("ignore")
    _Run(benchmark, options, place).go()


class _Run:
    """One run of a benchmark from its first line to its report."""

    def __init__(self, benchmark: Benchmark, options: argparse.Namespace, place: Any):
        self._benchmark, self._options, self._place = benchmark, options, place
        self._protocol = options.protocol
        self._display = display.make()
        kind = benchmark.kind + ("-cold" if options.cold else "")
        self._path = options.out / f"{kind}.json"
        self._result = self._start(kind)
        self._cases = options.selected
        self._interrupted = False
        self._lost = ""  # where the device was lost, and to whom

    def go(self) -> None:
        self._introduce()
        budget = Budget(self._protocol.budget_seconds, len(self._cases))
        with self._display.progress(len(self._cases), self._protocol.rounds):
            for case in self._cases:
                seconds = budget.next_case()
                if seconds is None:
                    self._display.warn(f"{case.title}: left out, no time was left")
                    continue
                self._one(case, seconds)
                if self._interrupted:
                    break
        if not self._result["cases"]:
            self._display.say("nothing was measured")
            raise SystemExit(130)
        self._display.targets(self._result["cases"])
        if not self._options.rehearse:
            written = report.write(self._result, self._path)
            files = " ".join(os.path.relpath(file) for file in (self._path, *written))
            self._display.say(f"written: {files}")
        if self._lost:
            self._display.warn(f"{self._lost}, what was complete is kept")
            raise SystemExit(1)
        if self._interrupted:
            self._display.say("interrupted: what was complete is kept")
            raise SystemExit(130)

    def _start(self, kind: str) -> dict:
        now = datetime.datetime.now(datetime.UTC)
        busy, load = machine.busy_cpus(results.MOST_BUSY_CPUS), machine.load_average()
        return {
            "schema": results.SCHEMA_VERSION,
            "kind": kind,
            "subject": self._benchmark.subject,
            "created": now.isoformat(timespec="seconds"),
            "complete": False,
            "quick": self._options.quick,
            "machine": self._place.machine(),
            "versions": self._place.versions(),
            "commit": machine.commit(BENCHMARKS.parent),
            "threads": torch.get_num_threads(),
            "busy_cpus": busy,
            "load_average": {"before": load, "after": load},
            "protocol": self._protocol.as_json(),
            "cases": [],
        }

    def _introduce(self) -> None:
        facts, busy = self._result["machine"], self._result["busy_cpus"]
        self._display.say(
            f"{facts['cpu']}; {self._result['threads']} threads each, CPUs {facts['affinity']}; "
            f"{tables.busy_words(self._result)}"
        )
        if busy is not None and busy > results.MOST_BUSY_CPUS:
            self._display.warn("the machine is busy with something else: do not quote this run")
        entrants = [c for c in self._benchmark.contestants() if self._takes_part(c)]
        self._display.say(self._place.start(self._result["threads"], entrants))

    def _takes_part(self, contestant: Contestant) -> bool:
        return self._options.keys is None or contestant.key in self._options.keys

    def _one(self, case: Any, seconds: float) -> None:
        """Measures one case and saves it with what there was before."""
        began = time.monotonic()

        def say(what: str, done: int, total: int) -> None:
            self._display.now(case.title, what, done, total)

        entrants = [
            self._place.enter(contestant)
            for contestant in self._benchmark.contestants()
            if self._takes_part(contestant)
        ]
        with_memory = self._benchmark.with_memory and not (
            self._options.no_memory or self._protocol.cold
        )
        share = seconds * (1.0 - _SHARE_OF_MEMORY) if with_memory else seconds
        measured = measure(case, entrants, self._protocol, say, share, self._place.lost)
        limit = None
        if with_memory and not measured.interrupted:
            self._measure_memory(measured, began + seconds, say)
            limit = self._judge_memory(measured)
        self._interrupted = measured.interrupted
        if measured.lost_to:
            self._lost = f"{case.title}: the device was lost to {measured.lost_to}"
        elif not measured.rounds:
            return
        row = results.case_result(measured, self._benchmark.subject, self._benchmark.again, limit)
        self._result["cases"].append(row)
        self._result["load_average"]["after"] = machine.load_average()
        all_of_them = len(self._result["cases"]) == len(self._benchmark.cases)
        wanted = min(MIN_ROUNDS, self._protocol.rounds)
        enough = all(done["rounds"] >= wanted for done in self._result["cases"])
        self._result["complete"] = all_of_them and enough and not self._interrupted
        if not self._options.rehearse:
            results.save(self._result, self._path)
        self._display.case_done(self._result, row)

    def _measure_memory(self, measured: Measured, end: float, say: Say) -> None:
        """The subject first, then the others as far as the time goes."""
        entries = [e for e in measured.running() if e.contestant.role == "contestant"]
        entries = [e for e in entries if e.contestant.key != self._benchmark.again]
        entries.sort(key=lambda entry: entry.contestant.key != self._benchmark.subject)
        with measured.may_end_early():
            for entry in entries:
                say(f"memory: {entry.contestant.label}", measured.rounds, measured.rounds)
                if time.monotonic() > end:
                    entry.memory = {"error": "no time was left"}
                    continue
                with measured.turn_of(entry):
                    entry.memory = self._memory_of(entry.contestant, measured.case)

    def _memory_of(self, contestant: Contestant, case: Any) -> dict:
        try:
            return self._place.memory(contestant, case, self._protocol.seed)
        except Exception as error:
            return {"error": failure(error)}

    def _judge_memory(self, measured: Measured) -> dict | None:
        entries = {entry.contestant.key: entry for entry in measured.running()}
        judge, subject = self._benchmark.judge_memory, entries.get(self._benchmark.subject)
        if judge is None or subject is None or subject.memory is None:
            return None
        return judge(measured.case, entries)


def _parse(benchmark: Benchmark, command_line: Sequence[str] | None) -> argparse.Namespace:
    cases = benchmark.cases
    parser = argparse.ArgumentParser(description=benchmark.description.splitlines()[0])
    names = ", ".join(case.name for case in cases)
    parser.add_argument("--rounds", type=int, help="rounds a case")
    parser.add_argument("--seconds", type=float, help="for all cases together")
    parser.add_argument("--quick", action="store_true", help="few rounds; not to be quoted")
    parser.add_argument("--cases", help=f"comma-separated, of: {names}")
    parser.add_argument("--contestants", help="comma-separated keys; default all")
    parser.add_argument("--threads", type=int, help="default: what torch takes")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of results (default: benchmarks/results if full, else build/benchmarks)",
    )
    parser.set_defaults(cold=False, rehearse=False)
    if benchmark.place.can_be_cold:
        parser.add_argument("--cold", action="store_true", help="empty caches before each step")
    if benchmark.rehearsed:
        help_of_it = "small cases on the CPU; nothing is written"
        parser.add_argument("--rehearse", action="store_true", help=help_of_it)
    options = parser.parse_args(command_line)
    for name in ("rounds", "threads", "seconds"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} must be positive, got {value}")
    options.keys = _chosen(parser, "contestants", options.contestants, benchmark.contestants())
    chosen = _chosen(parser, "cases", options.cases, cases)
    options.selected = [case for case in cases if chosen is None or case.name in chosen]
    if options.rehearse:
        options.selected = [benchmark.rehearsed(case) for case in options.selected]
    if options.cold:
        # The targets are those of a step in a loop, which finds what the last one left.
        options.selected = [dataclasses.replace(case, targets=()) for case in options.selected]
    options.protocol = _protocol(benchmark, options)
    # A partial or quick run must not replace the results of a full one.
    partial = (options.cases, options.contestants, options.rounds, options.seconds)
    full = not (options.quick or any(partial))
    if options.out is None:
        in_build = BENCHMARKS.parent / "build" / "benchmarks"
        options.out = BENCHMARKS / "results" if full else in_build
    return options


def _chosen(
    parser: argparse.ArgumentParser, option: str, text: str | None, known: Sequence[Any]
) -> set[str] | None:
    """The names given to an option, each of them known; None if there are none."""
    if not text:
        return None
    names = [getattr(k, "name", None) or k.key for k in known]
    wanted = text.split(",")
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"--{option}: {', '.join(unknown)} is none of: {', '.join(names)}")
    return set(wanted)


def _protocol(benchmark: Benchmark, options: argparse.Namespace) -> Protocol:
    protocol = benchmark.cold if options.cold else benchmark.full
    if options.quick:
        protocol = benchmark.quick
    changes: dict[str, Any] = {"cold": options.cold}
    if options.rounds:
        changes["rounds"] = options.rounds
    if options.seconds:
        changes["budget_seconds"] = options.seconds
    if options.rehearse:
        changes |= {"rounds": 5, "batch_seconds": 0.002, "case_seconds": 1.0}
    return dataclasses.replace(protocol, **changes)
