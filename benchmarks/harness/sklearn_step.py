# SPDX-License-Identifier: MIT
"""scikit-learn's SGDRegressor.partial_fit: another algorithm, shown for its time alone."""

from __future__ import annotations

import time
from typing import Any

from harness.case import Data
from harness.contestant import Contestant, Unavailable, collector_off


class PartialFit(Contestant):
    """One pass over the rows, an update after each of them, on one thread.

    The five lines update once for the whole batch: the results differ, and are not compared.
    """

    of_torch = False
    imports = ("sklearn.linear_model",)

    def prepare(self, data: Data) -> None:
        if data.case.outputs != 1:
            raise Unavailable("SGDRegressor has one output")
        try:
            from sklearn.linear_model import SGDRegressor
        except ImportError as error:
            raise Unavailable(f"scikit-learn is not installed: {error}") from None
        self._x, self._target = data.x, data.target.ravel()
        self._model: Any = SGDRegressor(
            alpha=0.0, penalty=None, learning_rate="constant", eta0=1e-4, shuffle=False
        )

    def trajectory(self, steps: int) -> None:
        return None

    def sample(self, steps: int) -> float:
        fit, x, target = self._model.partial_fit, self._x, self._target
        with collector_off():
            start = time.perf_counter_ns()
            for _ in range(steps):
                fit(x, target)
            stop = time.perf_counter_ns()
        return (stop - start) * 1e-9

    def release(self) -> None:
        self._model = self._x = self._target = None
