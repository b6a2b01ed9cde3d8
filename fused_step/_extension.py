# SPDX-License-Identifier: MIT
"""Finds and loads the compiled module; everything else takes ``_C`` from here."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

import torch


def load() -> ModuleType:
    """Imports ``fused_step._C``.

    Raises:
        ImportError: it was never built, or it was built for another torch than the one installed.
    """
    # torch is imported above, before the extension: that loads the libraries _C is linked to.
    try:
        return importlib.import_module("fused_step._C")
    except ModuleNotFoundError as error:
        raise ImportError(
            "fused_step: the compiled module fused_step._C is missing; build it with "
            "`pip install --no-build-isolation -e .` in fused_step's source folder"
        ) from error
    except ImportError as error:
        raise ImportError(
            f"fused_step: the compiled module fused_step._C does not load with torch "
            f"{torch.__version__}; rebuild it with `pip install --no-build-isolation -e .` "
            f"in fused_step's source folder ({error})"
        ) from error


if TYPE_CHECKING:
    from fused_step import _C as _C  # its stub, _C.pyi
else:
    _C = load()
