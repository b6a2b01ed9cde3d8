# SPDX-License-Identifier: MIT
"""Plants each mistake of planted.toml into a copy of the kernels and sees that it is found.

    python3 tests/emulation/planted.py FOLDER [part of a name]

Works in FOLDER, from the root of the repository. Each program is built for float, and one-pass for
the matrix units' bfloat16, too. Without a mistake it must pass in every build, or nothing that
follows would mean anything.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

HERE = Path("tests/emulation")
CUDA = Path("csrc/cuda")
COMPILER = os.environ.get("CXX", "g++")
JOBS = int(os.environ.get("MAX_JOBS", "2"))
SANITIZERS = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-fsanitize=thread"],
}
KERNELS = [
    "grad_norm",
    "one_pass",
    "one_pass_grad",
    "one_pass_mma",
    "one_pass_step",
    "put",
    "residual",
    "sgd_list",
    "sgd_update",
    "tiny_steps",
]
TESTS = [
    "grad_norm_test",
    "main",
    "one_pass_mma_test",
    "one_pass_test",
    "residual_test",
    "sgd_list_test",
    "sgd_update_test",
    "tiny_steps_test",
]
FEW_PAIRS = """#pragma once
#define FUSED_STEP_FOR_EACH_PAIR(M) M(float, float) M(BFloat16, BFloat16)
#define FUSED_STEP_FOR_EACH_MMA(M) M(BFloat16)
#define FUSED_STEP_FOR_EACH_PARAM(M) M(float)
#define FUSED_STEP_FOR_EACH_STORAGE(M) M(float, float)
"""
ENVIRONMENT = os.environ | {
    "ASAN_OPTIONS": "detect_leaks=0",
    "TSAN_OPTIONS": "halt_on_error=1:history_size=4",
}


def compile_object(source: Path, to: Path, flags: list[str], patched: Path | None = None) -> Path:
    """Compiles a file against the emulation, and against `patched` before csrc/."""
    folders = [to.parents[1] / "include", HERE / "include", HERE, patched, "csrc", "tests/cpp"]
    includes = [f"-I{folder}" for folder in folders if folder is not None]
    if patched is None and to.exists() and to.stat().st_mtime > newest_source():
        return to
    to.parent.mkdir(parents=True, exist_ok=True)
    command = [COMPILER, "-std=c++20", "-g1", "-pthread", "-Wno-unknown-pragmas", *flags]
    subprocess.run([*command, *includes, "-x", "c++", "-c", source, "-o", to], check=True)
    return to


@cache
def newest_source() -> float:
    """When anything that an object depends on was last changed."""
    folders = [CUDA, Path("csrc/core"), HERE, Path("tests/cpp")]
    suffixes = {".cu", ".cuh", ".h", ".cpp"}
    files = (path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes)
    return max(path.stat().st_mtime for path in files)


def link(objects: list[Path], to: Path, flags: list[str]) -> Path:
    """Links a test program."""
    subprocess.run([COMPILER, *flags, *objects, "-pthread", "-o", to], check=True)
    return to


def run(program: Path, arguments: str) -> tuple[int, str]:
    """Exit status and output."""
    done = subprocess.run(
        [program, *arguments.split()],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout


class Build:
    """The objects of one kind of build, without a mistake."""

    def __init__(self, folder: Path, name: str, pool: ThreadPoolExecutor) -> None:
        self.folder = folder / name
        self.flags = SANITIZERS[name]
        include = self.folder / "include" / "cuda"
        include.mkdir(parents=True, exist_ok=True)
        (include / "pairs.h").write_text(FEW_PAIRS)
        # The runtime is never instrumented for threads.
        runtime = ["-O2", *(["-DEMULATION_TSAN"] if name == "tsan" else self.flags)]
        jobs = {k: (CUDA / f"{k}.cu", ["-O1", *self.flags]) for k in KERNELS}
        jobs |= {k: (HERE / f"{k}.cpp", ["-O0", *self.flags]) for k in TESTS}
        jobs["runtime"] = (HERE / "runtime.cpp", runtime)
        self.pending = {
            key: pool.submit(compile_object, source, self.folder / "whole" / f"{key}.o", flags)
            for key, (source, flags) in jobs.items()
        }

    def objects(self) -> dict[str, Path]:
        """By name, once they are there."""
        return {key: job.result() for key, job in self.pending.items()}

    def passes_without_mistake(self) -> bool:
        """Whether the program is right as it is."""
        program = link(list(self.objects().values()), self.folder / "run", self.flags)
        status, output = run(program, "forward 0/1 races")
        if status != 0:
            print(output)
        return status == 0

    def try_bug(self, bug: dict[str, str], number: int) -> str | None:
        """None if the mistake is found as it should be, else what happened."""
        patched = self.folder / f"bug{number}"
        shutil.rmtree(patched, ignore_errors=True)
        shutil.copytree(
            CUDA, patched / "cuda", ignore=shutil.ignore_patterns("device.h", "pairs.h")
        )
        target = patched / "cuda" / bug["file"]
        text = target.read_text()
        if text.count(bug["old"]) != 1:
            return f"`old` is {text.count(bug['old'])} times in {bug['file']}"
        target.write_text(text.replace(bug["old"], bug["new"]))
        kernels = bug["kernels"]
        objects = self.objects() | {
            kernels: compile_object(
                patched / "cuda" / f"{kernels}.cu",
                self.folder / "planted" / f"{number}.o",
                ["-O1", *self.flags],
                patched,
            )
        }
        program = link(list(objects.values()), patched / "run", self.flags)
        status, output = run(program, bug["run"])
        if status == 0:
            return "not found"
        return None if bug["finds"] in output else f"found otherwise:\n{output[:2000]}"


def main() -> int:
    """Runs the table."""
    folder = Path(sys.argv[1])
    wanted = sys.argv[2] if len(sys.argv) > 2 else ""
    table = tomllib.loads((HERE / "planted.toml").read_text())["bug"]
    bugs = [bug for bug in table if wanted in bug["name"]]
    with ThreadPoolExecutor(JOBS) as compiling, ThreadPoolExecutor(JOBS) as trying:
        builds = {
            name: Build(folder, name, compiling) for name in sorted({b["build"] for b in bugs})
        }
        for name, build in builds.items():
            if not build.passes_without_mistake():
                print(f"FAILED {name}: not right even without a planted mistake")
                return 1
        outcomes = trying.map(
            lambda k: builds[bugs[k]["build"]].try_bug(bugs[k], k), range(len(bugs))
        )
        missed = 0
        for bug, outcome in zip(bugs, outcomes, strict=True):
            missed += outcome is not None
            verdict = "ok    " if outcome is None else "FAILED"
            print(f"{verdict} {bug['build']}: {bug['name']}", flush=True)
            if outcome is not None:
                print(f"    {outcome}", flush=True)
    print(f"{len(bugs) - missed} of {len(bugs)} planted mistakes found")
    return 1 if missed or not bugs else 0


if __name__ == "__main__":
    sys.exit(main())
