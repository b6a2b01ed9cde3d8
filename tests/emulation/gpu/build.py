# SPDX-License-Identifier: MIT
"""Builds the extension for GPUs that the processor emulates.

Usage: python tests/emulation/gpu/build.py --inplace, in a copy of the sources in build/<name>/.

For a torch without CUDA, by the host compiler alone: the CUDA engine's bindings and kernels and the
emulated devices are added to the CPU build's own objects, which lie in build/objects/.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from pathlib import Path

from setuptools import setup
from torch.utils import cpp_extension

sys.path.append(str(Path("fused_step").resolve()))

from _build import recipe, sources

HERE = Path("tests/emulation/gpu")
OBJECTS = Path("../objects/csrc")
KERNELS = Path("build/emulated-kernels")
MACRO = "FUSED_STEP_WITH_CUDA"
ARCHS = ["9.0"]
FLAGS = [
    f"-D{MACRO}",
    f'-DFUSED_STEP_CUDA_ARCHS="{" ".join(ARCHS)}"',
    "-Wno-unknown-pragmas",  # nvcc's
    # Fused multiply-adds, as nvcc makes them.
    "-mfma",
    "-fexpensive-optimizations",
]
# In front of csrc/, and of torch's and the toolkit's headers.
INCLUDES = [HERE, HERE / "include", HERE.parent / "include", HERE.parent]


def differs_with_cuda(path: Path) -> bool:
    """Whether a source, or what it includes of csrc/, is another one in a build with CUDA."""
    text = path.read_text()
    included = re.findall(r'#include "(.*)"', text)
    return MACRO in text or any(differs_with_cuda(Path("csrc") / name) for name in included)


def kernels() -> list[str]:
    """A C++ source for each file of kernels: setuptools gives the files themselves to nvcc."""
    KERNELS.mkdir(parents=True, exist_ok=True)
    made = []
    for name in sources.CUDA_SOURCES:
        path = KERNELS / Path(name).with_suffix(".cpp").name
        text = f'#include "{name}"\n'
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        made.append(str(path))
    return made


def main() -> None:
    os.environ["FUSED_STEP_CUDA"] = "0"
    csrc = Path("csrc")
    extension = recipe.make_extension(csrc)
    own = [name for name in sources.CPU_SOURCES if differs_with_cuda(csrc / name)]
    shared = [name for name in sources.CPU_SOURCES if name not in own]
    extension.sources = [
        *(str(csrc / name) for name in (*own, *sources.CUDA_BINDINGS)),
        *kernels(),
        *map(str, sorted(HERE.glob("*.cpp"))),
        str(HERE.parent / "runtime.cpp"),
    ]
    extension.extra_objects = [str(OBJECTS / Path(name).with_suffix(".o")) for name in shared]
    extension.include_dirs[:0] = [str(path.resolve()) for path in INCLUDES]
    # It is loaded before torch.
    extension.runtime_library_dirs = cpp_extension.library_paths()
    flags = extension.extra_compile_args["cxx"]  # type: ignore[call-overload]
    flags[:] = [*FLAGS, *("-O1" if flag == "-O3" else flag for flag in flags)]
    extension.info = dataclasses.replace(extension.info, cuda="emulated", cuda_archs=ARCHS)
    setup(
        name="fused_step",
        script_args=["--quiet", "build_ext", *sys.argv[1:]],
        ext_modules=[extension],
        cmdclass={"build_ext": recipe.BuildExtension},
    )


if __name__ == "__main__":
    main()
