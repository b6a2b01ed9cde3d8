# SPDX-License-Identifier: MIT
"""What is measured: the size of a step, its data, its minimal cost, and its targets."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import numpy as np

_TARGET = re.compile(r"(\w+) (>=|<=) ([\d.]+)(?:x (\w+)| us)")
MICROSECOND = "us"  # in the place of another contestant: the limit is a time


@dataclasses.dataclass(frozen=True)
class Target:
    """One row of the list of targets, comparing two contestants of the same rounds.

    `>=` reads "subject is at least limit times as fast as other" and is measured as
    time(other) / time(subject). `<=` reads "subject takes at most limit times the time of other"
    and is measured as time(subject) / time(other). Without another, "<= 2 us" is a time itself.
    """

    subject: str
    relation: str
    limit: float
    other: str

    @classmethod
    def parse(cls, text: str) -> Target:
        """Reads `step >= 100x eager`, `run <= 0.5x floor_call` or `run <= 2 us`."""
        match = _TARGET.fullmatch(text)
        if match is None:
            raise ValueError(f"target must look like 'step >= 100x eager', got {text!r}")
        subject, relation, limit, other = match.groups()
        return cls(subject, relation, float(limit), other or MICROSECOND)

    def __str__(self) -> str:
        if self.other == MICROSECOND:
            return f"{self.subject} {self.relation} {self.limit:g} us"
        return f"{self.subject} {self.relation} {self.limit:g}x {self.other}"

    def ratio(self, subject_times: np.ndarray, other_times: np.ndarray) -> np.ndarray:
        """The per-round ratios that `limit` is held against."""
        if self.relation == ">=":
            return other_times / subject_times
        return subject_times / other_times

    def reached(self, measured: float) -> bool:
        return measured >= self.limit if self.relation == ">=" else measured <= self.limit


@dataclasses.dataclass(frozen=True)
class Case:
    """One step of Linear(I, O) with the mean squared error on B rows."""

    batch: int
    inputs: int
    outputs: int
    targets: tuple[str, ...] = ()
    note: str = ""
    dtype: str = "float32"  # of data and parameters
    input_grad: bool = False  # whether x requires grad, as behind a body that is trained

    @property
    def name(self) -> str:
        name = f"{self.batch}x{self.inputs}x{self.outputs}" + self._suffix("-")
        return name + ("-dx" if self.input_grad else "")

    @property
    def title(self) -> str:
        title = f"{self.batch}×{self.inputs}→{self.outputs}" + self._suffix(" ")
        return title + (" with dx" if self.input_grad else "")

    def _suffix(self, before: str) -> str:
        return "" if self.dtype == "float32" else before + self.dtype

    @property
    def element_bytes(self) -> int:
        return {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}[self.dtype]

    def make_data(self, seed: int) -> Any:
        """The numbers that contestants are prepared with."""
        return Data(self, seed)

    def make_oracle(self, data: Any) -> Any:
        """What their first steps are held against."""
        from harness.oracle import Oracle

        return Oracle(data)

    @property
    def tiny(self) -> Case:
        """A case that loads and starts all that this one needs, and holds next to nothing."""
        sizes = {"batch": 64, "inputs": 16, "outputs": min(4, self.outputs)}
        return dataclasses.replace(self, **sizes, targets=())

    @property
    def sizes(self) -> dict[str, int]:
        """What the result file says of the case's size."""
        return {"batch": self.batch, "inputs": self.inputs, "outputs": self.outputs}

    @property
    def parsed_targets(self) -> list[Target]:
        return [Target.parse(text) for text in self.targets]

    @property
    def input_bytes(self) -> int:
        return self.element_bytes * self.batch * self.inputs

    @property
    def output_bytes(self) -> int:
        """Bytes of one [B, O] buffer."""
        return self.element_bytes * self.batch * self.outputs

    @property
    def weight_bytes(self) -> int:
        return self.element_bytes * self.outputs * self.inputs

    @property
    def minimal_bytes(self) -> int:
        """x and t read once, W and b read once and written once, dx written once if it is wanted.
        Nothing else has to move."""
        parameters = self.weight_bytes + self.element_bytes * self.outputs
        inputs = self.input_bytes * (2 if self.input_grad else 1)
        return inputs + self.output_bytes + 2 * parameters

    @property
    def flops(self) -> int:
        """A multiply and an add for each element of x and output, in y, in dW and in dx."""
        products = 3 if self.input_grad else 2
        return 2 * products * self.batch * self.inputs * self.outputs

    @property
    def learning_rate(self) -> float:
        """A rate that moves the weights visibly and stays an order of magnitude from diverging.

        The data are standard normal, so the largest eigenvalue of the Hessian of the mean loss is
        about 2/O * (1 + sqrt((I + 1)/B))^2; a step of 2 over it would diverge, this is 0.2 over it.
        """
        edge = (1.0 + np.sqrt((self.inputs + 1) / self.batch)) ** 2
        return float(0.1 * self.outputs / edge)


class Data:
    """The same numbers for every contestant, in whatever process it runs.

    The target is noise, not a linear function of the input: the loss stays O(1) however many steps
    are timed, and no contestant ends among denormals.
    """

    def __init__(self, case: Case, seed: int):
        rng = np.random.default_rng(seed)
        bound = 1.0 / np.sqrt(case.inputs)
        self.case = case
        self.seed = seed
        self.x = rng.standard_normal((case.batch, case.inputs), dtype=np.float32)
        self.target = rng.standard_normal((case.batch, case.outputs), dtype=np.float32)
        self.weight = rng.uniform(-bound, bound, (case.outputs, case.inputs)).astype(np.float32)
        self.bias = rng.uniform(-bound, bound, case.outputs).astype(np.float32)

    @functools.cached_property
    def tensors(self) -> tuple[Any, Any]:
        """x and target in memory of torch's own allocator, hence with its alignment."""
        import torch

        dtype = getattr(torch, self.case.dtype)
        x, target = torch.from_numpy(self.x), torch.from_numpy(self.target)
        return x.to(dtype, copy=True), target.to(dtype, copy=True)
