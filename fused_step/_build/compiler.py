# SPDX-License-Identifier: MIT
"""Which host compiler is used."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess


def command() -> list[str]:
    """The command that starts it, such as ["ccache", "c++"]: $CXX, else c++."""
    return shlex.split(os.environ.get("CXX") or "c++")


def missing() -> str | None:
    """Why there is none; None if there is one."""
    name = command()[0]
    return None if shutil.which(name) else f"there is no C++ compiler ({name})"


def version() -> str:
    """The first line of what it says of itself."""
    said = subprocess.run([*command(), "--version"], capture_output=True, text=True, check=True)
    return said.stdout.splitlines()[0]
