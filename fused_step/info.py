# SPDX-License-Identifier: MIT
"""What was built and what is used here, as text."""

from __future__ import annotations

import platform

import torch

import fused_step
from fused_step._build import cache, on_import


def report() -> str:
    """Versions, what the compiled module holds, and what it uses on this machine.

    Compiles nothing: where no module fits, it says so and why.
    """
    library, why = on_import.find()
    sections = {
        "versions": {
            "fused_step": fused_step.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "compiled module": {"file": f"none: {why}"} if library is None else _module(library),
        "cache": {"folders": ", ".join(str(root) for root in cache.roots())},
    }
    if library is not None:
        sections["used here"] = _used()
    width = max(len(name) for entries in sections.values() for name in entries)
    lines = []
    for title, entries in sections.items():
        lines.append(title)
        lines += [f"  {name:<{width}}  {value}" for name, value in entries.items()]
    return "\n".join(lines)


def _module(library: on_import.Library) -> dict[str, str]:
    from fused_step._extension import _C

    info = library.info
    return {
        "file": str(library.path),
        "built for torch": f"{info.identity.torch}, {info.identity.python}",
        "compiler": info.compiler,
        "flags": " ".join(info.flags),
        "ISA levels": ", ".join(_C.isa_levels()),
        "CUDA archs": " ".join(info.cuda_archs) or "none (CPU build)",
    }


def _used() -> dict[str, str]:
    from fused_step._extension import _C

    return {
        "ISA": _C.isa_used(),
        "bfloat16 GEMMs": "in bfloat16" if _C.has_bfloat16_gemm() else "in float32",
        "threads": str(torch.get_num_threads()),
        "at::parallel_for width": str(_C.parallel_width()),
    }
