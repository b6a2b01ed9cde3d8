# SPDX-License-Identifier: MIT
"""Medians, percentiles, and the A/A noise that decides what counts as a difference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Spread:
    """A median with its 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Spread:
        p20, median, p80 = np.percentile(np.asarray(values, dtype=np.float64), (20, 50, 80))
        return cls(float(median), float(p20), float(p80))

    def as_json(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def aa_noise(first: np.ndarray, second: np.ndarray) -> float:
    """Relative noise of a ratio, from one contestant entered twice.

    The larger of how far the median A/A ratio is from 1, and half the width between its 20th and
    80th percentile. Wider than the error of a median over the rounds: nothing below it is claimed.
    """
    spread = Spread.of(second / first)
    return max(_distance_from_1(spread.median), (spread.p80 - spread.p20) / 2.0)


def is_equal(ratio: float, noise: float) -> bool:
    """Whether a ratio of times is within the noise of 1."""
    return _distance_from_1(ratio) <= noise


def _distance_from_1(ratio: float) -> float:
    """The same for a ratio and its inverse."""
    return max(ratio, 1.0 / ratio) - 1.0
