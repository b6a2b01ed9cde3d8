# SPDX-License-Identifier: MIT
"""The module that fits this process: the installed one, one compiled earlier, or one compiled now."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import torch

from . import build_info, cache, compiler, cuda_toolkit

_PACKAGE = Path(__file__).resolve().parents[1]
_STEP = re.compile(r"\[(\d+)/(\d+)\]")  # ninja's progress


class Library(NamedTuple):
    """A compiled module that fits this process."""

    path: Path
    info: build_info.BuildInfo


class BuildError(ImportError):
    """There is no module that fits, and none can be made; the message says why."""


def find() -> tuple[Library | None, str]:
    """The module that fits, None if there is none yet, and why the installed one is not it."""
    library, why = installed()
    return library or cached(), why


def installed() -> tuple[Library | None, str]:
    """The module beside the package, and why it is not to be loaded."""
    path = _module_in(_PACKAGE)
    if path is None:
        return None, "none was compiled when it was installed"
    info = build_info.read(_PACKAGE)
    if info is None:
        return None, f"nothing says what {path.name} was built for"
    differences = info.identity.differences(build_info.of_this_process())
    if differences:
        return None, f"the installed one does not fit: {', '.join(differences)}"
    return Library(path, info), ""


def cached() -> Library | None:
    """A module that an earlier import compiled."""
    identity = build_info.of_this_process()
    # Where there is no nvcc, another machine with this cache may have had one.
    is_open = torch.version.cuda is not None and _cuda_setting() == "auto"
    for with_cuda in (True, False) if is_open and not _wants_cuda() else (_wants_cuda(),):
        folder = cache.find(cache.key(identity, with_cuda=with_cuda))
        if folder is not None:
            path, info = _module_in(folder), build_info.read(folder)
            if path is not None and info is not None:
                return Library(path, info)
    return None


def compile_now(why: str, *, again: bool = False) -> Library:
    """Compiles the module into the cache, with a line of progress on stderr.

    One process compiles; others that come meanwhile wait for it.

    Args:
        why: it is needed, for that line.
        again: also if it failed before.

    Raises:
        BuildError: it cannot be compiled here, or compiling failed, now or before.
    """
    identity = build_info.of_this_process()
    name = cache.key(identity, with_cuda=_wants_cuda())
    if not again and (failed := cache.failure(name)) is not None:
        path, reason = failed
        raise BuildError(
            f"compiling failed before: {reason} (all of it in {path}; "
            "`python -m fused_step build` tries again)"
        )
    if (missing := compiler.missing()) is not None:
        raise BuildError(f"{why}, and {missing} to compile it now")
    try:
        root = cache.writable_root()
        with cache.locked(root, name, lambda: _say("another process compiles it; waiting\n")):
            if again or (library := cached()) is None:  # made while this one waited
                cache.make(root, name, lambda folder: _compile(folder, root, name, why))
                library = cached()
    except OSError as error:
        raise BuildError(f"{why}, and it cannot be compiled now: {error}") from error
    if library is None:
        raise BuildError(f"{why}, and what was compiled in {root / name} cannot be read")
    return library


def _wants_cuda() -> bool:
    """Whether a module compiled now may get the CUDA engine; the recipe decides in the end."""
    if _cuda_setting() == "0" or torch.version.cuda is None:
        return False
    return _cuda_setting() == "1" or cuda_toolkit.find_nvcc() is not None


def _cuda_setting() -> str:
    return os.environ.get("FUSED_STEP_CUDA", "auto")


def _module_in(folder: Path) -> Path | None:
    paths = (folder / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _compile(folder: Path, root: Path, name: str, why: str) -> Path:
    """Runs the worker in `folder`; returns the folder with the module."""
    _say(f"{why}; compiling it for torch {torch.__version__}, once, in about a minute\n")
    lines = []
    with subprocess.Popen(
        [sys.executable, "-m", "fused_step._build.worker", str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": _path_with_package()},
        start_new_session=True,  # a group of its own, that can be ended as a whole
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line)
                if (step := _STEP.match(line)) and sys.stderr.isatty():
                    _say(f"[{step[1]}/{step[2]}]\r")
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode != 0:
        reason = _reason(lines)
        cache.note_failure(root, name, "".join([reason, "\n\n", *lines]))
        raise BuildError(f"{why}, and compiling it failed: {reason}\n{''.join(lines[-30:])}")
    _say(f"compiled, in {root / name}\n")
    return folder / "fused_step"


def _path_with_package() -> str:
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(_PACKAGE.parent), *([inherited] if inherited else [])])


def _reason(lines: list[str]) -> str:
    """The line of a log that tells most: a compiler's first error, or how it ended."""
    errors = [line for line in lines if re.search(r"\berror\b|No space left", line)]
    last = [line for line in lines if line.strip()][-1:]
    return (errors or last or ["it said nothing"])[0].strip()


def _say(text: str) -> None:
    sys.stderr.write(f"fused_step: {text}")
    sys.stderr.flush()
