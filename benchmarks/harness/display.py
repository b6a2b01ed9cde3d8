# SPDX-License-Identifier: MIT
"""What is seen while a benchmark runs: bars and tables by rich, or plain lines where it is not."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from harness import tables


class Display(Protocol):
    def say(self, line: str) -> None: ...

    def warn(self, line: str) -> None: ...

    @contextlib.contextmanager
    def progress(self, cases: int, rounds: int) -> Iterator[None]: ...

    def now(self, case: str, what: str, done: int, total: int) -> None:
        """What goes on in a case."""

    def case_done(self, result: dict, case: dict) -> None: ...

    def targets(self, cases: Sequence[dict]) -> None: ...


def make() -> Display:
    try:
        return _Rich()
    except ImportError:
        return _Plain()


class _Plain:
    def say(self, line: str) -> None:
        print(line, flush=True)

    warn = say

    @contextlib.contextmanager
    def progress(self, cases: int, rounds: int) -> Iterator[None]:
        yield

    def now(self, case: str, what: str, done: int, total: int) -> None:
        # Rounds would fill a log.
        if done == 0 and sys.stderr.isatty():
            print(f"{case} {what}", file=sys.stderr)

    def case_done(self, result: dict, case: dict) -> None:
        self.say("\n".join(tables.case_lines(result, case)))

    def targets(self, cases: Sequence[dict]) -> None:
        self.say("\n".join(tables.target_lines(cases)))


class _Rich:
    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(width=None if sys.stdout.isatty() else 120)

    def say(self, line: str) -> None:
        self._console.print(line)

    def warn(self, line: str) -> None:
        self._console.print(f"[yellow]{line}[/]")

    @contextlib.contextmanager
    def progress(self, cases: int, rounds: int) -> Iterator[None]:
        from rich import progress

        columns = (
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
        )
        # Redrawn rarely: the display takes time from who is measured.
        with progress.Progress(*columns, console=self._console, refresh_per_second=1) as bars:
            self._bars = bars
            self._cases = bars.add_task("cases", total=cases)
            self._current = bars.add_task("", total=rounds)
            yield

    def now(self, case: str, what: str, done: int, total: int) -> None:
        self._bars.update(self._current, description=f"{case} {what}", completed=done, total=total)

    def case_done(self, result: dict, case: dict) -> None:
        self._bars.advance(self._cases)
        self._console.print(self._case_table(case, result["subject"]))

    def _case_table(self, case: dict, subject: str) -> Any:
        from rich.table import Table

        noise = tables.percent(case["aa"]["noise"]) if case["aa"] else "not measured"
        caption = f"{case['rounds']} rounds, A/A noise {noise}"
        table = Table(title=case["title"], caption=caption, title_justify="left")
        table.add_column("")
        table.add_column("µs a step (p20–p80)", justify="right")
        table.add_column(f"time / {subject}'s", justify="right")
        table.add_column("memory", justify="right")
        table.add_column("plan")
        for contestant in case["contestants"]:
            if contestant["status"] != "ok":
                words = f"[red]{contestant['status']}[/]"
                table.add_row(contestant["label"], words, "", "", contestant["reason"])
                continue
            table.add_row(
                contestant["label"],
                tables.spread(contestant["microseconds"]),
                tables.against_subject(contestant),
                tables.memory_words(contestant["memory"]),
                contestant["facts"].get("plan", ""),
                style="dim" if contestant["role"] == "floor" else None,
            )
        return table

    def targets(self, cases: Sequence[dict]) -> None:
        from rich.table import Table

        table = Table(title="Targets", title_justify="left")
        for column in ("case", "target", "measured (p20–p80)", "reached"):
            table.add_column(column)
        for case in cases:
            labels = tables.labels_of(case)
            for target in case["targets"]:
                style = {True: "green", False: "red", None: "dim"}[target["reached"]]
                table.add_row(
                    case["title"],
                    tables.target_words(target, labels),
                    tables.spread(target["measured"], "×"),
                    f"[{style}]{tables.reached_words(target).replace('*', '')}[/]",
                )
        if table.row_count:
            self._console.print(table)
