# SPDX-License-Identifier: MIT
"""The Markdown tables of a run, and how numbers are worded in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from harness import roofline
from harness.case import MICROSECOND


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return f"{float(text):,.0f}".replace(",", " ") if digits == 0 else text


def size(count: float) -> str:
    """A number of bytes for a reader."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{number(count)} {unit}"
        count /= 1024
    return f"{number(count)} GiB"


def spread(value: dict | None, unit: str = "") -> str:
    if value is None:
        return "–"
    return f"{number(value['median'])}{unit} ({number(value['p20'])}–{number(value['p80'])})"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def labels_of(case: dict) -> dict[str, str]:
    return {contestant["key"]: contestant["label"] for contestant in case["contestants"]}


def target_words(target: dict, labels: dict[str, str]) -> str:
    subject = labels.get(target["subject"], target["subject"])
    if target["other"] == MICROSECOND:
        return f"{subject}: {target['relation']} {target['limit']:g} µs a step"
    other = labels.get(target["other"], target["other"])
    if target["relation"] == ">=":
        return f"{subject}: ≥ {target['limit']:g}× as fast as {other}"
    return f"{subject}: ≤ {target['limit']:g}× the time of {other}"


def reached_words(target: dict) -> str:
    if target["reached"] is None:
        return "not measured"
    word = "yes" if target["reached"] else "**no**"
    return f"{word} (within noise)" if target["within_noise"] else word


def against_subject(contestant: dict) -> str:
    """The time of this one over the subject's, or `equal`."""
    ratio = contestant["ratio"]
    if ratio is None:
        return "–"
    if contestant["verdict"] == "equal":
        return f"equal ({number(ratio['median'])}×)"
    return spread(ratio, "×")


def memory_words(memory: dict | None) -> str:
    """Of a contestant: the growth of its resident set, or what a GPU's allocator held."""
    if memory is None or "error" in memory:
        return "–"
    used = memory["aten_bytes"] if memory["resident_bytes"] is None else memory["resident_bytes"]
    return "–" if used is None else size(used)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table_lines(header: list[str], rows: list[list[str]]) -> list[str]:
    return [_row(*header), _row(*("---" for _ in header)), *(_row(*row) for row in rows)]


def gpu_words(gpu: dict) -> str:
    return (
        f"{gpu['name']}, {gpu['multiprocessors']} multiprocessors, L2 {gpu['l2_mib']:g} MiB, "
        f"{gpu['memory_gib']:g} GiB"
    )


def _sample_words(protocol: dict) -> str:
    if protocol["cold"]:
        return "**caches emptied before each step**"
    return f"a sample is at least {1000 * protocol['batch_seconds']:g} ms or one step"


def device_name(result: dict) -> str:
    machine = result["machine"]
    return machine["gpu"]["name"] if "gpu" in machine else machine["cpu"]


def busy_words(result: dict) -> str:
    """What else the machine did when the run began."""
    busy = result["busy_cpus"]
    of = f"of {result['machine']['logical_cpus']} CPUs"
    return "other load not measured" if busy is None else f"{busy:g} {of} busy with other things"


def header_lines(result: dict) -> list[str]:
    machine, versions, commit = result["machine"], result["versions"], result["commit"]
    caches = ", ".join(
        f"L{cache['level']} {cache['size']}"
        for cache in machine["caches"]
        if cache["type"] != "Instruction"
    )
    sources = commit["hash"][:12] if commit["hash"] else "unknown"
    if commit["dirty"]:
        sources += " with uncommitted changes"
    protocol = result["protocol"]
    on = f" on CPUs {', '.join(map(str, machine['affinity']))}" if machine.get("affinity") else ""
    lines = [
        f"# Benchmark: {result['kind']}",
        "",
        *([f"- {gpu_words(machine['gpu'])}"] if "gpu" in machine else []),
        f"- {machine['cpu']}, {machine['logical_cpus']} logical CPUs, {caches}; "
        + " ".join(machine["vector_extensions"]),
        f"- {result['threads']} threads each{on}; {busy_words(result)} before",
        "- " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"- sources: {sources}; {result['created']}",
        f"- up to {protocol['rounds']} rounds a case, {_sample_words(protocol)}",
    ]
    if result["quick"]:
        lines.append("- **a quick run: too short to quote**")
    if not result["complete"]:
        lines.append("- **not all cases were run to the end, or with enough rounds**")
    return lines


def target_lines(cases: Sequence[dict]) -> list[str]:
    rows = []
    for case in cases:
        for target in case["targets"]:
            measured = spread(target["measured"], "×")
            words = target_words(target, labels_of(case))
            rounds = str(case["rounds"])
            rows.append([case["title"], words, measured, rounds, reached_words(target)])
    if not rows:
        return []
    lines = ["", "## Targets", "", "Measured: median of the per-round ratios (p20–p80).", ""]
    return lines + table_lines(["case", "target", "measured", "rounds", "reached"], rows)


def ratio_lines(result: dict) -> list[str]:
    """A row for each case: how many times the subject's time everybody else takes."""
    labels: dict[str, str] = {}
    for case in result["cases"]:
        labels |= {c["key"]: c["label"] for c in case["contestants"] if c["role"] == "contestant"}
    again = {case["aa"]["again"] for case in result["cases"] if case["aa"]}
    keys = [key for key in labels if key != result["subject"] and key not in again]
    rows = []
    for case in result["cases"]:
        by_key = {c["key"]: c for c in case["contestants"] if c["ratio"]}
        noise = percent(case["aa"]["noise"]) if case["aa"] else "–"
        ratios = (f"{number(by_key[k]['ratio']['median'])}×" if k in by_key else "–" for k in keys)
        rows.append([case["title"], *ratios, noise])
    kept = [n for n in range(len(keys)) if any(row[1 + n] != "–" for row in rows)]
    header = ["", *(labels[keys[n]] for n in kept), "A/A noise"]
    return table_lines(header, [[row[0], *(row[1 + n] for n in kept), row[-1]] for row in rows])


_CPU_LIMIT = (
    "Limit: B·O floats; for one-pass at least bytes(x)/8; for the loss gradients and sums on top."
    " ATen: peak of torch's allocator in one step. Resident: growth of the process's resident peak"
    " over the first three steps (pages of code included, hence 1 MiB of slack)."
)
_GPU_LIMIT = (
    "Limit: the peak of an eager step less the weight's gradient. ATen: peak of torch's allocator"
    " in one step."
)


def _limit_lines(result: dict) -> list[str]:
    rows = []
    for case in result["cases"]:
        memory = case["memory"]
        if memory is None:
            continue
        if "error" in memory:
            rows.append([case["title"], "–", "–", "–", "–", memory["error"]])
            continue
        resident = memory["resident_bytes"]
        rows.append(
            [
                case["title"],
                memory["plan"],
                size(memory["aten_bytes"]),
                "–" if resident is None else size(resident),
                size(memory["limit_bytes"]),
                "yes" if memory["reached"] else "**no**",
            ]
        )
    if not rows:
        return []
    lines = [
        "",
        "## Memory of a step beyond its data and parameters",
        "",
        _GPU_LIMIT if "gpu" in result["machine"] else _CPU_LIMIT,
        "",
    ]
    return lines + table_lines(["B×I→O", "plan", "ATen", "resident", "limit", "within"], rows)


def roofline_words(result: dict, case: dict) -> str:
    """What bounds a step of this case, and how near the subject comes."""
    parts = roofline.of(result, case).parts()
    if not parts:
        return "No roofline: its floors were not measured."
    roof, *others = parts
    words = f"Roofline: {number(roof.time)} µs for {roof.words}"
    if others:
        words += f" ({', '.join(f'{number(part.time)} for {part.words}' for part in others)})"
    for contestant in case["contestants"]:
        if contestant["key"] == result["subject"] and contestant["microseconds"]:
            times = number(contestant["microseconds"]["median"] / roof.time)
            words += f"; {contestant['label']} takes {times}× that"
    return words + "."


def case_lines(result: dict, case: dict) -> list[str]:
    subject = result["subject"]
    subject_label = labels_of(case).get(subject, subject)
    lines = [
        "",
        f"## {case['title']}",
        "",
        f"At least {size(case['minimal_bytes'])} to move and {number(case['flops'] * 1e-6)} MFLOP; "
        f"{case['rounds']} rounds; A/A noise "
        f"{percent(case['aa']['noise']) if case['aa'] else 'not measured'}.",
        "",
        roofline_words(result, case),
    ]
    if case["note"]:
        lines += ["", case["note"]]
    if case["interrupted"]:
        lines += ["", "Interrupted: fewer rounds than wanted."]
    rows = []
    for contestant in case["contestants"]:
        label = contestant["label"]
        if "plan" in contestant["facts"]:
            label += f" [{contestant['facts']['plan']}]"
        if contestant["role"] == "floor":
            label = f"_{label}_"
        if contestant["status"] != "ok":
            rows.append([label, contestant["status"], "", "", "", ""])
            continue
        is_floor = contestant["role"] == "floor"
        rates = [contestant["gb_per_s"], contestant["gflop_per_s"]]
        rows.append(
            [
                label,
                spread(contestant["microseconds"]),
                against_subject(contestant),
                *("–" if is_floor or rate is None else number(rate) for rate in rates),
                memory_words(contestant["memory"]),
            ]
        )
    header = ["", "µs a step", f"time / {subject_label}'s", "GB/s", "GFLOP/s", "memory"]
    lines += ["", *table_lines(header, rows)]
    remarks = [remark for contestant in case["contestants"] for remark in _remarks(contestant)]
    return [*lines, "", *remarks] if remarks else lines


def _remarks(contestant: dict) -> Iterator[str]:
    """What the reader has to know of it beside its numbers."""
    if contestant["note"]:
        yield f"- {contestant['label']}: {contestant['note']}"
    if contestant["reason"]:
        yield f"- {contestant['label']}: {contestant['status']}: {contestant['reason']}"
    if error := (contestant["memory"] or {}).get("error"):
        yield f"- {contestant['label']}: memory not measured: {error}"


def markdown(result: dict) -> str:
    lines = header_lines(result) + target_lines(result["cases"]) + _limit_lines(result)
    for case in result["cases"]:
        lines += case_lines(result, case)
    lines += [
        "",
        "GB/s and GFLOP/s are the case's minimal bytes and its FLOPs over the median time.",
        "Floors in italics do only a part of a step's work.",
    ]
    return "\n".join(lines) + "\n"
