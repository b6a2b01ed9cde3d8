# SPDX-License-Identifier: MIT
"""``python -m fused_step._build.worker FOLDER``: compiles the module into FOLDER.

A process of its own: setuptools changes the one it runs in.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Distribution

from . import recipe, sources


def build_into(folder: Path) -> None:
    """Compiles; the module and its file of facts are then in ``folder/fused_step``."""
    extension = recipe.make_extension(sources.folder())
    command = recipe.BuildExtension(Distribution({"name": "fused_step", "ext_modules": [extension]}))
    command.build_lib = str(folder)
    command.build_temp = str(folder / "objects")
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    build_into(Path(sys.argv[1]))
