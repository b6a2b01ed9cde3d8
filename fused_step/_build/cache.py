# SPDX-License-Identifier: MIT
"""The folder of modules compiled at first import, one for each thing they depend on.

``$FUSED_STEP_CACHE``, or ``$XDG_CACHE_HOME/fused_step``, or ``~/.cache/fused_step``; where that cannot
be written, a folder of this user in the system's temporary one. In it, by a hash of all that
tells builds apart: ``<key>/`` a finished build, ``<key>.lock``, ``<key>.failed`` why there is none,
and ``<key>.*.tmp/`` a build that goes on or was killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from .build_info import Identity

# What a user may set to get another build of the same sources.
_SETTINGS = ("CXX", "TORCH_CUDA_ARCH_LIST")
_KEY_DIGITS = 20
_OURS = re.compile(rf"[0-9a-f]{{{_KEY_DIGITS}}}(\.lock|\.failed|\..*\.tmp)?")


def key(identity: Identity, *, with_cuda: bool) -> str:
    """The name of a build: hexadecimal digits."""
    settings = {name: os.environ.get(name, "") for name in _SETTINGS}
    parts = {**asdict(identity), **settings, "with_cuda": with_cuda}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:_KEY_DIGITS]


def roots() -> list[Path]:
    """Where builds may lie, in the order in which they are looked for and made."""
    if named := os.environ.get("FUSED_STEP_CACHE"):
        return [Path(named).expanduser().absolute()]
    found = []
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # a relative one is to be ignored, by the XDG specification
        found.append(Path(xdg, "fused_step"))
    else:
        with contextlib.suppress(RuntimeError):  # a user without a home
            found.append(Path.home() / ".cache" / "fused_step")
    return [*found, Path(tempfile.gettempdir(), f"fused_step-{os.geteuid()}")]


def is_trusted(path: Path) -> bool:
    """Whether only this user, or root, can have put there what is at `path`."""
    try:
        status = path.lstat()
    except OSError:
        return False
    writers = stat.S_IWGRP | stat.S_IWOTH
    return (
        not stat.S_ISLNK(status.st_mode)
        and status.st_uid in (0, os.geteuid())
        and not status.st_mode & writers
    )


def find(name: str) -> Path | None:
    """The folder of the finished build `name`; None if there is none."""
    for root in roots():
        if is_trusted(root) and is_trusted(root / name):
            return root / name
    return None


def writable_root() -> Path:
    """The first of the roots that can be written, made with mode 0700 where it is missing.

    Raises:
        OSError: there is none; the message names each with its reason.
    """
    reasons = []
    for root in roots():
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not is_trusted(root):
                raise PermissionError(errno.EPERM, "others can write it", str(root))
            with tempfile.TemporaryFile(dir=root):
                return root
        except OSError as error:
            reasons.append(f"{root}: {error.strerror}")
    raise OSError(f"no folder for compiled modules can be written: {'; '.join(reasons)}")


@contextlib.contextmanager
def locked(root: Path, name: str, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds the lock of the build `name`, which the kernel takes back if this process dies.

    Args:
        root: of the cache.
        name: of the build.
        on_wait: called if another process holds it, before waiting.
    """
    with open(root / f"{name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # A file system without locks. Two processes may then compile at once, each in a folder
            # of its own, and the second to finish finds the first one's in its place.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield


def make(root: Path, name: str, build: Callable[[Path], Path]) -> Path:
    """Makes the build `name` out of sight and puts it in its place in one step. Needs its lock.

    Args:
        root: of the cache.
        name: of the build.
        build: fills the empty folder that it is given, and returns the folder to keep.

    Returns:
        The folder of the finished build.
    """
    for abandoned in root.glob(f"{name}.*.tmp"):  # of a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{name}.", suffix=".tmp", dir=root))
    try:
        finished = build(temporary)
        finished.chmod(0o700)
        try:
            os.replace(finished, root / name)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        (root / f"{name}.failed").unlink(missing_ok=True)
        return root / name
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def note_failure(root: Path, name: str, text: str) -> None:
    """Remembers why the build `name` failed, so that not every import tries again."""
    with contextlib.suppress(OSError):  # the disk may be full
        (root / f"{name}.failed").write_text(text)


def failure(name: str) -> tuple[Path, str] | None:
    """The file that says why the build `name` failed, and its first line; None if it did not."""
    for root in roots():
        path = root / f"{name}.failed"
        with contextlib.suppress(OSError):
            return path, path.read_text().split("\n", 1)[0]
    return None


def clear() -> list[Path]:
    """Removes every build that nobody makes at this moment; nothing else that lies there.

    Returns:
        What was removed.
    """
    removed = []
    for root in roots():
        if not is_trusted(root):
            continue
        found = sorted(path for path in root.iterdir() if _OURS.fullmatch(path.name))
        for name in sorted({path.name[:_KEY_DIGITS] for path in found}):
            with contextlib.suppress(_InUse), locked(root, name, _raise_in_use):
                for path in (path for path in found if path.name.startswith(name)):
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    else:
                        path.unlink()
                    removed.append(path)
                (root / f"{name}.lock").unlink(missing_ok=True)
    return removed


class _InUse(Exception):
    pass


def _raise_in_use() -> None:
    raise _InUse
