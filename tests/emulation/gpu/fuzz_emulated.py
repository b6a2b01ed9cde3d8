# SPDX-License-Identifier: MIT
"""tests/fuzz.py on emulated GPUs, with its arguments, in the tree that build.py has built in."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[3])]

import emulated_gpu  # noqa: E402, F401  before torch, in each process
import fuzz  # noqa: E402
import torch  # noqa: E402

# They have no sparse tensors: such a gradient stays dense.
torch.Tensor.to_sparse = lambda t, *_, **__: t

if __name__ == "__main__":
    sys.argv += ["--device", "cuda"]
    fuzz.main()
