# SPDX-License-Identifier: MIT
"""``python -m fused_step info``, and the loader of the compiled module."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_step
from fused_step import _extension, info
from fused_step.__main__ import main
from fused_step._build import on_import


def entries(report: str) -> dict[str, str]:
    """The report's indented lines, name to value."""
    lines = [line.split("  ") for line in report.splitlines() if line.startswith("  ")]
    pairs = ([part.strip() for part in line if part][:2] for line in lines)
    return dict(pairs)


def test_report_names_the_versions():
    found = entries(info.report())
    assert found["fused_step"] == fused_step.__version__
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()


def test_report_names_the_module_and_what_it_was_built_for():
    library, _ = on_import.find()
    found = entries(info.report())
    assert found["file"] == str(library.path)
    assert found["built for torch"].startswith(torch.__version__)
    assert found["compiler"] == library.info.compiler


def test_isa_used_is_one_that_was_built():
    found = entries(info.report())
    assert found["ISA"] in found["ISA levels"].split(", ")


def test_gemms_of_bfloat16_are_the_processors_where_it_has_them():
    has_instructions = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    uses_them = has_instructions and torch.backends.mkldnn.is_available()
    found = entries(info.report())
    assert found["bfloat16 GEMMs"] == ("in bfloat16" if uses_them else "in float32")


def test_threads_are_torch_threads():
    torch.set_num_threads(1)
    found = entries(info.report())
    assert found["threads"] == "1"
    assert found["at::parallel_for width"] == "1"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_parallel_for_is_as_wide_as_torch(threads):
    torch.set_num_threads(threads)
    assert _extension._C.parallel_width() == threads


def test_command_prints_the_report():
    output = subprocess.run(
        [sys.executable, "-W", "error", "-m", "fused_step", "info"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert entries(output.stdout).keys() == entries(info.report()).keys()
    assert output.stderr == ""


def test_version_is_printed_without_a_command():
    output = subprocess.run(
        [sys.executable, "-W", "error", "-m", "fused_step", "--version"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert (output.stdout, output.stderr) == (f"fused_step {fused_step.__version__}\n", "")


def test_unknown_command_exits_with_usage(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["nonsense"])
    assert exit_info.value.code == 2
    assert "usage: python -m fused_step" in capsys.readouterr().err
