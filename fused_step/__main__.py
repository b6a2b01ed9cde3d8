# SPDX-License-Identifier: MIT
"""``python -m fused_step info``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fused_step import info


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fused_step")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print versions, what was built and what is used here")
    parser.parse_args(arguments)
    print(info.report())


if __name__ == "__main__":
    main()
