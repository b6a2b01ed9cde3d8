# SPDX-License-Identifier: MIT
"""What ptxas says of every kernel, as a table: architecture, kernel, registers, shared memory.

python3 tests/cuda/report.py FOLDER, with FOLDER/sm_*/*.log as tests/cuda/Makefile leaves them.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
STACK = re.compile(r"(\d+) bytes stack frame")
# _ZN10fused_step4cuda20one_pass_rows_kernelINS0_4TileIffLi4ELi8ELi1ELi1EEEEEvNS0_11OnePassArgs...
KERNEL = re.compile(r"\d([a-z_]+)_kernelI(.*?)EEv")


@dataclass(frozen=True)
class Row:
    """A kernel on an architecture."""

    arch: int
    kernel: str
    registers: int
    shared: int
    stack: int


def short_name(mangled: str) -> str:
    """`one_pass_rows<f,f,4,8,1,1>` of the mangled name; types as the ABI abbreviates them."""
    found = KERNEL.search(mangled)
    if found is None:
        return mangled
    types = r"\d+(BFloat16|Float16|RingFeed|RegisterFeed)|L[ib](\d+)E|([fd](?=[fdL]|$)|S\d_(?=L))"
    words = ["".join(groups) for groups in re.findall(types, found[2])]
    return f"{found[1]}<{','.join(words)}>"


def rows_of(text: str) -> list[Row]:
    """The kernels in one log."""
    rows = []
    arch, kernel, stack = 0, "", 0
    for line in text.splitlines():
        if found := ENTRY.search(line):
            kernel, arch = short_name(found[1]), int(found[2].rstrip("af"))
        elif found := STACK.search(line):
            stack = int(found[1])
        elif (found := USED.search(line)) and kernel:
            rows.append(Row(arch, kernel, int(found[1]), int(found[2] or 0), stack))
            kernel = ""
    return rows


def read_report(folder: Path) -> list[Row]:
    """All kernels of all logs."""
    logs = sorted(folder.glob("sm_*/*.log"))
    return sorted(
        (row for log in logs for row in rows_of(log.read_text())),
        key=lambda row: (row.arch, row.kernel),
    )


if __name__ == "__main__":
    for row in read_report(Path(sys.argv[1])):
        print(f"sm_{row.arch}\t{row.registers}\t{row.shared}\t{row.kernel}")
