# SPDX-License-Identifier: MIT
"""The README's section on speed, between two marks, from the results: no figure in it is written by
hand."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping

from harness import tables

BEGIN = "<!-- made by benchmarks/report.py --publish -->"
END = "<!-- end -->"

_TIMED = ("eager", "hand", "numpy", "jax", "jax_scan", "step", "run")
_RATIOS = ("eager", "hand", "numpy", "jax")
_HEADER = [
    *("B×I→O", "plan", "eager", "torch by hand", "NumPy", "JAX, jit", "JAX, lax.scan"),
    *("step()", "run(), a step"),
    *("eager / step()", "by hand / step()", "NumPy / step()", "JAX / step()"),
]


def put_into(text: str, by_kind: Mapping[str, dict]) -> str:
    """`text` with the section between the marks made anew."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README: expected the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{section(by_kind)}\n{END}{after}"


def section(by_kind: Mapping[str, dict]) -> str:
    """What stands between the marks, from the results of cpu, cpu-cold, loss, head and optim."""
    cpu = by_kind["cpu"]
    lines = [
        *_paragraph(
            f"Microseconds per training step, float32, on {cpu['threads']} threads of "
            f"{cpu['machine']['cpu']} with torch {cpu['versions']['torch']} and Python "
            f"{cpu['versions']['python']}: medians of interleaved rounds; the last four columns "
            "are medians of the rounds' ratios. "
            '"torch by hand" is the same step written without autograd, with every view and buffer '
            "made once."
        ),
        "",
        *tables.table_lines(_HEADER, [_row(case) for case in cpu["cases"]]),
    ]
    if "cpu-cold" in by_kind:
        told: dict[bool, list[str]] = {False: [], True: []}  # by whether it is within the noise
        for case in by_kind["cpu-cold"]["cases"]:
            eager = _by_key(case).get("eager", {})
            told[eager.get("verdict") == "equal"].append(
                f"{_ratio(case, 'eager')} at {case['title']}"
            )
        how = "That is in a tight loop. With the caches emptied before each step eager takes"
        noise = f"; within the noise {', '.join(told[True])}" if told[True] else ""
        lines += ["", *_paragraph(f"{how} {', '.join(told[False])}{noise}.")]
    if "loss" in by_kind:
        cases = by_kind["loss"]["cases"]
        words = [f"{_ratio(case, 'eager')} at {case['title']}" for case in cases]
        torchs = (
            "`linear_mse_loss`, forward and backward, against `F.mse_loss(F.linear(...))`, where "
            "the input needs no gradient or (with dx) does"
        )
        lines += ["", *_paragraph(f"{torchs}: {', '.join(words)}.")]
    if "head" in by_kind:
        cases = by_kind["head"]["cases"]
        words = [
            f"{_ratio(case, 'eager')}, {_ratio(case, 'compiled')} at {case['title']}"
            for case in cases
        ]
        what = "`TrainStep` on networks, against eager and eager with model and loss compiled"
        lines += ["", *_paragraph(f"{what}: {'; '.join(words)}.")]
    if "optim" in by_kind:
        words = [
            f"{_ratio(case, 'fused')}, {_ratio(case, 'foreach')}, {_ratio(case, 'forloop')} "
            f"on {case['title']}"
            for case in by_kind["optim"]["cases"]
        ]
        torchs = "`fused_step.SGD.step()` against torch's fused, foreach and for-loop"
        lines += ["", *_paragraph(f"{torchs}: {'; '.join(words)}.")]
    lines += ["", "Where it falls short:", ""]
    for kind in ("cpu", "loss", "head", "optim"):
        if kind in by_kind:
            for words in _falls_short(by_kind[kind]):
                lines += _paragraph(f"- {words}", subsequent_indent="  ")
    return "\n".join(lines)


def _paragraph(text: str, **options: str) -> list[str]:
    return textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False, **options)


def _by_key(case: dict) -> dict[str, dict]:
    return {c["key"]: c for c in case["contestants"] if c["microseconds"]}


def _ratio(case: dict, key: str) -> str:
    timed = _by_key(case)
    ratio = timed[key]["ratio"] if key in timed else None
    return "–" if ratio is None else f"{tables.number(ratio['median'])}×"


def _row(case: dict) -> list[str]:
    timed = _by_key(case)
    times = [
        tables.number(timed[key]["microseconds"]["median"]) if key in timed else "–"
        for key in _TIMED
    ]
    plan = timed["step"]["facts"].get("plan", "–") if "step" in timed else "–"
    times[_TIMED.index("step")] = f"**{times[_TIMED.index('step')]}**"
    return [case["title"], plan, *times, *(_ratio(case, key) for key in _RATIOS)]


def _falls_short(result: dict) -> Iterator[str]:
    """Targets that were missed beyond the noise, and whoever was faster beyond it."""
    for case in result["cases"]:
        labels = tables.labels_of(case)
        for target in case["targets"]:
            if target["reached"] is False:
                measured = tables.spread(target["measured"], "×")
                noise = ", within the noise" if target["within_noise"] else ""
                words = tables.target_words(target, labels)
                yield f"{case['title']}: {measured}{noise}; the target: {words}."
        ours = labels[result["subject"]]
        # Many steps a call are run()'s rivals: a target compares them.
        rivals = [c for c in _by_key(case).values() if c["key"] != "jax_scan"]
        for contestant in rivals:
            is_ours = contestant["label"].startswith(("fused_step", "linear_mse_loss"))
            if contestant["verdict"] == "faster" and contestant["role"] != "floor" and not is_ours:
                ratio = tables.spread(contestant["ratio"], "×")
                yield f"{case['title']}: {contestant['label']} takes {ratio} {ours}'s time."
