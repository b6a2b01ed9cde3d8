# SPDX-License-Identifier: MIT
"""Every Python snippet of README.md runs, in the order it is read."""

from __future__ import annotations

import linecache
import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_snippets(page: Path) -> int:
    """Runs them in one namespace; how many there were."""
    text = page.read_text()
    # As Python sees the page: blank but for the snippets, so that every line keeps its number.
    lines = ["\n"] * (text.count("\n") + 1)
    namespace: dict[str, object] = {"__name__": page.stem}
    for snippet in SNIPPET.finditer(text):
        before = text.count("\n", 0, snippet.start(1))
        code = snippet[1].splitlines(keepends=True)
        lines[before : before + len(code)] = code
        # The source of its classes, too, is at hand, as in a file or a notebook.
        linecache.cache[str(page)] = (len(text), None, lines, str(page))
        exec(compile("\n" * before + snippet[1], str(page), "exec"), namespace)
    return len(SNIPPET.findall(text))


def test_snippets_run_in_order():
    assert run_snippets(README) > 0


if __name__ == "__main__":  # for an environment without pytest
    test_snippets_run_in_order()
