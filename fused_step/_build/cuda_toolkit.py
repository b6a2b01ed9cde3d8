# SPDX-License-Identifier: MIT
"""Whether the compiled module gets the CUDA engine: the toolkit, and the architectures."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

# 8.0 is the first with cp.async and bf16; PTX of the last one serves GPUs to come.
DEFAULT_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def find_nvcc() -> str | None:
    """Path of nvcc: under CUDA_HOME or CUDA_PATH, else on PATH, else in /usr/local/cuda."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        nvcc = Path(named, "bin", "nvcc")
        return str(nvcc) if nvcc.is_file() else None
    default = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(default) if default.is_file() else None)


def nvcc_version(nvcc: str) -> str:
    """Version of the toolkit, such as "13.0"."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    if found is None:
        raise RuntimeError(f"{nvcc} --version names no release: {said!r}")
    return found[1]


def decide(
    setting: str, *, torch_cuda: str | None, nvcc: str | None, nvcc_cuda: str | None
) -> tuple[bool, str]:
    """Whether to build with CUDA, and why.

    Args:
        setting: value of FUSED_STEP_CUDA: "0", "1" or "auto".
        torch_cuda: CUDA version torch was built with, None for a CPU-only torch.
        nvcc: path of the CUDA compiler, None if there is none.
        nvcc_cuda: its CUDA version.

    Raises:
        ValueError: `setting` is none of the three.
        RuntimeError: `setting` is "1" and something is missing; the message names all of it.
    """
    if setting not in ("0", "1", "auto"):
        raise ValueError(f"FUSED_STEP_CUDA: expected 0, 1 or auto, got {setting!r}")
    if setting == "0":
        return False, "FUSED_STEP_CUDA=0"
    missing = []
    if torch_cuda is None:
        missing.append("the installed torch is CPU-only")
    if nvcc is None or nvcc_cuda is None:
        missing.append("nvcc was not found (under CUDA_HOME, on PATH, in /usr/local/cuda)")
    elif torch_cuda is not None and nvcc_cuda.split(".")[0] != torch_cuda.split(".")[0]:
        missing.append(f"torch has CUDA {torch_cuda}, {nvcc} is of another major, {nvcc_cuda}")
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
        if not archs:
            raise ValueError("this CUDA toolkit knows no architecture from 8.0 on")
        return [*archs[:-1], archs[-1] + "+PTX"]
    if wanted == "native":
        wanted = native()
    archs = []
    for name in re.split(r"[ ;,]+", wanted.strip(" ;,")):
        form = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", name)
        if form is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST: expected names like 9.0 or 9.0+PTX, got {name}"
            )
        number = form[1]
        if float(number) < 8.0:
            print(f"fused_step: {name} is left out: the kernels need 8.0 or newer")
        elif number not in known:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: this CUDA toolkit does not know {name}")
        else:
            archs.append(name)
    if not archs:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected 8.0 or newer, got {wanted}")
    return archs


def gencode_flags(archs: Iterable[str]) -> list[str]:
    """nvcc's flags for `archs`."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags
