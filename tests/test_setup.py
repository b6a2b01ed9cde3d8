# SPDX-License-Identifier: MIT
"""What setup.py decides: with CUDA or without, and which sources."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup():
    """setup.py as a module; it builds nothing when it is imported."""
    spec = importlib.util.spec_from_file_location("fused_step_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMPLETE = {"torch_cuda": "13.0", "nvcc": "/opt/cuda/bin/nvcc", "sources": ["csrc/cuda/sgd.cu"]}
# What may be missing, and the words that name it.
MISSING = {
    "CPU-only": {"torch_cuda": None},
    "nvcc was not found": {"nvcc": None},
    "no CUDA sources": {"sources": []},
}


@pytest.mark.parametrize("setting", ["1", "auto"])
def test_complete_machine_builds_with_cuda(setup, setting):
    with_cuda, why = setup.decide_cuda(setting, **COMPLETE)
    assert with_cuda
    assert "13.0" in why
    assert "/opt/cuda/bin/nvcc" in why


def test_zero_builds_for_cpu_on_a_complete_machine(setup):
    assert setup.decide_cuda("0", **COMPLETE) == (False, "FUSED_STEP_CUDA=0")


@pytest.mark.parametrize("words", MISSING)
def test_auto_builds_for_cpu_and_says_what_is_missing(setup, words):
    with_cuda, why = setup.decide_cuda("auto", **COMPLETE | MISSING[words])
    assert not with_cuda
    assert words in why
    assert [other for other in MISSING if other in why] == [words]


@pytest.mark.parametrize("words", MISSING)
def test_one_fails_and_says_what_is_missing(setup, words):
    with pytest.raises(RuntimeError, match=f"FUSED_STEP_CUDA=1: .*{words}"):
        setup.decide_cuda("1", **COMPLETE | MISSING[words])


def test_one_names_everything_that_is_missing_at_once(setup):
    with pytest.raises(RuntimeError) as error:
        setup.decide_cuda("1", torch_cuda=None, nvcc=None, sources=[])
    assert [words for words in MISSING if words not in str(error.value)] == []


@pytest.mark.parametrize("setting", ["", "yes", "2", "AUTO"])
def test_other_settings_are_refused(setup, setting):
    with pytest.raises(ValueError, match="expected 0, 1 or auto"):
        setup.decide_cuda(setting, **COMPLETE)


def test_environment_reaches_the_decision(setup, monkeypatch, capsys):
    monkeypatch.setenv("FUSED_STEP_CUDA", "0")
    extension = setup.make_extension()
    assert extension.name == "fused_step._C"
    assert extension.sources == setup.CPU_SOURCES
    assert capsys.readouterr().out == "fused_step: CPU build: FUSED_STEP_CUDA=0\n"

    monkeypatch.setenv("FUSED_STEP_CUDA", "perhaps")
    with pytest.raises(ValueError, match="perhaps"):
        setup.make_extension()


def test_nvcc_of_the_toolkit_torch_found_comes_first(setup, monkeypatch, tmp_path):
    on_path, in_toolkit = tmp_path / "path" / "nvcc", tmp_path / "cuda" / "bin" / "nvcc"
    for nvcc in (on_path, in_toolkit):
        nvcc.parent.mkdir(parents=True)
        nvcc.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(on_path.parent))
    monkeypatch.setattr(setup.cpp_extension, "CUDA_HOME", None)
    assert setup.find_nvcc() == str(on_path)
    monkeypatch.setattr(setup.cpp_extension, "CUDA_HOME", str(tmp_path / "cuda"))
    assert setup.find_nvcc() == str(in_toolkit)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(setup.cpp_extension, "CUDA_HOME", str(tmp_path))
    assert setup.find_nvcc() is None


def test_every_source_is_listed(setup):
    def files(suffix: str) -> set[str]:
        return {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob(f"*{suffix}")}

    assert set(setup.CPU_SOURCES) | set(setup.CUDA_BINDINGS) == files(".cpp")
    assert set(setup.CUDA_SOURCES) == files(".cu")


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


def archs(setup, wanted: str, known=KNOWN, native: str = "9.0") -> list[str]:
    return setup.choose_archs(wanted, known, lambda: native)


def test_default_is_every_architecture_and_ptx_of_the_last(setup):
    assert archs(setup, "") == ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]


def test_default_leaves_out_what_the_toolkit_does_not_know(setup):
    assert archs(setup, "", known=("8.0", "8.6", "8.9", "9.0")) == ["8.0", "8.6", "8.9", "9.0+PTX"]


@pytest.mark.parametrize("wanted", ["8.6;9.0+PTX", "8.6 9.0+PTX", " 8.6, 9.0+PTX;"])
def test_list_of_architectures_is_honoured(setup, wanted):
    assert archs(setup, wanted) == ["8.6", "9.0+PTX"]


def test_native_is_the_gpu_of_this_machine(setup):
    assert archs(setup, "native", native="8.9") == ["8.9"]


def test_architectures_too_old_for_the_kernels_are_left_out_and_named(setup, capsys):
    assert archs(setup, "7.5 8.0") == ["8.0"]
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
def test_wrong_architecture_is_refused_by_name(setup, wanted, message):
    with pytest.raises(ValueError, match=message):
        archs(setup, wanted)


def test_flags_compile_machine_code_for_each_and_ptx_where_asked_for(setup):
    assert setup.gencode_flags(["8.0", "9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


# --- the toolkit --------------------------------------------------------------------------------

NVCC = """#!/bin/sh
case $1 in
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


def test_toolkit_is_found_where_nvcc_says_it_is(setup, nvcc, tmp_path):
    toolkit = setup.find_toolkit(str(nvcc))
    assert toolkit.root == tmp_path / "toolkit"
    assert toolkit.include == tmp_path / "toolkit" / "targets" / "some" / "include"
    assert toolkit.libraries == tmp_path / "toolkit" / "targets" / "some" / "lib"
    assert setup.known_archs(str(nvcc)) == ["8.0", "9.0", "12.0"]


def test_kernels_see_no_header_of_torch(setup, nvcc, monkeypatch):
    monkeypatch.setenv("FUSED_STEP_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setattr(setup, "CUDA_SOURCES", ["csrc/cuda/some.cu"])
    monkeypatch.setattr(setup.torch.version, "cuda", "13.0")
    monkeypatch.setattr(setup, "find_nvcc", lambda: str(nvcc))
    monkeypatch.setattr(setup.cpp_extension, "CUDA_HOME", None)
    extension = setup.make_extension()
    assert extension.include_dirs == [str(ROOT / "csrc")]
    assert not [flag for flag in extension.extra_compile_args["nvcc"] if "torch" in flag]
    assert [flag for flag in extension.extra_compile_args["cxx"] if "torch/include" in flag]
    assert extension.sources[-1] == "csrc/cuda/some.cu"
    assert "-DFUSED_STEP_WITH_CUDA" in extension.extra_compile_args["cxx"]
