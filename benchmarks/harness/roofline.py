# SPDX-License-Identifier: MIT
"""The roofline of a case: the least time for its bytes, its FLOPs and its call, from the floors
measured in the same run."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

_ELEMENT_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
# Smaller reads are bound by the call, products with fewer outputs by bytes.
_LEAST_READ = 1 << 20
_LEAST_OUTPUTS = 64
CALLS = ("floor_call", "floor_launch")


class Part(NamedTuple):
    key: str  # call | bytes | flops
    words: str
    time: float  # microseconds


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Microseconds for the parts of a step at the measured rates; None where the floor was not
    measured."""

    call: float | None = None
    bytes: float | None = None  # minimal bytes over the measured bandwidth
    flops: float | None = None  # FLOPs over the measured rate of GEMMs
    gb_per_s: float | None = None
    gflop_per_s: float | None = None

    def parts(self) -> list[Part]:
        """What is known of the three, largest first."""
        known = []
        if self.call is not None:
            known.append(Part("call", "a call", self.call))
        if self.bytes is not None:
            known.append(Part("bytes", f"bytes at {self.gb_per_s:.3g} GB/s", self.bytes))
        if self.flops is not None:
            known.append(Part("flops", f"FLOPs at {self.gflop_per_s:.3g} GFLOP/s", self.flops))
        return sorted(known, key=lambda part: -part.time)


def of(result: dict, case: dict) -> Roofline:
    """The roofline of one case of a result.

    The bandwidth is that of the fastest read of at least as many bytes: of fewer, it may be that
    of a nearer cache. The rate is that of the run's fastest GEMMs.
    """
    peers = [c for c in result["cases"] if c["dtype"] == case["dtype"]]
    least = max(_bytes_of_read(case), _LEAST_READ)
    reads = [_read(peer) for peer in peers if _bytes_of_read(peer) >= least]
    bandwidth = max((b for b in reads if b is not None), default=None)
    large = [peer for peer in peers if peer.get("outputs", 0) >= _LEAST_OUTPUTS]
    rates = [peer["flops"] / t for peer in large if (t := _median(peer, "floor_gemm")) is not None]
    rate = max(rates, default=None)
    return Roofline(
        call=next((t for key in CALLS if (t := _median(case, key)) is not None), None),
        bytes=None if bandwidth is None else case["minimal_bytes"] / bandwidth,
        flops=None if rate is None else case["flops"] / rate,
        gb_per_s=None if bandwidth is None else bandwidth * 1e-3,
        gflop_per_s=None if rate is None else rate * 1e-3,
    )


def _median(case: dict, key: str) -> float | None:
    """Microseconds of a contestant."""
    for contestant in case["contestants"]:
        if contestant["key"] == key and contestant["microseconds"]:
            return contestant["microseconds"]["median"]
    return None


def _bytes_of_read(case: dict) -> int:
    """Of the data that a step reads."""
    elements = case["elements"] if "elements" in case else case["batch"] * case["inputs"]
    return elements * _ELEMENT_BYTES[case["dtype"]]


def _read(case: dict) -> float | None:
    """Bytes per microsecond that the case's floor of traffic has moved."""
    # x once; x read and a copy written; p and g read and p written.
    for key, times in (("floor_read", 1), ("floor_copy", 2), ("floor_triad", 3)):
        if (median := _median(case, key)) is not None:
            return times * _bytes_of_read(case) / median
    return None
