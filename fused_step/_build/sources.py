# SPDX-License-Identifier: MIT
"""Which sources make the compiled module, and where they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]

# Listed, not globbed: a stray file never ends up in the binary. Paths below csrc/.
CPU_SOURCES = (
    "units/loss.cpp",
    "units/module.cpp",
    "units/optimizer.cpp",
    "units/step.cpp",
    "cpu/dispatch.cpp",
    "cpu/isa_avx2.cpp",
    "cpu/isa_avx2_short.cpp",
    "cpu/isa_avx512.cpp",
    "cpu/isa_baseline.cpp",
)
# The CUDA engine: kernels by nvcc, bindings by the host compiler.
CUDA_SOURCES = (
    "cuda/grad_norm.cu",
    "cuda/one_pass.cu",
    "cuda/one_pass_grad.cu",
    "cuda/one_pass_mma.cu",
    "cuda/one_pass_step.cu",
    "cuda/put.cu",
    "cuda/residual.cu",
    "cuda/sgd_list.cu",
    "cuda/sgd_update.cu",
    "cuda/tiny_steps.cu",
)
CUDA_BINDINGS = ("units/cuda.cpp",)
_SUFFIXES = (".cpp", ".h", ".cu", ".cuh")
_RECIPE = ("cuda_toolkit", "recipe", "sources")  # modules beside this one


def folder() -> Path:
    """csrc/: within the package where it is installed, beside it in a source tree."""
    installed = _PACKAGE / "csrc"
    return installed if installed.is_dir() else _PACKAGE.parent / "csrc"


def fingerprint() -> str:
    """A hash of all that a build reads: every file of csrc/, and the recipe. About 2 ms."""
    root = folder()
    files = sorted(path for path in root.rglob("*") if path.suffix in _SUFFIXES)
    digest = hashlib.sha256()
    recipe = [Path(__file__).with_name(f"{name}.py") for name in _RECIPE]
    for path in (*files, *recipe):
        name = path.relative_to(root) if path.is_relative_to(root) else path.name
        content = path.read_bytes()
        digest.update(f"{name}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()
