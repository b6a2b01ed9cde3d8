# SPDX-License-Identifier: MIT
"""From measured samples to the JSON of a run, and its validation against schema.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness import BENCHMARKS
from harness.protocol import Entry, Measured
from harness.stats import Spread, aa_noise, is_equal

SCHEMA_VERSION = 1
MOST_BUSY_CPUS = 0.25  # with other things before a run: one of a busier machine is not published


def _microseconds(seconds: float) -> float:
    return float(f"{seconds * 1e6:.5g}")


def _contestant(entry: Entry, measured: Measured, subject: str, noise: float | None) -> dict:
    contestant = entry.contestant
    result: dict[str, Any] = {
        "key": contestant.key,
        "label": contestant.label,
        "role": contestant.role,
        "note": contestant.note,
        "own_process": contestant.own_process,
        "status": entry.status,
        "reason": entry.reason,
        "facts": entry.facts,
        "check": None if entry.check is None else entry.check.as_json(),
        "steps_per_sample": entry.steps_per_sample,
        "microseconds": None,
        "ratio": None,
        "verdict": None,
        "gb_per_s": None,
        "gflop_per_s": None,
        "samples_us": [],
        "memory": entry.memory,
    }
    times = measured.times(contestant.key)
    if times is None:
        return result
    median = Spread.of(times)
    result["microseconds"] = Spread.of(times * 1e6).as_json()
    result["samples_us"] = [_microseconds(t) for t in times]
    result["gb_per_s"] = measured.case.minimal_bytes / median.median * 1e-9
    result["gflop_per_s"] = measured.case.flops / median.median * 1e-9
    subject_times = measured.times(subject)
    if subject_times is not None and contestant.key != subject:
        ratio = Spread.of(times / subject_times)
        result["ratio"] = ratio.as_json()
        if noise is not None and is_equal(ratio.median, noise):
            result["verdict"] = "equal"
        else:
            result["verdict"] = "slower" if ratio.median > 1.0 else "faster"
    return result


def _targets(measured: Measured, noise: float | None) -> list[dict]:
    rows = []
    for target in measured.case.parsed_targets:
        row: dict[str, Any] = {
            "text": str(target),
            "subject": target.subject,
            "relation": target.relation,
            "limit": target.limit,
            "other": target.other,
            "measured": None,
            "reached": None,
            "within_noise": None,
        }
        subject, other = measured.times(target.subject), measured.times(target.other)
        if subject is not None and other is not None:
            spread = Spread.of(target.ratio(subject, other))
            row["measured"] = spread.as_json()
            row["reached"] = target.reached(spread.median)
            if noise is not None:
                row["within_noise"] = is_equal(spread.median / target.limit, noise)
        rows.append(row)
    return rows


def case_result(measured: Measured, subject: str, again: str, memory: dict | None) -> dict:
    """One case of the result file.

    Args:
        measured: what the protocol returned.
        subject: key of the contestant that the others are compared with.
        again: key of the same contestant's second entry, for the A/A noise.
        memory: what memory.measure returned, or None if memory was not measured.
    """
    case = measured.case
    first, second = measured.times(subject), measured.times(again)
    noise = None
    aa = None
    if first is not None and second is not None:
        noise = aa_noise(first, second)
        aa = {"subject": subject, "again": again, "noise": noise}
        aa["ratio"] = Spread.of(second / first).as_json()
    return {
        "name": case.name,
        "title": case.title,
        "note": case.note,
        **case.sizes,
        "dtype": case.dtype,
        "minimal_bytes": case.minimal_bytes,
        "flops": case.flops,
        "learning_rate": case.learning_rate,
        "rounds": measured.rounds,
        "interrupted": measured.interrupted,
        "aa": aa,
        "contestants": [_contestant(entry, measured, subject, noise) for entry in measured.entries],
        "targets": _targets(measured, noise),
        "memory": memory,
    }


def validate(result: dict) -> None:
    """Raises jsonschema.ValidationError if `result` is not what schema.json describes."""
    try:
        import jsonschema
    except ImportError:
        print("jsonschema is not installed: the result is not validated")
        return
    schema = json.loads((BENCHMARKS / "schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(result)


def save(result: dict, path: Path) -> None:
    """Validates and writes at once or not at all."""
    validate(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    partial.replace(path)


def load(path: Path) -> dict:
    """Reads a result file; what an older one did not measure is there as "not measured"."""
    result = json.loads(path.read_text())
    validate(result)
    result.setdefault("busy_cpus", None)
    result["protocol"].setdefault("cold", False)
    for case in result["cases"]:
        for contestant in case["contestants"]:
            contestant.setdefault("memory", None)
    return result
