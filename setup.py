# SPDX-License-Identifier: MIT
"""Builds the extension module ``fused_step._C``; all metadata is in pyproject.toml.

Environment:
    FUSED_STEP_CUDA       ``0``: CPU only. ``1``: with CUDA, or fail saying what is missing.
                          ``auto`` (the default): with CUDA where everything for it is there.
    TORCH_CUDA_ARCH_LIST  what the kernels are compiled for, such as ``8.0 9.0+PTX`` or ``native``;
                          by default every architecture from 8.0 on that the toolkit knows.
    NVCC_THREADS          how many architectures one nvcc compiles at once.
    MAX_JOBS              how many compilers ninja runs at once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

# Listed, not globbed: a stray file never ends up in the binary.
CPU_SOURCES = [
    "csrc/bindings/engines.cpp",
    "csrc/bindings/linear_mse_autograd.cpp",
    "csrc/bindings/linear_mse_cpu.cpp",
    "csrc/bindings/linear_mse_eager.cpp",
    "csrc/bindings/linear_mse_sgd_cpu.cpp",
    "csrc/bindings/linear_mse_sgd_op.cpp",
    "csrc/bindings/linear_step.cpp",
    "csrc/bindings/module.cpp",
    "csrc/bindings/python_bridge.cpp",
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
# The CUDA engine: kernels by nvcc, bindings by the host compiler.
CUDA_SOURCES: list[str] = [
    "csrc/cuda/one_pass.cu",
    "csrc/cuda/one_pass_grad.cu",
    "csrc/cuda/one_pass_step.cu",
    "csrc/cuda/residual.cu",
    "csrc/cuda/sgd_update.cu",
    "csrc/cuda/tiny_steps.cu",
]
CUDA_BINDINGS = [
    "csrc/bindings/cuda_support.cpp",
    "csrc/bindings/linear_mse_cuda.cpp",
    "csrc/bindings/linear_mse_sgd_cuda.cpp",
    "csrc/bindings/ops_cuda.cpp",
]
# 8.0 is the first with cp.async and bf16; PTX of the last one serves GPUs to come.
DEFAULT_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

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


class Toolkit(NamedTuple):
    """Where a CUDA toolkit keeps what a build needs."""

    root: Path
    include: Path
    libraries: Path


def find_toolkit(nvcc: str) -> Toolkit:
    """The toolkit of `nvcc`, which may be a link or a script that starts another: asked, not told
    from its path."""
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True
    ).stderr
    found = dict(re.findall(r"^#\$ (TOP|_TARGET_DIR_)=(.*)$", dry, re.MULTILINE))
    root = Path(found["TOP"]).resolve()
    target = root / found.get("_TARGET_DIR_", "").strip()
    libraries = target / "lib"
    return Toolkit(root, target / "include", libraries if libraries.is_dir() else root / "lib64")


def known_archs(nvcc: str) -> list[str]:
    """The architectures that `nvcc` compiles for: "8.0", "9.0", "10.0" …"""
    codes = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    return [f"{major}.{minor}" for major, minor in re.findall(r"sm_(\d+)(\d)", codes.stdout)]


def choose_archs(wanted: str, known: Iterable[str], native: Callable[[], str]) -> list[str]:
    """What to compile for: "8.0", …, "12.0+PTX".

    Args:
        wanted: value of TORCH_CUDA_ARCH_LIST, empty for the default.
        known: what the toolkit compiles for.
        native: names the GPU of this machine.

    Raises:
        ValueError: a name in `wanted` is none, or unknown to the toolkit, or all are below 8.0.
    """
    known = set(known)
    if not wanted:
        archs = [arch for arch in DEFAULT_ARCHS if arch in known]
        return [*archs[:-1], archs[-1] + "+PTX"]
    if wanted == "native":
        wanted = native()
    archs = []
    for name in re.split(r"[ ;,]+", wanted.strip(" ;,")):
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST: expected names like 9.0 or 9.0+PTX, got {name}"
            )
        number = re.match(r"\d+\.\d", name)[0]
        if float(number) < 8.0:
            print(f"fused_step: {name} is left out: the kernels need 8.0 or newer")
        elif number not in known:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: this CUDA toolkit does not know {name}")
        else:
            archs.append(name)
    if not archs:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected 8.0 or newer, got {wanted}")
    return archs


def native_arch() -> str:
    """The GPU of this machine, as TORCH_CUDA_ARCH_LIST names it."""
    if not torch.cuda.is_available():
        raise ValueError("TORCH_CUDA_ARCH_LIST: native needs a GPU in this machine")
    return "{}.{}".format(*torch.cuda.get_device_capability())


def gencode_flags(archs: Iterable[str]) -> list[str]:
    """nvcc's flags for `archs`."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def pip_cuda_folder() -> Path | None:
    """Where pip's CUDA packages, which torch was installed with, keep headers and libraries."""
    major = torch.version.cuda.split(".")[0]
    folder = Path(torch.__file__).resolve().parents[1] / "nvidia" / f"cu{major}"
    return folder if folder.is_dir() else None


def cuda_options(nvcc: str) -> dict:
    """Arguments of the Extension that the CUDA engine adds; `cxx` and `nvcc` are flags."""
    toolkit, pip_cuda = find_toolkit(nvcc), pip_cuda_folder()
    # torch's own guess is the folder above the first nvcc on PATH, which may be a mere link.
    cpp_extension.CUDA_HOME = str(toolkit.root)
    archs = choose_archs(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), known_archs(nvcc), native_arch)
    print(f"fused_step: kernels for {' '.join(archs)}")
    includes, library_dirs, cudart = [toolkit.include], [toolkit.libraries], "-lcudart"
    if pip_cuda is not None:
        # After the toolkit's: there are the headers of cuBLAS and others that it may lack.
        includes.append(pip_cuda / "include")
        library_dirs.append(pip_cuda / "lib")
        if not (toolkit.libraries / "libcudart.so").exists():
            cudart = f"-l:libcudart.so.{torch.version.cuda.split('.')[0]}"
    return {
        "cxx": [
            "-DFUSED_STEP_WITH_CUDA",
            f'-DFUSED_STEP_CUDA_ARCHS="{" ".join(archs)}"',
            *(f"-isystem{path}" for path in includes),
        ],
        "nvcc": [
            "-std=c++20",
            "-O3",
            "-lineinfo",
            f"--threads={os.environ.get('NVCC_THREADS', '2')}",
            "-Xcompiler=-fvisibility=hidden",
            *gencode_flags(archs),
        ],
        "library_dirs": [str(path) for path in library_dirs],
        "libraries": ["c10_cuda", "torch_cuda"],
        "link": [cudart],
    }


def make_extension() -> Extension:
    """The extension ``fused_step._C``, as FUSED_STEP_CUDA and this machine want it."""
    nvcc = find_nvcc()
    with_cuda, why = decide_cuda(
        os.environ.get("FUSED_STEP_CUDA", "auto"),
        torch_cuda=torch.version.cuda,
        nvcc=nvcc,
        sources=CUDA_SOURCES,
    )
    print(f"fused_step: {'CUDA' if with_cuda else 'CPU'} build: {why}")
    none = {"cxx": [], "nvcc": [], "library_dirs": [], "libraries": [], "link": []}
    cuda = cuda_options(nvcc) if with_cuda else none
    # As system headers torch's own are exempt from -Wall -Wextra. For the host compiler alone:
    # CUDAExtension would give them to nvcc, too, and no kernel may see them.
    system_includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    return Extension(
        name="fused_step._C",
        sources=CPU_SOURCES + (CUDA_BINDINGS + CUDA_SOURCES if with_cuda else []),
        include_dirs=[str(Path(__file__).resolve().parent / "csrc")],
        library_dirs=[*cpp_extension.library_paths(), *cuda["library_dirs"]],
        libraries=["c10", "torch", "torch_cpu", "torch_python", *cuda["libraries"]],
        extra_compile_args={
            "cxx": COMPILE_FLAGS + system_includes + cuda["cxx"],
            "nvcc": cuda["nvcc"],
        },
        extra_link_args=LINK_FLAGS + cuda["link"],
        language="c++",
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
