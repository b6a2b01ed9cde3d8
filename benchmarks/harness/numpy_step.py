# SPDX-License-Identifier: MIT
"""The step written by hand in NumPy. Runs in a process of its own (see isolated.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from harness.case import Data
from harness.contestant import PerCall


class NumPyStep(PerCall):
    """The shortest NumPy that reads x twice and allocates as little as NumPy allows."""

    of_torch = False
    imports = ("numpy",)
    settle_seconds = 0.050

    def touch_libraries(self, data: Data) -> None:
        data.x @ data.weight.T
        data.target.T @ data.x

    def arguments(self, data: Data) -> tuple[Any, Any]:
        return data.x, data.target

    def build(self, data: Data) -> Callable[[Any, Any], Any]:
        case = data.case
        weight = self._weight = data.weight.copy()  # [O, I]
        bias = self._bias = data.bias.copy()  # [O]
        count = case.batch * case.outputs
        scale = 2.0 * case.learning_rate / count

        def step(x: np.ndarray, target: np.ndarray) -> float:
            error = x @ weight.T
            error += bias
            error -= target
            loss = np.vdot(error, error) / count
            error *= scale
            np.subtract(weight, error.T @ x, out=weight)
            np.subtract(bias, error.sum(axis=0), out=bias)
            return loss

        return step

    def parameters(self) -> tuple[np.ndarray, np.ndarray]:
        return self._weight.copy(), self._bias.copy()

    def describe(self) -> dict[str, str]:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return {"numpy": np.__version__, "blas": f"{blas['name']} {blas['version']}"}
