# SPDX-License-Identifier: MIT
"""Every Python snippet of README.md runs, in the order it is read."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_snippets_run_in_order():
    text = README.read_text()
    snippets = list(SNIPPET.finditer(text))
    assert snippets
    namespace: dict[str, object] = {"__name__": "readme"}
    for snippet in snippets:
        # Blank lines in front, so that an error's traceback names the README's own line.
        before = text.count("\n", 0, snippet.start(1))
        exec(compile("\n" * before + snippet[1], str(README), "exec"), namespace)


if __name__ == "__main__":  # for an environment without pytest
    test_snippets_run_in_order()
