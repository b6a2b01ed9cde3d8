# SPDX-License-Identifier: MIT
"""Stands in for hypothesis where it is not installed: its tests are skipped, and say why."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

REASON = "hypothesis is not installed"


class _Anything:
    """Any strategy, and whatever is made of it."""

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):  # what Python itself asks for is not there
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Anything:
        return self

    def __or__(self, other: Any) -> _Anything:
        return self


def _given(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    def skipped(test: Any) -> Any:
        # Without the parameters that hypothesis would fill, which pytest would take for fixtures.
        @pytest.mark.skip(reason=REASON)
        def stand_in() -> None: ...

        stand_in.__name__, stand_in.__doc__ = test.__name__, test.__doc__
        stand_in.pytestmark = [*getattr(test, "pytestmark", []), *stand_in.pytestmark]
        return stand_in

    return skipped


class _Settings:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, test: Any) -> Any:
        return test


def install() -> None:
    """Puts the stand-in where `import hypothesis` finds it."""
    module = types.ModuleType("hypothesis")
    module.given, module.settings = _given, _Settings
    module.assume = module.note = module.example = _Anything()
    strategies = types.ModuleType("hypothesis.strategies")
    strategies.__getattr__ = _Anything().__getattr__
    # torch.compile asks where the packages it knows by name come from: from nowhere.
    for m in (module, strategies):
        m.__spec__ = importlib.machinery.ModuleSpec(m.__name__, None)
    sys.modules["hypothesis"], sys.modules["hypothesis.strategies"] = module, strategies
    module.strategies = strategies
