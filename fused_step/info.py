# SPDX-License-Identifier: MIT
"""What was built and what is used here, as text."""

from __future__ import annotations

import platform

import torch

import fused_step
from fused_step._extension import _C


def _listed(names: list[str], if_none: str) -> str:
    return ", ".join(names) or if_none


def report() -> str:
    """Versions, what the compiled module holds, and what it uses on this machine."""
    isa_levels = _C.isa_levels() if hasattr(_C, "isa_levels") else []
    isa_used = _C.isa_used() if hasattr(_C, "isa_used") else "baseline"
    cuda_archs = _C.cuda_archs() if hasattr(_C, "cuda_archs") else []
    sections = {
        "versions": {
            "fused_step": fused_step.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "compiler": _C.compiler,
        },
        "built": {
            "ISA levels": _listed(isa_levels, "baseline"),
            "CUDA archs": _listed(cuda_archs, "none (CPU build)"),
        },
        "used here": {
            "ISA": isa_used,
            "threads": str(torch.get_num_threads()),
            "at::parallel_for width": str(_C.parallel_width()),
        },
    }
    width = max(len(name) for entries in sections.values() for name in entries)
    lines = []
    for title, entries in sections.items():
        lines.append(title)
        lines += [f"  {name:<{width}}  {value}" for name, value in entries.items()]
    return "\n".join(lines)
