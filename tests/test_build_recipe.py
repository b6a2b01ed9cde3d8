# SPDX-License-Identifier: MIT
"""How the module is compiled: with CUDA or without, which sources, which architectures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fused_step._build import compiler, cuda_toolkit, recipe, sources

ROOT = Path(__file__).resolve().parents[1]


COMPLETE = {"torch_cuda": "13.0", "nvcc": "/opt/cuda/bin/nvcc", "nvcc_cuda": "13.1"}
# What may be missing, and the words that name it.
MISSING = {
    "CPU-only": {"torch_cuda": None},
    "nvcc was not found": {"nvcc": None, "nvcc_cuda": None},
    "of another major, 12.9": {"nvcc_cuda": "12.9"},
}


@pytest.mark.parametrize("setting", ["1", "auto"])
def test_complete_machine_builds_with_cuda(setting):
    with_cuda, why = cuda_toolkit.decide(setting, **COMPLETE)
    assert with_cuda
    assert "13.0" in why
    assert "/opt/cuda/bin/nvcc" in why


def test_zero_builds_for_cpu_on_a_complete_machine():
    assert cuda_toolkit.decide("0", **COMPLETE) == (False, "FUSED_STEP_CUDA=0")


@pytest.mark.parametrize("words", MISSING)
def test_auto_builds_for_cpu_and_says_what_is_missing(words):
    with_cuda, why = cuda_toolkit.decide("auto", **COMPLETE | MISSING[words])
    assert not with_cuda
    assert words in why
    assert [other for other in MISSING if other in why] == [words]


@pytest.mark.parametrize("words", MISSING)
def test_one_fails_and_says_what_is_missing(words):
    with pytest.raises(RuntimeError, match=f"FUSED_STEP_CUDA=1: .*{words}"):
        cuda_toolkit.decide("1", **COMPLETE | MISSING[words])


def test_one_names_everything_that_is_missing_at_once():
    with pytest.raises(RuntimeError) as error:
        cuda_toolkit.decide("1", torch_cuda=None, nvcc=None, nvcc_cuda=None)
    assert "CPU-only" in str(error.value)
    assert "nvcc was not found" in str(error.value)


@pytest.mark.parametrize("setting", ["", "yes", "2", "AUTO"])
def test_other_settings_are_refused(setting):
    with pytest.raises(ValueError, match="expected 0, 1 or auto"):
        cuda_toolkit.decide(setting, **COMPLETE)


def test_environment_reaches_the_decision(monkeypatch, capsys):
    monkeypatch.setenv("FUSED_STEP_CUDA", "0")
    extension = recipe.make_extension(Path("csrc"))
    assert extension.name == "fused_step._C"
    assert extension.sources == [f"csrc/{name}" for name in sources.CPU_SOURCES]
    assert extension.info.cuda == "none"
    assert capsys.readouterr().out == "fused_step: CPU build: FUSED_STEP_CUDA=0\n"

    monkeypatch.setenv("FUSED_STEP_CUDA", "perhaps")
    with pytest.raises(ValueError, match="perhaps"):
        recipe.make_extension(Path("csrc"))


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_nvcc_of_the_toolkit_that_is_named_comes_first(monkeypatch, tmp_path, name):
    on_path, in_toolkit = tmp_path / "path" / "nvcc", tmp_path / "cuda" / "bin" / "nvcc"
    for nvcc in (on_path, in_toolkit):
        nvcc.parent.mkdir(parents=True)
        nvcc.touch(mode=0o755)
    for other in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert cuda_toolkit.find_nvcc() == str(on_path)
    monkeypatch.setenv(name, str(tmp_path / "cuda"))
    assert cuda_toolkit.find_nvcc() == str(in_toolkit)
    monkeypatch.setenv(name, str(tmp_path))
    assert cuda_toolkit.find_nvcc() is None


def test_every_source_is_listed():
    def files(suffix: str, *folders: str) -> set[str]:
        csrc = ROOT / "csrc"
        return {str(p.relative_to(csrc)) for f in folders for p in (csrc / f).rglob(f"*{suffix}")}

    # Those of bindings/ are in the units.
    assert set(sources.CPU_SOURCES) | set(sources.CUDA_BINDINGS) == files(".cpp", "cpu", "units")
    assert set(sources.CUDA_SOURCES) == files(".cu", "cuda")


def pins(name: str) -> dict[str, str]:
    """What a file of requirements/ pins, itself and what it includes."""
    found = {}
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            found |= pins(line.removeprefix("-r ").strip())
        elif line:
            package, version = line.split("==")
            found[package] = version
    return found


def test_environment_of_the_cuda_build_differs_in_torch_alone():
    cuda, cpu = pins("cuda.txt"), pins("test.txt")
    assert cuda.keys() == cpu.keys()
    assert [package for package in cuda if cuda[package] != cpu[package]] == ["torch"]


# --- architectures ------------------------------------------------------------------------------

KNOWN = ("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "12.0")


def archs(wanted: str, known=KNOWN, native: str = "9.0") -> list[str]:
    return cuda_toolkit.choose_archs(wanted, known, lambda: native)


def test_default_is_every_architecture_and_ptx_of_the_last():
    assert archs("") == ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]


def test_default_leaves_out_what_the_toolkit_does_not_know():
    assert archs("", known=("8.0", "8.6", "8.9", "9.0")) == ["8.0", "8.6", "8.9", "9.0+PTX"]


@pytest.mark.parametrize("wanted", ["8.6;9.0+PTX", "8.6 9.0+PTX", " 8.6, 9.0+PTX;"])
def test_list_of_architectures_is_honoured(wanted):
    assert archs(wanted) == ["8.6", "9.0+PTX"]


def test_native_is_the_gpu_of_this_machine():
    assert archs("native", native="8.9") == ["8.9"]


def test_architectures_too_old_for_the_kernels_are_left_out_and_named(capsys):
    assert archs("7.5 8.0") == ["8.0"]
    assert "7.5 is left out: the kernels need 8.0 or newer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("9", "expected names like 9.0"),
        ("Hopper", "expected names like 9.0 or 9.0\\+PTX, got Hopper"),
        ("8.0 13.0", "does not know 13.0"),
        ("7.5", "expected 8.0 or newer, got 7.5"),
    ],
)
def test_wrong_architecture_is_refused_by_name(wanted, message):
    with pytest.raises(ValueError, match=message):
        archs(wanted)


def test_flags_compile_machine_code_for_each_and_ptx_where_asked_for():
    assert cuda_toolkit.gencode_flags(["8.0", "9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


# --- the toolkit --------------------------------------------------------------------------------

NVCC = """#!/bin/sh
case $1 in
--version) echo 'Cuda compilation tools, release 13.0, V13.0.48' ;;
--list-gpu-code) printf 'sm_80\\nsm_90\\nsm_120\\n' ;;
--dryrun) printf '#$ _TARGET_DIR_=\\n#$ _TARGET_DIR_=targets/some\\n#$ TOP={top}/bin/..\\n' >&2 ;;
esac
"""


@pytest.fixture
def nvcc(tmp_path) -> Path:
    """A script that starts an nvcc elsewhere, as a link on PATH may be."""
    (tmp_path / "toolkit" / "bin").mkdir(parents=True)
    (tmp_path / "toolkit" / "targets" / "some" / "lib").mkdir(parents=True)
    script = tmp_path / "nvcc"
    script.write_text(NVCC.format(top=tmp_path / "toolkit"))
    script.chmod(0o755)
    return script


def test_toolkit_is_found_where_nvcc_says_it_is(nvcc, tmp_path):
    toolkit = cuda_toolkit.find_toolkit(str(nvcc))
    assert toolkit.root == tmp_path / "toolkit"
    assert toolkit.include == tmp_path / "toolkit" / "targets" / "some" / "include"
    assert toolkit.libraries == tmp_path / "toolkit" / "targets" / "some" / "lib"
    assert cuda_toolkit.known_archs(str(nvcc)) == ["8.0", "9.0", "12.0"]


def test_kernels_see_no_header_of_torch(nvcc, monkeypatch):
    monkeypatch.setenv("FUSED_STEP_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setattr(recipe.torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda_toolkit, "find_nvcc", lambda: str(nvcc))
    monkeypatch.setattr(recipe.cpp_extension, "CUDA_HOME", None)
    extension = recipe.make_extension(Path("csrc"))
    assert extension.include_dirs == [str(ROOT / "csrc")]
    assert not [flag for flag in extension.extra_compile_args["nvcc"] if "torch" in flag]
    assert [flag for flag in extension.extra_compile_args["cxx"] if "torch/include" in flag]
    assert extension.sources[-1] == f"csrc/{sources.CUDA_SOURCES[-1]}"
    assert "-DFUSED_STEP_WITH_CUDA" in extension.extra_compile_args["cxx"]
    assert extension.info.cuda == "13.0"
    assert extension.info.cuda_archs == ["9.0"]


# --- the host compiler --------------------------------------------------------------------------


def test_compiler_may_be_a_command_of_several_words(monkeypatch):
    monkeypatch.setenv("CXX", "env c++")
    assert compiler.command() == ["env", "c++"]
    assert "c++" in compiler.version()


@pytest.mark.parametrize(
    ("processors", "gib", "jobs"),
    [(8, 100.0, 8), (8, 4.6, 3), (1, 64.0, 1), (4, 0.1, 1), (4, -1, 1)],
)
def test_compilers_run_at_once_as_processors_and_memory_allow(monkeypatch, processors, gib, jobs):
    monkeypatch.setattr(recipe.os, "sched_getaffinity", lambda _: set(range(processors)))
    monkeypatch.setattr(recipe, "_free_gib", lambda: gib)
    assert recipe.jobs() == jobs


# How error messages are made: a number goes through what the C++ runtime keeps for each locale.
PRINTS_A_NUMBER = """
#include <sstream>
#include <string>
extern "C" __attribute__((visibility("default"))) const char* printed(long n) {
  static std::string text;
  std::ostringstream out;
  out << '[' << n << ']';
  text = out.str();
  return text.c_str();
}
"""


def test_cpp_runtime_linked_into_the_module_keeps_to_itself(tmp_path):
    (tmp_path / "prints.cpp").write_text(PRINTS_A_NUMBER)
    library = tmp_path / "prints.so"
    build = [*compiler.command(), *recipe.COMPILE_FLAGS, "-fPIC", "-shared", "-static-libstdc++"]
    build += [str(tmp_path / "prints.cpp"), "-o", str(library), *recipe.LINK_FLAGS]
    subprocess.run(build, check=True)
    # torch first: its runtime is there when the module comes.
    code = f"""
import ctypes, torch
printed = ctypes.CDLL({str(library)!r}).printed
printed.argtypes, printed.restype = [ctypes.c_long], ctypes.c_char_p
assert printed(5) == b"[5]", printed(5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_free_memory_is_no_more_than_the_machine_has():
    assert 0 < recipe._free_gib() < 2**20
