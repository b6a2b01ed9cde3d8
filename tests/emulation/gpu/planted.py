# SPDX-License-Identifier: MIT
"""Plants each mistake of planted.toml into the bindings and sees that the suite finds it.

Usage: python tests/emulation/gpu/planted.py, in the tree that build.py has built in.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path("tests/emulation/gpu")
ENVIRONMENT = os.environ | {"PYTHONPATH": f".:{HERE}"}
PYTEST = ["-m", "pytest", "-q", "-x", "-p", "emulated_gpu", "--device=cuda"]
# A test failed, or a touch of closed memory ended the process.
FOUND = (1, -11)


def python(*arguments: str) -> int:
    """Exit status of a Python that says nothing."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=False).returncode


def build() -> bool:
    return python(str(HERE / "build.py"), "--inplace") == 0


def try_bug(bug: dict[str, str]) -> str | None:
    """None if the mistake is found, else what happened."""
    target = Path("csrc/bindings") / bug["file"]
    text = target.read_text()
    if text.count(bug["old"]) != 1:
        return f"`old` is {text.count(bug['old'])} times in {bug['file']}"
    tests = [*PYTEST, *shlex.split(bug["tests"])]
    if python(*tests) != 0:
        return "the tests fail even without it"
    try:
        target.write_text(text.replace(bug["old"], bug["new"]))
        if not build():
            return "does not compile"
        return None if python(*tests) in FOUND else "not found"
    finally:
        target.write_text(text)
        build()


def main() -> int:
    bugs = tomllib.loads((HERE / "planted.toml").read_text())["bug"]
    missed = 0
    for bug in bugs:
        outcome = try_bug(bug)
        missed += outcome is not None
        print(f"{'ok    ' if outcome is None else 'FAILED'} {bug['name']}", flush=True)
        if outcome is not None:
            print(f"    {outcome}", flush=True)
    print(f"{len(bugs) - missed} of {len(bugs)} planted mistakes found")
    return 1 if missed or not bugs else 0


if __name__ == "__main__":
    sys.exit(main())
