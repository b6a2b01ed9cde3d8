# SPDX-License-Identifier: MIT
"""setup.py: whether it compiles now or leaves that to the first import."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def setup(monkeypatch):
    """setup.py as a module; it builds nothing when it is imported."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("fused_step_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# As in pip's isolated build: setuptools is there, the environment's own packages are not.
ISOLATED = """
import os, sys
from pathlib import Path
import setuptools
sys.path = [p for p in sys.path if not Path(p, "torch").is_dir()]
import setup
if "nowhere" in sys.argv:
    setup._site_folders = lambda: ["/nowhere"]
print(setup.why_not(sys.argv[1]))
print(sys.path[-1])
"""


def isolated(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Asks setup.py, in such a process, whether it compiles."""
    return subprocess.run(
        [sys.executable, "-c", ISOLATED, *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("setting", ["auto", "require"])
def test_with_torch_and_a_compiler_it_compiles_now(setup, setting):
    assert setup.why_not(setting) is None


def test_never_leaves_it_to_the_first_import(setup):
    assert setup.options("never") == {}


@pytest.mark.parametrize("setting", ["", "1", "AUTO"])
def test_other_settings_are_refused(setup, setting):
    with pytest.raises(ValueError, match="FUSED_STEP_BUILD: expected auto, require or never"):
        setup.why_not(setting)


def test_torch_of_the_environment_is_found_from_an_isolated_build():
    why_not, last_on_path = isolated("require").stdout.splitlines()
    assert why_not == "None"
    assert last_on_path == str(Path(torch.__file__).parents[1])


def test_without_any_torch_the_sources_are_installed():
    why_not, _ = isolated("auto", "nowhere").stdout.splitlines()
    assert why_not == "torch cannot be imported (No module named 'torch')"


def test_without_any_torch_require_fails_and_says_why():
    message = isolated("require", "nowhere").stderr.splitlines()[-1]
    assert "FUSED_STEP_BUILD=require: cannot compile: torch cannot be imported" in message


def test_a_torch_that_is_too_old_is_not_compiled_for(setup, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    assert setup.why_not("auto") == "torch is 2.10.1+cu128, older than 2.11"


def test_without_a_compiler_the_sources_are_installed(setup, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert setup.why_not("auto") == "there is no C++ compiler (/nowhere/c++)"


def test_oldest_torch_is_that_of_the_metadata(setup):
    metadata = (ROOT / "pyproject.toml").read_text()
    assert f'"torch>={".".join(map(str, setup.OLDEST_TORCH))}"' in metadata


def test_sdist_has_what_a_build_needs_and_no_part_of_the_tests(tmp_path):
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "FUSED_STEP_BUILD": "never"}, check=True,
    )  # fmt: skip
    files = (tmp_path / "fused_step.egg-info/SOURCES.txt").read_text().splitlines()
    folders = {file.split("/")[0] for file in files if "/" in file}
    assert {"csrc", "fused_step"} <= folders
    assert "tests" not in folders
    assert {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "setup.py"} <= set(files)


def test_failing_compiler_leaves_it_to_the_first_import_unless_required(
    setup, monkeypatch, tmp_path, capfd
):
    from setuptools import Distribution

    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\ncase $1 in --version) echo some 1.0;; *) exit 1;; esac\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("FUSED_STEP_CUDA", "0")
    monkeypatch.setenv("TORCH_DONT_CHECK_COMPILER_ABI", "1")
    monkeypatch.chdir(ROOT)

    def build(setting: str) -> None:
        options = setup.options(setting)
        distribution = Distribution({"name": "fused_step", "ext_modules": options["ext_modules"]})
        command = options["cmdclass"]["build_ext"](distribution)
        command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "objects")
        command.ensure_finalized()
        command.run()

    with pytest.raises(RuntimeError):
        build("require")
    build("auto")
    assert "not compiled; the first import will try again" in capfd.readouterr().out
    assert not list((tmp_path / "lib").rglob("_build_info.json"))
