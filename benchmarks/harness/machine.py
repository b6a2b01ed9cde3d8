# SPDX-License-Identifier: MIT
"""Where and with what a run was made: machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

_PACKAGES = ("torch", "fused_step", "numpy")


def _cpu_facts() -> dict[str, str]:
    """What Linux says of the first CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _cpu_model(facts: dict[str, str]) -> str:
    """Its name, which on a virtual machine may be the brand alone, with family and model."""
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" not in facts:
        return name
    return f"{name} (family {facts['cpu family']}, model {facts.get('model', '?')})"


def _vector_extensions(facts: dict[str, str]) -> list[str]:
    flags = facts.get("flags", "").split()
    return [name for name in ("avx", "avx2", "fma", "avx512f", "avx512_bf16") if name in flags]


def _caches() -> list[dict[str, str]]:
    caches = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (folder / f).read_text().strip() for f in ("level", "type", "size")
            )
        except OSError:
            continue
        caches.append({"level": level, "type": kind, "size": size})
    return caches


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def machine() -> dict:
    """Facts about the machine; nothing in it names the machine or its user."""
    facts = _cpu_facts()
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return {
        "cpu": _cpu_model(facts),
        "vector_extensions": _vector_extensions(facts),
        "logical_cpus": os.cpu_count() or 1,
        "affinity": affinity,
        "caches": _caches(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def busy_cpus(calm: float = 0.0, seconds: float = 0.5, tries: int = 10) -> float | None:
    """How many CPUs were busy on average over the next `seconds`; None without psutil.

    Measured again, up to `tries` times, while it is above `calm`: what ran before may have to end.
    The load average of a minute would count it all the same.
    """
    try:
        import psutil
    except ImportError:
        return None
    cpus = os.cpu_count() or 1
    for _ in range(tries):
        busy = round(psutil.cpu_percent(interval=seconds) / 100.0 * cpus, 2)
        if busy <= calm:
            break
    return busy


def load_average() -> list[float]:
    return [round(value, 2) for value in os.getloadavg()]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit(root: Path) -> dict:
    """The commit of the sources at `root`, and whether tracked files differ from it. Results do not
    count: a benchmark writes them before the next one begins."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    but_results = [":(top)", ":(top,exclude)benchmarks/results"]
    changes = git("status", "--porcelain", "--untracked-files=no", "--", *but_results)
    return {"hash": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}
