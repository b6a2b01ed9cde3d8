# SPDX-License-Identifier: MIT
"""Registers of the CUDA kernels, as nvcc reports them, against the committed budget."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUDGET = ROOT / "tests" / "cuda" / "budget.txt"
# Another release of nvcc gives a kernel a few registers more or less.
SLACK = 8


def load_report():
    """tests/cuda/report.py, which is no package."""
    path = ROOT / "tests" / "cuda" / "report.py"
    spec = importlib.util.spec_from_file_location("cuda_report", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def read_budget() -> dict[str, int]:
    """Registers by kernel."""
    lines = (line.split() for line in BUDGET.read_text().splitlines() if not line.startswith("#"))
    return {kernel: int(registers) for registers, kernel in lines}


@pytest.fixture(scope="module")
def rows():
    """The report of the last `make cuda-kernels`."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here: the kernels' registers are not known")
    make = ["make", "-q", "-f", "tests/cuda/Makefile"]
    if subprocess.run(make, cwd=ROOT, capture_output=True, check=False).returncode != 0:
        pytest.skip("the CUDA kernels are not compiled as they are now: run `make cuda-kernels`")
    return load_report().read_report(ROOT / "build" / "cuda")


def test_kernels_keep_to_their_budget_of_registers(rows):
    budget = read_budget()
    over = [row for row in rows if row.registers > budget[row.kernel] + SLACK]
    assert over == []


def test_budget_names_every_kernel_and_no_other(rows):
    assert {row.kernel for row in rows} == set(read_budget())


def test_no_kernel_has_a_stack_frame(rows):
    assert [row for row in rows if row.stack != 0] == []


@pytest.mark.parametrize("source", ["grad_norm", "residual", "sgd_list", "sgd_update"])
def test_no_byte_is_loaded_by_itself(source, tmp_path):
    """A word that is copied through a reference is loaded byte by byte: 16 instructions for one."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here: what it makes of the kernels is not known")
    ptx = tmp_path / "kernels.ptx"
    command = ["nvcc", "-std=c++20", "-Icsrc", "-ptx", "-arch=sm_90"]
    subprocess.run([*command, f"csrc/cuda/{source}.cu", "-o", ptx], cwd=ROOT, check=True)
    loads = re.findall(r"\bld\.[\w.:]+", ptx.read_text())
    assert any(load.endswith(("32", "64")) for load in loads)
    elsewhere = (".param", ".shared")  # a flag among the arguments, or of a block
    assert [k for k in loads if k.endswith("8") and not any(e in k for e in elsewhere)] == []


def test_report_reads_what_ptxas_writes():
    log = """\
ptxas info    : Compiling entry function '_ZN10fused_step4cuda20one_pass_rows_kernelINS0_4TileINS\
_8BFloat16EfLi8ELi4ELi1ELi2EEEEEvNS0_11OnePassArgsINT_1XENS6_1PEEEi' for 'sm_90'
ptxas info    : Function properties for _ZN10fused_step4cuda20one_pass_rows_kernel
    24 bytes stack frame, 12 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 164 registers, used 1 barriers, 16464 bytes smem
ptxas info    : Compile time = 44.1 ms
"""
    report = load_report()
    assert report.rows_of(log) == [
        report.Row(90, "one_pass_rows<BFloat16,f,8,4,1,2>", 164, 16464, 24)
    ]


def test_no_other_target_writes_where_the_report_is():
    """`make cuda-build` once copied its tree over it, and the tests above were always skipped."""
    places = dict(
        line.replace("?=", ":=").replace(" ", "").split(":=", 1)
        for makefile in ("Makefile", "tests/cuda/Makefile")
        for line in (ROOT / makefile).read_text().splitlines()
        if line.startswith(("CUDA_TREE :=", "SANITIZE_TREE :=", "BUILD ?="))
    )
    assert places.keys() == {"CUDA_TREE", "SANITIZE_TREE", "BUILD"}
    assert len(set(places.values())) == 3
