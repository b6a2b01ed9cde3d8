# SPDX-License-Identifier: MIT
"""The command line of bench_gpu.py. Plain text and few packages: a machine with a GPU may have no
others, and no network."""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from harness import machine, report, results
from harness.contestant import Contestant
from harness.gpu_case import GpuCase
from harness.gpu_steps import Eager, GpuContestant, Step
from harness.protocol import Protocol, measure
from harness.remote import BENCHMARKS

_REHEARSAL = Protocol(rounds=5, batch_seconds=0.002, case_seconds=1.0)
_QUICK = Protocol(rounds=8, case_seconds=4.0)


def _parse(description: str, cases: Sequence[GpuCase]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(case.name for case in cases)
    parser.add_argument("--rounds", type=int, help="rounds a case (default 40; quick: 8)")
    parser.add_argument("--quick", action="store_true", help="few rounds; not to quote")
    parser.add_argument("--cases", help=f"comma-separated, of: {names}")
    parser.add_argument("--contestants", help="comma-separated keys; default all")
    parser.add_argument(
        "--rehearse", action="store_true", help="small cases on the CPU; nothing is written"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of results (default: benchmarks/results if full, else build/benchmarks)",
    )
    arguments = parser.parse_args()
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    wanted = arguments.cases.split(",") if arguments.cases else [case.name for case in cases]
    if unknown := set(wanted) - {case.name for case in cases}:
        parser.error(f"--cases: {', '.join(sorted(unknown))} is none of: {names}")
    arguments.selected = [case for case in cases if case.name in wanted]
    arguments.keys = set(arguments.contestants.split(",")) if arguments.contestants else None
    # A partial or quick run must not replace the results of a full one.
    full = not (arguments.quick or arguments.cases or arguments.contestants or arguments.rounds)
    if arguments.out is None:
        root = BENCHMARKS.parent
        arguments.out = BENCHMARKS / "results" if full else root / "build" / "benchmarks"
    return arguments


def _driver_version() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.splitlines()[0].strip() if answer.strip() else "unknown"


def gpu() -> dict:
    """Facts about the current GPU."""
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "l2_mib": round(p.L2_cache_size / 2**20, 1),
        "memory_gib": round(p.total_memory / 2**30, 1),
        "driver": _driver_version(),
    }


def _start(kind: str, subject: str, quick: bool, protocol: Protocol) -> dict:
    now = datetime.datetime.now(datetime.UTC)
    load = machine.load_average()
    return {
        "schema": results.SCHEMA_VERSION,
        "kind": kind,
        "subject": subject,
        "created": now.isoformat(timespec="seconds"),
        "complete": False,
        "quick": quick,
        "machine": {**machine.machine(), "gpu": gpu()},
        "versions": {**machine.versions(), "cuda": str(torch.version.cuda)},
        "commit": machine.commit(BENCHMARKS.parent),
        "threads": torch.get_num_threads(),
        "load_average": {"before": load, "after": load},
        "protocol": protocol.as_json(),
        "cases": [],
    }


def _peak(contestant: GpuContestant, case: GpuCase) -> int:
    """The most that torch's allocator held in one step, beyond what was there before."""
    contestant.prepare(case.make_data(0))
    try:
        contestant.sample(2)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contestant.sample(1)
        return torch.cuda.max_memory_allocated() - before
    finally:
        contestant.release()


def _memory(case: GpuCase) -> dict:
    """The peak of a step, against that of an eager one less the weight's gradient."""
    step = Step("step", "")
    try:
        limit = _peak(Eager("eager", ""), case) - case.weight_bytes
        used = _peak(step, case)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {
        "plan": "step",
        "aten_bytes": used,
        "resident_bytes": None,
        "output_bytes": case.output_bytes,
        "limit_bytes": limit,
        "reached": used <= limit,
    }


def _print_case(row: dict, subject: str) -> None:
    noise = report.percent(row["aa"]["noise"]) if row["aa"] else "not measured"
    print(f"\n{row['title']}: {row['rounds']} rounds, A/A noise {noise}")
    for c in row["contestants"]:
        if c["status"] != "ok":
            print(f"  {c['label']:<36} {c['status']}: {c['reason']}")
            continue
        plan = f" [{c['facts']['plan']}]" if "plan" in c["facts"] else ""
        time = report.spread(c["microseconds"], " µs")
        print(f"  {c['label'] + plan:<36} {time:<36} {report.against_subject(c)} {subject}'s")
    labels = {c["key"]: c["label"] for c in row["contestants"]}
    for target in row["targets"]:
        measured = report.spread(target["measured"])
        words = report.target_words(target, labels)
        print(f"  target {words}: {measured} {report.reached_words(target).replace('*', '')}")
    if row["memory"] and "error" not in row["memory"]:
        m = row["memory"]
        words = f"{report.size(m['aten_bytes'])}, limit {report.size(m['limit_bytes'])}"
        print(f"  peak memory of a step: {words}: {'within' if m['reached'] else 'NOT within'}")
    elif row["memory"]:
        print(f"  peak memory: {row['memory']['error']}")


def _write_report(result: dict, path: Path) -> None:
    try:
        table, image = report.write(result, path)
        print("written:", *(os.path.relpath(file) for file in (path, table, image)))
    except ImportError as error:
        print(f"written: {os.path.relpath(path)} and its table; no picture: {error}")


def run(
    kind: str,
    description: str,
    cases: Sequence[GpuCase],
    make_contestants: Callable[[], Sequence[Contestant]],
    subject: str,
    again: str,
    rehearsal: Callable[[GpuCase], GpuCase],
) -> None:
    """Parses the command line, measures, prints, and writes KIND.json, KIND.md and KIND.png.

    Args:
        kind: stem of the result files.
        description: what --help says.
        cases: all cases of this benchmark.
        make_contestants: the contestants of one case, floors included.
        subject: key of the contestant that the others are compared with.
        again: key of its second entry, for the A/A noise.
        rehearsal: from a case to a small one on the CPU.
    """
    arguments = _parse(description, cases)
    selected = arguments.selected
    protocol = _QUICK if arguments.quick else Protocol()
    if arguments.rehearse:
        print("a rehearsal on the CPU: small cases, nothing below says anything about a GPU")
        selected = [rehearsal(case) for case in selected]
        protocol = _REHEARSAL
    elif not torch.cuda.is_available():
        print("no GPU: torch finds none here, nothing was measured", file=sys.stderr)
        raise SystemExit(2)
    if arguments.rounds:
        protocol = Protocol(rounds=arguments.rounds, case_seconds=protocol.case_seconds)
    path = arguments.out / f"{kind}.json"
    result = None
    if not arguments.rehearse:
        result = _start(kind, subject, arguments.quick, protocol)
        print(report.gpu_words(result["machine"]["gpu"]))
    # torch.compile and JAX warn of what cannot be changed here, in the middle of the table.
    warnings.simplefilter("ignore")

    interrupted = False
    for case in selected:
        entrants = [c for c in make_contestants() if not arguments.keys or c.key in arguments.keys]
        say = functools.partial(_say, case)
        measured = measure(case, entrants, protocol, say)
        interrupted = measured.interrupted
        used = _memory(case) if case.peak_memory and result and not interrupted else None
        if measured.rounds:
            row = results.case_result(measured, subject, again, used)
            _print_case(row, subject)
            if result is not None:
                result["cases"].append(row)
                result["load_average"]["after"] = machine.load_average()
                result["complete"] = len(result["cases"]) == len(cases) and not interrupted
                results.save(result, path)
        if interrupted:
            break
    if result is not None and result["cases"]:
        _write_report(result, path)
    if interrupted:
        print("interrupted: what was complete is kept")
        raise SystemExit(130)


def _say(case: GpuCase, what: str, done: int, total: int) -> None:
    """Only the slow beginnings; rounds would fill a log."""
    if done == 0 and what.startswith("check") and sys.stderr.isatty():
        print(f"{case.title} {what}", file=sys.stderr)
