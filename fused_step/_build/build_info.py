# SPDX-License-Identifier: MIT
"""What a compiled module was built from and for: a file beside it, read before it is loaded.

A module built for another torch may fail to load with an undefined symbol, or load without a word
and misread torch's objects. So nothing is loaded whose file does not fit.
"""

from __future__ import annotations

import json
import sysconfig
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from . import sources

FILE = "_build_info.json"


@dataclass(frozen=True)
class Identity:
    """What a module and the process that loads it must have in common."""

    torch: str  # version, such as 2.13.0+cpu
    torch_git: str  # nightly builds of one version differ in it
    torch_cuda: str  # CUDA version of torch, "none" for a torch without
    python: str  # SOABI: implementation, version, platform
    sources: str  # fingerprint of what was compiled

    def differences(self, wanted: Identity) -> list[str]:
        """Where this one is not as `wanted`, in words."""
        found = []
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(wanted, field.name)
            if ours != theirs:
                name = field.name.replace("_", " ")
                is_hash = field.name in ("torch_git", "sources")
                found.append(
                    f"{name} differ" if is_hash else f"built for {name} {ours}, not {theirs}"
                )
        return found


@dataclass(frozen=True)
class BuildInfo:
    """An identity, and what is good to know beside it."""

    identity: Identity
    compiler: str  # its own first line of --version
    flags: list[str]  # of the host compiler
    cuda: str  # CUDA version of nvcc, "none" for a build without
    cuda_archs: list[str]  # such as ["8.0", "9.0+PTX"]

    def write(self, folder: Path) -> None:
        """Puts the file into `folder`, where the module is."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")


def of_this_process() -> Identity:
    """The identity that a module must have to be loaded here."""
    import torch

    return Identity(
        torch=torch.__version__,
        torch_git=torch.version.git_version or "none",
        torch_cuda=torch.version.cuda or "none",
        python=str(sysconfig.get_config_var("SOABI")),
        sources=sources.fingerprint(),
    )


def read(folder: Path) -> BuildInfo | None:
    """What is written in `folder`; None where there is no such file, or one of another form."""
    try:
        found = json.loads((folder / FILE).read_text())
        return BuildInfo(**{**found, "identity": Identity(**found["identity"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
