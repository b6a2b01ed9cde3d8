# SPDX-License-Identifier: MIT
"""``python -m fused_step``: about the compiled module, see `main`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fused_step import __version__, info
from fused_step._build import cache, on_import


def main(arguments: Sequence[str] | None = None) -> None:
    """The commands ``info``, ``build`` and ``cache``, and ``--version``."""
    parser = argparse.ArgumentParser(prog="python -m fused_step")
    parser.add_argument("--version", action="version", version=f"fused_step {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print versions, what was built and what is used here")
    commands.add_parser("build", help="compile now what the first import would compile")
    folders = commands.add_parser("cache", help="print where modules compiled at import are kept")
    folders.add_argument("--clear", action="store_true", help="remove what is in there")
    given = parser.parse_args(arguments)
    if given.command == "info":
        print(info.report())
    elif given.command == "build":
        _build()
    elif given.clear:
        removed = cache.clear()
        print("\n".join(f"removed {path}" for path in removed) or "nothing to remove")
    else:
        print("\n".join(str(root) for root in cache.roots()))


def _build() -> None:
    library, why = on_import.find()
    if library is None:
        try:
            library = on_import.compile_now(why, again=True)
        except on_import.BuildError as error:
            sys.exit(f"fused_step: {error}")
    print(library.path)


if __name__ == "__main__":
    main()
