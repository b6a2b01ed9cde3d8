# SPDX-License-Identifier: MIT
"""A Markdown table and a picture from the JSON of a run."""

from __future__ import annotations

import math
from pathlib import Path

from harness import curves
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


def _labels(case: dict) -> dict[str, str]:
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


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [_row(*header), _row(*("---" for _ in header)), *(_row(*row) for row in rows)]


def gpu_words(gpu: dict) -> str:
    return (
        f"{gpu['name']}, {gpu['multiprocessors']} multiprocessors, L2 {gpu['l2_mib']:g} MiB, "
        f"{gpu['memory_gib']:g} GiB"
    )


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
    before, after = (result["load_average"][when][0] for when in ("before", "after"))
    protocol = result["protocol"]
    lines = [
        f"# Benchmark: {result['kind']}",
        "",
        *([f"- {gpu_words(machine['gpu'])}"] if "gpu" in machine else []),
        f"- {machine['cpu']}, {machine['logical_cpus']} logical CPUs, {caches}",
        f"- {result['threads']} threads; load average {before:g} before, {after:g} after",
        "- " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"- sources: {sources}; {result['created']}",
        f"- up to {protocol['rounds']} rounds a case, a sample is at least "
        f"{1000 * protocol['batch_seconds']:g} ms or one step",
    ]
    if result["quick"]:
        lines.append("- **a quick run: too short to quote**")
    if not result["complete"]:
        lines.append("- **not all cases were run to the end**")
    return lines


def target_lines(result: dict) -> list[str]:
    rows = []
    for case in result["cases"]:
        for target in case["targets"]:
            measured = spread(target["measured"], "×")
            words = target_words(target, _labels(case))
            rows.append([case["title"], words, measured, reached_words(target)])
    if not rows:
        return []
    lines = ["", "## Targets", "", "Measured: median of the per-round ratios (p20–p80).", ""]
    return lines + _table(["case", "target", "measured", "reached"], rows)


_CPU_LIMIT = (
    "Limit: B·O floats; for one-pass at least bytes(x)/8. ATen: peak of torch's allocator in"
    " one step. Resident: growth of the process's resident peak over the first three steps"
    " (pages of code included, hence 1 MiB of slack)."
)
_GPU_LIMIT = (
    "Limit: the peak of an eager step less the weight's gradient. ATen: peak of torch's allocator"
    " in one step."
)


def _memory_lines(result: dict) -> list[str]:
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
        "## Memory of a step beyond its inputs",
        "",
        _GPU_LIMIT if "gpu" in result["machine"] else _CPU_LIMIT,
        "",
    ]
    return lines + _table(["B×I→O", "plan", "ATen", "resident", "limit", "within"], rows)


def _case_lines(case: dict, subject: str) -> list[str]:
    subject_label = _labels(case).get(subject, subject)
    lines = [
        "",
        f"## {case['title']}",
        "",
        f"At least {size(case['minimal_bytes'])} to move and {number(case['flops'] * 1e-6)} MFLOP; "
        f"{case['rounds']} rounds; A/A noise "
        f"{percent(case['aa']['noise']) if case['aa'] else 'not measured'}.",
    ]
    if case["note"]:
        lines.append(case["note"])
    if case["interrupted"]:
        lines.append("Interrupted: fewer rounds than wanted.")
    rows = []
    for contestant in case["contestants"]:
        label = contestant["label"]
        if "plan" in contestant["facts"]:
            label += f" [{contestant['facts']['plan']}]"
        if contestant["role"] == "floor":
            label = f"_{label}_"
        if contestant["status"] != "ok":
            rows.append([label, contestant["status"], "", "", ""])
            continue
        is_floor = contestant["role"] == "floor"
        rates = [contestant["gb_per_s"], contestant["gflop_per_s"]]
        rows.append(
            [
                label,
                spread(contestant["microseconds"]),
                against_subject(contestant),
                *("–" if is_floor or rate is None else number(rate) for rate in rates),
            ]
        )
    header = ["", "µs a step", f"time / {subject_label}'s", "GB/s", "GFLOP/s"]
    lines += ["", *_table(header, rows)]
    reasons = [c for c in case["contestants"] if c["reason"]]
    if reasons:
        lines.append("")
        lines += [f"- {c['label']}: {c['status']}: {c['reason']}" for c in reasons]
    return lines


def markdown(result: dict) -> str:
    lines = header_lines(result) + target_lines(result) + _memory_lines(result)
    for case in result["cases"]:
        lines += _case_lines(case, result["subject"])
    lines += [
        "",
        "GB/s and GFLOP/s are the case's minimal bytes and its FLOPs over the median time.",
        "Floors in italics do only a part of a step's work.",
    ]
    return "\n".join(lines) + "\n"


def picture(result: dict, path: Path) -> None:
    """Time per step of every contestant, one panel a case, floors as dashed lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [
        case for case in result["cases"] if any(c["microseconds"] for c in case["contestants"])
    ]
    if not cases:
        return
    columns = min(2, len(cases))
    rows = math.ceil(len(cases) / columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(7.0 * columns, 3.2 * rows), squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(cases) :]:
        panel.set_visible(False)
    for panel, case in zip(panels.flat, cases, strict=False):
        _panel(panel, case, result["subject"])
    machine = result["machine"]
    where = machine["gpu"]["name"] if "gpu" in machine else machine["cpu"]
    figure.suptitle(f"Time per training step, {where}, {result['threads']} threads", size=12)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(panel, case: dict, subject: str) -> None:
    """One case. The axis begins at 0, unless the bars span so much that it must be logarithmic."""
    timed = [c for c in case["contestants"] if c["microseconds"]]
    again = case["aa"]["again"] if case["aa"] else None
    bars = [c for c in timed if c["role"] == "contestant" and c["key"] != again][::-1]
    floors = [c for c in timed if c["role"] == "floor"]
    medians = [c["microseconds"]["median"] for c in bars]
    lows = [c["microseconds"]["p20"] for c in bars]
    highs = [c["microseconds"]["p80"] for c in bars]
    if not bars:
        return
    if max(medians) > 20 * min(medians):
        panel.set_xscale("log")
        panel.set_xlim(min(medians + [c["microseconds"]["median"] for c in floors]) / 2)
        panel.set_xlim(right=max(highs) * 5)
        unit = "µs a step (log)"
    else:
        # A floor at less than 2 % of the shortest bar would only hide the axis.
        floors = [c for c in floors if c["microseconds"]["median"] > 0.02 * min(medians)]
        panel.set_xlim(0, 1.2 * max(highs + [c["microseconds"]["median"] for c in floors]))
        unit = "µs a step"
    errors = [
        [median - low for median, low in zip(medians, lows, strict=True)],
        [high - median for median, high in zip(medians, highs, strict=True)],
    ]
    colors = ["#c1440e" if c["key"] in (subject, "run") else "#7a8ba0" for c in bars]
    whisker = {"elinewidth": 1.0, "ecolor": "#222222"}
    labels = [c["label"] for c in bars]
    panel.barh(labels, medians, xerr=errors, color=colors, height=0.65, error_kw=whisker)
    for place, (median, high) in enumerate(zip(medians, highs, strict=True)):
        panel.annotate(
            number(median),
            (high, place),
            va="center",
            size=8,
            xytext=(4, 0),
            textcoords="offset points",
        )
    colors_of_floors = ("#2a9d8f", "#d19000", "#8457a8", "#444444")
    for floor, color in zip(floors, colors_of_floors, strict=False):
        median = floor["microseconds"]["median"]
        label = f"{floor['label']}, {number(median)}"
        panel.axvline(median, color=color, linestyle="--", linewidth=1.2, label=label)
    if floors:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": len(floors)}
        panel.legend(fontsize=7, frameon=False, **place)
    panel.set_title(case["title"], size=11)
    panel.set_xlabel(unit, size=8)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def picture_of(result: dict, path: Path) -> None:
    """The curves of a sweep, the bars of anything else."""
    curves.picture(result, path) if curves.has_curves(result) else picture(result, path)


def write(result: dict, json_path: Path, out: Path | None = None) -> list[Path]:
    """Writes NAME.md and NAME.png beside the JSON, or into `out`."""
    folder = json_path.parent if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    table, image = folder / f"{json_path.stem}.md", folder / f"{json_path.stem}.png"
    table.write_text(markdown(result))
    picture_of(result, image)
    return [table, image]
