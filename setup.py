# SPDX-License-Identifier: MIT
"""Builds the extension module ``fused_step._C``; all metadata is in pyproject.toml.

Environment:
    FUSED_STEP_CUDA  ``0``: CPU only. ``1``: with CUDA, or fail saying what is missing.
                     ``auto`` (the default): with CUDA where everything for it is there.
    MAX_JOBS         how many compilers ninja runs at once.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

# Listed, not globbed: a stray file never ends up in the binary.
CPU_SOURCES = [
    "csrc/bindings/linear_mse_autograd.cpp",
    "csrc/bindings/linear_mse_cpu.cpp",
    "csrc/bindings/linear_mse_sgd_cpu.cpp",
    "csrc/bindings/linear_step.cpp",
    "csrc/bindings/module.cpp",
    "csrc/bindings/ops_cpu.cpp",
    "csrc/bindings/python_objects.cpp",
    "csrc/bindings/schema.cpp",
    "csrc/bindings/sgd_cpu.cpp",
    "csrc/bindings/sgd_groups.cpp",
    "csrc/bindings/sgd_step.cpp",
    "csrc/bindings/world.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/isa_avx2.cpp",
    "csrc/cpu/isa_avx512.cpp",
    "csrc/cpu/isa_baseline.cpp",
]
CUDA_SOURCES: list[str] = []

COMPILE_FLAGS = [
    "-O3",
    "-g1",  # line tables only: full debug information doubles the build time
    "-std=c++20",
    "-fopenmp",  # without it at::parallel_for runs on one thread
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",  # notes about vector arguments; none crosses the library's boundary
]
LINK_FLAGS = ["-fopenmp"]


def find_nvcc() -> str | None:
    """Path of nvcc: that of the CUDA toolkit torch found, else the one on PATH, else None."""
    home = cpp_extension.CUDA_HOME
    if home is not None and (nvcc := Path(home, "bin", "nvcc")).is_file():
        return str(nvcc)
    return shutil.which("nvcc")


def decide_cuda(
    setting: str, *, torch_cuda: str | None, nvcc: str | None, sources: list[str]
) -> tuple[bool, str]:
    """Whether to build with CUDA, and why.

    Args:
        setting: value of FUSED_STEP_CUDA: "0", "1" or "auto".
        torch_cuda: CUDA version torch was built with, None for a CPU-only torch.
        nvcc: path of the CUDA compiler, None if there is none.
        sources: the CUDA sources of this version of fused_step.

    Raises:
        ValueError: `setting` is none of the three.
        RuntimeError: `setting` is "1" and something is missing; the message names all of it.
    """
    if setting not in ("0", "1", "auto"):
        raise ValueError(f"FUSED_STEP_CUDA: expected 0, 1 or auto, got {setting!r}")
    if setting == "0":
        return False, "FUSED_STEP_CUDA=0"
    missing = []
    if not sources:
        missing.append("this version of fused_step has no CUDA sources")
    if torch_cuda is None:
        missing.append("the installed torch is CPU-only")
    if nvcc is None:
        missing.append("nvcc was not found (neither under CUDA_HOME nor on PATH)")
    if not missing:
        return True, f"torch has CUDA {torch_cuda}, nvcc is {nvcc}"
    if setting == "1":
        raise RuntimeError("FUSED_STEP_CUDA=1: cannot build with CUDA: " + "; ".join(missing))
    return False, "; ".join(missing)


def make_extension() -> Extension:
    """The extension ``fused_step._C``, as FUSED_STEP_CUDA and this machine want it."""
    with_cuda, why = decide_cuda(
        os.environ.get("FUSED_STEP_CUDA", "auto"),
        torch_cuda=torch.version.cuda,
        nvcc=find_nvcc(),
        sources=CUDA_SOURCES,
    )
    print(f"fused_step: {'CUDA' if with_cuda else 'CPU'} build: {why}")
    # As system headers torch's own are exempt from -Wall -Wextra; -isystem wins over the -I that
    # BuildExtension adds for the same folders.
    system_includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    extension = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    return extension(
        name="fused_step._C",
        sources=CPU_SOURCES + (CUDA_SOURCES if with_cuda else []),
        include_dirs=[str(Path(__file__).resolve().parent / "csrc")],
        extra_compile_args={"cxx": COMPILE_FLAGS + system_includes},
        extra_link_args=LINK_FLAGS,
    )


class BuildExtension(cpp_extension.BuildExtension):
    """torch's, with one fixed folder for object files.

    An editable install hands over a fresh temporary folder each time, so that every source would
    be compiled again; in a folder that stays, ninja compiles what changed.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = "build/objects"


if __name__ == "__main__":
    setup(ext_modules=[make_extension()], cmdclass={"build_ext": BuildExtension})
