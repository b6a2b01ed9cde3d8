# SPDX-License-Identifier: MIT
"""How ``fused_step._C`` is compiled: flags, folders, libraries. Needs torch.

Environment:
    FUSED_STEP_CUDA       ``0``: CPU only. ``1``: with CUDA, or fail saying what is missing.
                          ``auto`` (the default): with CUDA where everything for it is there.
    TORCH_CUDA_ARCH_LIST  what the kernels are compiled for, such as ``8.0 9.0+PTX`` or ``native``;
                          by default every architecture from 8.0 on that the toolkit knows.
    NVCC_THREADS          how many architectures one nvcc compiles at once.
    MAX_JOBS              how many compilers run at once; by default as many as processors and
                          memory allow.
    CXX                   the host compiler, by default ``c++``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from setuptools import Extension
from torch.utils import cpp_extension

from . import build_info, compiler, cuda_toolkit, sources

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
LINK_FLAGS = [
    "-fopenmp",
    # Where g++ finds no shared C++ runtime it links its own into the module. Were that one's symbols
    # seen beside those of torch's runtime, each would use parts of the other, and an error message
    # with a number in it crashed.
    "-Wl,--exclude-libs,ALL",
]
# A compiler with torch's headers takes up to 1.2 GiB.
_GIB_PER_JOB = 1.5


@dataclass
class _Engine:
    """What an engine adds to the extension."""

    sources: tuple[str, ...] = ()
    cxx: list[str] = field(default_factory=list)
    nvcc: list[str] = field(default_factory=list)
    library_dirs: list[str] = field(default_factory=list)
    libraries: list[str] = field(default_factory=list)
    link: list[str] = field(default_factory=list)
    cuda: str = "none"
    cuda_archs: list[str] = field(default_factory=list)


class FusedStepExtension(Extension):
    """The extension, and what will be told of its build."""

    info: build_info.BuildInfo


def decide_cuda() -> tuple[str | None, str]:
    """The nvcc to build with, None for a CPU build, and why; see `cuda_toolkit.decide`."""
    nvcc = cuda_toolkit.find_nvcc()
    with_cuda, why = cuda_toolkit.decide(
        os.environ.get("FUSED_STEP_CUDA", "auto"),
        torch_cuda=torch.version.cuda,
        nvcc=nvcc,
        nvcc_cuda=None if nvcc is None else cuda_toolkit.nvcc_version(nvcc),
    )
    return (nvcc if with_cuda else None), why


def make_extension(csrc: Path) -> FusedStepExtension:
    """The extension ``fused_step._C``, as the environment and this machine want it.

    Args:
        csrc: the folder of the sources; relative for setuptools, which takes no other.
    """
    nvcc, why = decide_cuda()
    print(f"fused_step: {'CPU' if nvcc is None else 'CUDA'} build: {why}", flush=True)
    engine = _Engine() if nvcc is None else _cuda_engine(nvcc)
    # As system headers torch's own are exempt from -Wall -Wextra. For the host compiler alone:
    # CUDAExtension would give them to nvcc, too, and no kernel may see them.
    system_includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    extension = FusedStepExtension(
        name="fused_step._C",
        sources=[str(csrc / name) for name in (*sources.CPU_SOURCES, *engine.sources)],
        include_dirs=[str(csrc.resolve())],
        library_dirs=[*cpp_extension.library_paths(), *engine.library_dirs],
        libraries=["c10", "torch", "torch_cpu", "torch_python", *engine.libraries],
        # torch's build takes a list for each compiler, where setuptools has one list for all.
        extra_compile_args={  # type: ignore[arg-type]
            "cxx": COMPILE_FLAGS + system_includes + engine.cxx,
            "nvcc": engine.nvcc,
        },
        extra_link_args=LINK_FLAGS + engine.link,
        language="c++",
    )
    extension.info = build_info.BuildInfo(
        identity=build_info.of_this_process(),
        compiler=compiler.version(),
        flags=COMPILE_FLAGS,
        cuda=engine.cuda,
        cuda_archs=engine.cuda_archs,
    )
    return extension


def jobs() -> int:
    """How many compilers may run at once, by processors and memory."""
    processors = len(os.sched_getaffinity(0))
    return max(1, min(processors, int(_free_gib() / _GIB_PER_JOB)))


def _free_gib() -> float:
    """Memory that this process may still take."""
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
        group = Path("/sys/fs/cgroup")  # a container's limit, "max" where it has none
        limit, used = (
            int((group / f"memory.{name}").read_text()) for name in ("max", "current")
        )
        free.append(limit - used)
    except (OSError, ValueError):
        pass
    return min(free) / 2**30


class BuildExtension(cpp_extension.BuildExtension):
    """torch's, with one folder for object files that stays, and a file of facts beside the module.

    An editable install hands over a fresh temporary folder each time, so that every source would
    be compiled again; in a folder that stays, ninja compiles what changed.
    """

    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_temp = "build/objects"

    def run(self) -> None:
        os.environ.setdefault("MAX_JOBS", str(jobs()))
        (extension,) = self.extensions
        target = Path(self.get_ext_fullpath(extension.name))
        # What is there has no facts from now on: half a build is not to be taken for a whole one.
        (target.parent / build_info.FILE).unlink(missing_ok=True)
        super().run()
        extension.info.write(target.parent)


def _cuda_engine(nvcc: str) -> _Engine:
    toolkit, pip_cuda = cuda_toolkit.find_toolkit(nvcc), _pip_cuda_folder()
    # torch's own guess is the folder above the first nvcc on PATH, which may be a mere link.
    cpp_extension.CUDA_HOME = str(toolkit.root)
    archs = cuda_toolkit.choose_archs(
        os.environ.get("TORCH_CUDA_ARCH_LIST", ""), cuda_toolkit.known_archs(nvcc), _native_arch
    )
    print(f"fused_step: kernels for {' '.join(archs)}", flush=True)
    includes, library_dirs, cudart = [toolkit.include], [toolkit.libraries], "-lcudart"
    if pip_cuda is not None:
        # After the toolkit's: there are the headers of cuBLAS and others that it may lack.
        includes.append(pip_cuda / "include")
        library_dirs.append(pip_cuda / "lib")
        if not (toolkit.libraries / "libcudart.so").exists():
            cudart = f"-l:libcudart.so.{_cuda_major()}"
    return _Engine(
        sources=sources.CUDA_BINDINGS + sources.CUDA_SOURCES,
        cxx=[
            "-DFUSED_STEP_WITH_CUDA",
            f'-DFUSED_STEP_CUDA_ARCHS="{" ".join(archs)}"',
            *(f"-isystem{path}" for path in includes),
        ],
        nvcc=[
            "-std=c++20",
            "-O3",
            "-lineinfo",
            f"--threads={os.environ.get('NVCC_THREADS', '2')}",
            "-Xcompiler=-fvisibility=hidden",
            *cuda_toolkit.gencode_flags(archs),
        ],
        library_dirs=[str(path) for path in library_dirs],
        libraries=["c10_cuda", "torch_cuda"],
        link=[cudart],
        cuda=cuda_toolkit.nvcc_version(nvcc),
        cuda_archs=archs,
    )


def _native_arch() -> str:
    """The GPU of this machine, as TORCH_CUDA_ARCH_LIST names it."""
    if not torch.cuda.is_available():
        raise ValueError("TORCH_CUDA_ARCH_LIST: native needs a GPU in this machine")
    return "{}.{}".format(*torch.cuda.get_device_capability())


def _cuda_major() -> str:
    assert torch.version.cuda is not None
    return torch.version.cuda.split(".")[0]


def _pip_cuda_folder() -> Path | None:
    """Where pip's CUDA packages, which torch was installed with, keep headers and libraries."""
    folder = Path(torch.__file__).resolve().parents[1] / "nvidia" / f"cu{_cuda_major()}"
    return folder if folder.is_dir() else None
