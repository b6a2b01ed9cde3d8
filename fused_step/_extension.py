# SPDX-License-Identifier: MIT
"""Loads the compiled module; everything else takes ``_C`` from here.

Environment:
    FUSED_STEP_BUILD        ``never``: do not compile at import what does not fit or is not there.
    FUSED_STEP_REQUIRE_EXT  ``1``: an import without the compiled module is an error. Otherwise it
                            warns, once, and PyTorch's own operators do the work.
    FUSED_STEP_CACHE        where modules compiled at import are kept.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch  # noqa: F401  first: it loads the libraries that the compiled module is linked to

from fused_step._build import on_import

_NAME = "fused_step._C"


def load() -> ModuleType:
    """The compiled module: the installed one if it fits, else one from the cache, compiled now if
    need be. Its stand-in, with a warning, where there is none.

    Raises:
        ImportError: there is none, and FUSED_STEP_REQUIRE_EXT is 1.
    """
    try:
        return _import(_library().path)
    except ImportError as error:
        if os.environ.get("FUSED_STEP_REQUIRE_EXT") == "1":
            raise ImportError(f"fused_step: no compiled module: {error}") from error
        warnings.warn(
            f"fused_step runs without its compiled module, by PyTorch's own operators: {error}",
            RuntimeWarning,
            stacklevel=_stacklevel_of_importer(),
        )
        from fused_step import _stand_in

        _stand_in.REASON = str(error)
        return _stand_in


def _stacklevel_of_importer() -> int:
    """The stacklevel with which a warning of this function's caller points at the line outside of
    the package that imports it."""
    package = str(Path(__file__).parent) + os.sep
    importlib_package = str(Path(importlib.__file__).parent) + os.sep
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        # As `warnings` tells the frames of an import statement, which it does not count.
        if not ("importlib" in file and "_bootstrap" in file):
            if not file.startswith((package, importlib_package)):
                break
            level += 1
        frame = frame.f_back
    return level


def _library() -> on_import.Library:
    library, why = on_import.find()
    if library is None:
        if os.environ.get("FUSED_STEP_BUILD") == "never":
            raise on_import.BuildError(f"{why}, and FUSED_STEP_BUILD is never")
        library = on_import.compile_now(why)
    return library


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[_NAME] = module
    return module


if TYPE_CHECKING:
    from fused_step import _C as _C  # its stub, _C.pyi
else:
    _C = load()
