# SPDX-License-Identifier: MIT
"""No step reads or writes a byte beyond its tensors, where that byte would end the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from device import DEVICE
from memory_ends import DTYPES, SIZES

from fused_step import _C


@pytest.mark.skipif(DEVICE.type != "cpu", reason="memory of the processor")
@pytest.mark.parametrize("isa", _C.isa_levels(supported_only=True))
def test_steps_touch_nothing_beyond_their_tensors(isa):
    """gcc 12 made a store of the first lanes that faulted for the others (AVX-512, float64)."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("memory_ends.py"))],
        env=os.environ | {"FUSED_STEP_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # With and without momentum, by fused_step.SGD and by linear models of three shapes.
    assert done.stdout == f"{len(DTYPES) * len(SIZES) * 2 * 4} steps\n"
