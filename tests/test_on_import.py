# SPDX-License-Identifier: MIT
"""The first import: the module that fits is found or compiled, whatever the machine is like.

Each test runs a copy of the package in processes of its own. In place of the compilers there is a
worker that puts the module of this build in its place; `make package-check` compiles for real.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import fused_step
from fused_step._build import build_info, cache, on_import

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(fused_step.__file__).parent

WORKER = """
import os, shutil, sys, time
from pathlib import Path
with open({log!r}, "a") as log:
    log.write("run ")
while {hold!r} and Path({hold!r}).exists():
    time.sleep(0.02)
print("[1/1] c++ module.cpp", flush=True)
if {error!r}:
    sys.exit({error!r})
folder = Path(sys.argv[1], "fused_step")
folder.mkdir()
shutil.copy({module!r}, folder)
shutil.copy({info!r}, folder)
"""
# One step by a fused plan, where there is one.
STEP = """
import torch, fused_step
model = torch.nn.Linear(2, 1)
step = fused_step.TrainStep(
    model, torch.nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1)
)
step(torch.ones(3, 2), torch.ones(3, 1))
print(step.plan)
"""


class Install:
    """A copy of the package with no module compiled, and a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / "site" / "fused_step"
        self.cache = folder / "cache"
        self.log = folder / "worker.log"
        shutil.copytree(
            PACKAGE, self.package, ignore=shutil.ignore_patterns("*.so", "*.json", "__pycache__")
        )
        (self.package / "csrc").symlink_to(ROOT / "csrc")
        self.library, _ = on_import.find()
        self.worker()

    def worker(self, *, hold: Path | None = None, error: str = "") -> None:
        """What compiling is: a file that holds it up, and the words it fails with."""
        if hold is not None:
            hold.touch()
        text = WORKER.format(
            log=str(self.log),
            hold=str(hold or ""),
            error=error,
            module=str(self.library.path),
            info=str(self.library.path.with_name(build_info.FILE)),
        )
        (self.package / "_build" / "worker.py").write_text(text)

    def with_module(self, **changes: str) -> None:
        """As installed with a module that was built for something else."""
        shutil.copy(self.library.path, self.package)
        info = json.loads(self.library.path.with_name(build_info.FILE).read_text())
        info["identity"] |= changes
        (self.package / build_info.FILE).write_text(json.dumps(info))

    def start(
        self, *arguments: str, by: tuple[str, ...] = (), **environment: str
    ) -> subprocess.Popen[str]:
        """Python with these arguments, started by a command of another kind if one is given."""
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith("FUSED_STEP_")
        }
        return subprocess.Popen(
            [*by, sys.executable, *arguments],
            cwd=self.folder,
            env=inherited
            | {"PYTHONPATH": str(self.package.parent), "FUSED_STEP_CACHE": str(self.cache)}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        """Exit status, output and errors of Python with these arguments."""
        process = self.start(*arguments, **environment)
        output, errors = process.communicate(timeout=20)
        return process.returncode, output, errors

    def runs_of_the_worker(self) -> int:
        return len(self.log.read_text().split()) if self.log.exists() else 0

    def wait_for_the_worker(self, runs: int = 1) -> None:
        deadline = time.monotonic() + 60
        while self.runs_of_the_worker() < runs:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def builds(self) -> list[str]:
        """The names in the cache, without locks."""
        return sorted(p.name for p in self.cache.glob("*") if p.suffix != ".lock")


@pytest.fixture
def install(tmp_path) -> Install:
    return Install(tmp_path)


def test_first_import_compiles_once_and_later_ones_load_that(install):
    status, output, errors = install.run("-W", "error", "-c", STEP)
    assert (status, output) == (0, "one-pass\n")
    first, last = errors.splitlines()
    assert first.startswith("fused_step: none was compiled when it was installed; compiling it")
    assert last.startswith(f"fused_step: compiled, in {install.cache}/")
    assert install.cache.stat().st_mode & 0o777 == 0o700
    (name,) = install.builds()
    assert (install.cache / name).stat().st_mode & 0o777 == 0o700

    assert install.run("-W", "error", "-c", STEP) == (0, "one-pass\n", "")
    assert install.runs_of_the_worker() == 1


def test_module_of_another_torch_is_not_loaded_but_compiled_anew(install):
    install.with_module(torch="1.13.0+cu117")
    (module,) = install.package.glob("*.so")
    module.write_bytes(b"loading this would fail")
    status, output, errors = install.run("-c", STEP)
    assert (status, output) == (0, "one-pass\n")
    assert "the installed one does not fit: built for torch 1.13.0+cu117, not " in errors
    assert install.runs_of_the_worker() == 1


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("torch", "1.13.0", "built for torch 1.13.0, not "),
        ("torch_git", "0" * 40, "torch git differ"),
        ("torch_cuda", "12.8", "built for torch cuda 12.8, not "),
        ("python", "cpython-310-x86_64-linux-gnu", "built for python cpython-310-x86_64"),
        ("sources", "0" * 64, "sources differ"),
    ],
)
def test_each_part_of_an_identity_counts_and_is_named(field, value, words):
    here = build_info.of_this_process()
    assert here.differences(here) == []
    (difference,) = replace(here, **{field: value}).differences(here)
    assert difference.startswith(words)


def test_module_without_its_facts_is_not_loaded(install):
    install.with_module()
    (install.package / build_info.FILE).unlink()
    status, output, errors = install.run("-c", STEP)
    assert (status, output) == (0, "one-pass\n")
    assert "nothing says what _C." in errors


def test_module_that_fits_is_loaded_where_it_was_installed(install):
    install.with_module()
    assert install.run("-W", "error", "-c", STEP) == (0, "one-pass\n", "")
    assert install.runs_of_the_worker() == 0


def test_two_first_imports_at_once_compile_once(install):
    hold = install.folder / "hold"
    install.worker(hold=hold)
    first = install.start("-c", STEP)
    install.wait_for_the_worker()
    second = install.start("-c", STEP)
    assert second.stderr.readline() == "fused_step: another process compiles it; waiting\n"
    hold.unlink()
    (_, errors), (output, errors_of_second) = first.communicate(), second.communicate()
    assert "compiled, in" in errors
    assert (output, errors_of_second) == ("one-pass\n", "")
    assert install.runs_of_the_worker() == 1


def test_killed_build_does_not_hinder_the_next(install):
    install.worker(hold=install.folder / "hold")
    killed = install.start("-c", STEP)
    install.wait_for_the_worker()
    killed.kill()
    killed.communicate()
    (install.folder / "hold").unlink()  # or what it has started would wait for ever
    assert any(name.endswith(".tmp") for name in install.builds())

    install.worker()
    status, output, _ = install.run("-c", STEP)
    assert (status, output) == (0, "one-pass\n")
    assert len(install.builds()) == 1
    assert install.runs_of_the_worker() == 2


def test_interrupt_ends_the_compilers_and_leaves_nothing(install):
    install.worker(hold=install.folder / "hold")
    # In the background of a script without job control a process starts with the signal ignored.
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    process = install.start("-c", heeds + STEP)
    install.wait_for_the_worker()
    (worker,) = children(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
    assert not Path(f"/proc/{worker}").exists()
    assert install.builds() == []


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def test_failed_build_is_not_tried_at_every_import_but_by_the_command(install):
    install.worker(error="module.cpp:1: error: no such thing")
    status, output, errors = install.run("-c", STEP)
    assert (status, output) == (0, "plain\n")
    assert "compiling it failed: module.cpp:1: error: no such thing" in errors

    status, output, errors = install.run("-c", STEP)
    assert (status, output) == (0, "plain\n")
    assert "compiling failed before: module.cpp:1: error: no such thing" in errors
    assert "`python -m fused_step build` tries again" in errors
    assert install.runs_of_the_worker() == 1

    status, _, errors = install.run("-m", "fused_step", "build")
    assert status == 1
    assert "no such thing" in errors
    assert install.runs_of_the_worker() == 2

    install.worker()
    status, output, _ = install.run("-m", "fused_step", "build")
    (name,) = install.builds()
    assert (status, output) == (0, f"{install.cache / name / install.library.path.name}\n")
    assert install.run("-W", "error", "-c", STEP) == (0, "one-pass\n", "")


def test_without_a_compiler_it_warns_once_and_works_by_pytorch(install):
    code = STEP + "import fused_step.functional\nprint(step.explain(torch.ones(3, 2), 0))"
    status, output, errors = install.run("-c", code, CXX="/nowhere/c++")
    assert status == 0
    assert output.splitlines()[:2] == ["plain", "plan: plain"]
    assert "there is no compiled module: none was compiled when it was installed" in output
    assert errors.count("RuntimeWarning: fused_step runs without its compiled module") == 1
    assert "there is no C++ compiler (/nowhere/c++)" in errors
    assert install.runs_of_the_worker() == 0


@pytest.mark.parametrize("how", [{"CXX": "/nowhere/c++"}, {"FUSED_STEP_BUILD": "never"}])
def test_without_a_module_it_fails_where_one_is_required(install, how):
    status, _, errors = install.run("-c", STEP, FUSED_STEP_REQUIRE_EXT="1", **how)
    assert status == 1
    assert errors.splitlines()[-1].startswith("ImportError: fused_step: no compiled module: none")
    assert install.runs_of_the_worker() == 0


def test_never_compiles_nothing(install):
    status, output, errors = install.run("-c", STEP, FUSED_STEP_BUILD="never")
    assert (status, output) == (0, "plain\n")
    assert "FUSED_STEP_BUILD is never" in errors
    assert install.runs_of_the_worker() == 0


def test_home_that_cannot_be_written_leaves_the_temporary_folder(install):
    # Not by permissions, which root passes by: a folder in /proc cannot be made by anybody.
    temporary = install.folder / "tmp"
    temporary.mkdir()
    elsewhere = {
        "FUSED_STEP_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/proc", "TMPDIR": str(temporary)
    }  # fmt: skip
    for errors_expected in (2, 0):
        status, output, errors = install.run("-c", STEP, **elsewhere)
        assert (status, output) == (0, "one-pass\n")
        assert len(errors.splitlines()) == errors_expected
    (root,) = temporary.glob("fused_step-*")
    assert root.stat().st_mode & 0o777 == 0o700


def test_nowhere_to_write_leaves_pytorch_and_names_the_folder(install):
    status, output, errors = install.run("-c", STEP, FUSED_STEP_CACHE="/proc/cache")
    assert (status, output) == (0, "plain\n")
    assert "no folder for compiled modules can be written: /proc/cache: " in errors


def test_full_disk_leaves_pytorch_and_says_so(install):
    try:
        subprocess.run(["unshare", "--mount", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no mount namespace can be made here: {error}")
    # A file system of 64 KiB, in a mount namespace that ends with the process.
    install.cache.mkdir()
    mount = 'mount -t tmpfs -o size=64k,mode=700 none "$FUSED_STEP_CACHE" && exec "$@"'
    process = install.start("-c", STEP, by=("unshare", "--mount", "sh", "-c", mount, "sh"))
    output, errors = process.communicate()
    assert (process.returncode, output) == (0, "plain\n")
    assert "No space left on device" in errors


def test_cache_that_others_can_write_is_not_loaded_from(install):
    install.run("-c", STEP)
    (name,) = install.builds()
    (install.cache / name).chmod(0o777)
    status, _, errors = install.run("-c", STEP, FUSED_STEP_BUILD="never")
    assert status == 0
    assert "RuntimeWarning" in errors


def test_info_compiles_nothing_and_says_why_there_is_no_module(install):
    status, output, errors = install.run("-m", "fused_step", "info")
    assert (status, errors) == (0, "")
    assert "none: none was compiled when it was installed" in output
    assert str(install.cache) in output
    assert install.runs_of_the_worker() == 0


def test_clear_removes_builds_and_nothing_else(install):
    install.run("-c", STEP)
    (install.cache / "letters.txt").write_text("of somebody")
    (name,) = (name for name in install.builds() if name != "letters.txt")
    assert install.run("-m", "fused_step", "cache") == (0, f"{install.cache}\n", "")
    status, output, _ = install.run("-m", "fused_step", "cache", "--clear")
    assert status == 0
    assert f"removed {install.cache / name}" in output.splitlines()
    assert [path.name for path in install.cache.iterdir()] == ["letters.txt"]
    status, output, _ = install.run("-m", "fused_step", "cache", "--clear")
    assert (status, output) == (0, "nothing to remove\n")


def test_clear_leaves_a_build_that_is_being_made(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_STEP_CACHE", str(tmp_path))
    tmp_path.chmod(0o700)
    name = cache.key(build_info.of_this_process(), with_cuda=False)
    with cache.locked(tmp_path, name, pytest.fail):
        (tmp_path / f"{name}.some.tmp").mkdir()
        assert cache.clear() == []
    assert (tmp_path / f"{name}.some.tmp").is_dir()
    assert len(cache.clear()) == 2


@pytest.mark.parametrize("name", ["CXX", "TORCH_CUDA_ARCH_LIST"])
def test_setting_that_changes_the_build_changes_its_key(monkeypatch, name):
    identity = build_info.of_this_process()
    monkeypatch.delenv(name, raising=False)
    before = cache.key(identity, with_cuda=False)
    monkeypatch.setenv(name, "9.0")
    assert cache.key(identity, with_cuda=False) != before
    assert cache.key(identity, with_cuda=True) != cache.key(identity, with_cuda=False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FUSED_STEP_CACHE": "/some/where", "XDG_CACHE_HOME": "/x"}, ["/some/where"]),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, ["/x/fused_step", "/t/fused_step-7"]),
        ({"HOME": "/h"}, ["/h/.cache/fused_step", "/t/fused_step-7"]),
        # A relative one is to be ignored, by the XDG specification.
        ({"XDG_CACHE_HOME": "x", "HOME": "/h"}, ["/h/.cache/fused_step", "/t/fused_step-7"]),
    ],
)
def test_cache_is_where_the_environment_says(monkeypatch, environment, expected):
    for name in ("FUSED_STEP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: "/t")
    monkeypatch.setattr(cache.os, "geteuid", lambda: 7)
    assert [str(root) for root in cache.roots()] == expected
