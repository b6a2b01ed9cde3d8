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

    assert set(setup.CPU_SOURCES) == files(".cpp")
    assert set(setup.CUDA_SOURCES) == files(".cu")
