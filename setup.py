# SPDX-License-Identifier: MIT
"""Installs fused_step; all metadata is in pyproject.toml, how to compile is in fused_step/_build.

The module is compiled now if this environment has torch and a compiler. In pip's isolated build
torch cannot be imported, but the interpreter is the environment's own, and so its torch can be
found. Without either the sources are installed, and the first import compiles them.

Environment:
    FUSED_STEP_BUILD  ``auto`` (the default): as above. ``require``: compile now, or fail saying why
                      not. ``never``: install the sources.
    The rest          is in fused_step/_build/recipe.py.
"""

from __future__ import annotations

import os
import re
import site
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from setuptools import setup

# Not `fused_step._build`: importing that would import fused_step, which is not built yet.
sys.path.append(str(Path(__file__).resolve().parent / "fused_step"))

OLDEST_TORCH = (2, 11)  # as in pyproject.toml


def why_not(setting: str) -> str | None:
    """Why the module is not compiled now; None: it is. Makes torch importable where there is one.

    Args:
        setting: value of FUSED_STEP_BUILD: "auto", "require" or "never".

    Raises:
        ValueError: `setting` is none of the three.
        RuntimeError: `setting` is "require", and it cannot be.
    """
    if setting not in ("auto", "require", "never"):
        raise ValueError(f"FUSED_STEP_BUILD: expected auto, require or never, got {setting!r}")
    if setting == "never":
        return "FUSED_STEP_BUILD=never"
    reason = _missing()
    if reason is not None and setting == "require":
        raise RuntimeError(f"FUSED_STEP_BUILD=require: cannot compile: {reason}")
    return reason


def _missing() -> str | None:
    try:
        import torch
    except ImportError:
        # Last on the path: what the build environment has comes first.
        sys.path += [path for path in _site_folders() if Path(path, "torch").is_dir()]
        try:
            import torch
        except ImportError as error:
            return f"torch cannot be imported ({error})"
    version = torch.__version__
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        return f"torch is {version}, older than {'.'.join(map(str, OLDEST_TORCH))}"
    from _build import compiler

    return compiler.missing()


def _site_folders() -> list[str]:
    """Where the packages of this interpreter's environment are."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return list(dict.fromkeys([*folders, site.getusersitepackages()]))


def options(setting: str) -> dict[str, Any]:
    """What setup() gets: the extension and its commands, or nothing."""
    reason = why_not(setting)
    if reason is not None:
        print(f"fused_step: the first import will compile it: {reason}", flush=True)
        return {}
    from _build import recipe

    try:
        extension = recipe.make_extension(Path("csrc"))
    except ValueError:
        raise  # a setting that is none
    except Exception:
        if setting == "require":
            raise
        _report_failure()
        return {}

    class BuildExtension(recipe.BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception:
                if setting == "require":
                    raise
                _report_failure()

    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


def _report_failure() -> None:
    traceback.print_exc()
    print("fused_step: not compiled; the first import will try again", flush=True)


if __name__ == "__main__":
    setup(**options(os.environ.get("FUSED_STEP_BUILD", "auto")))
