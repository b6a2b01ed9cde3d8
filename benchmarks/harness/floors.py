# SPDX-License-Identifier: MIT
"""The least that each part of a step can cost here: a call, one read of x, two bare GEMMs."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from harness import BENCHMARKS
from harness.case import Data
from harness.contestant import PerCall, Trajectory, Unavailable

_NAME = "benchmark_floors"


@functools.cache
def load_extension() -> ModuleType | str:
    """floors.cpp, built once into build/; or the reason why it cannot be had."""
    source = BENCHMARKS / "floors.cpp"
    version = f"torch-{torch.__version__}-py{sys.version_info.major}{sys.version_info.minor}"
    folder = BENCHMARKS.parent / "build" / "benchmarks" / version
    built = folder / f"{_NAME}.so"
    if built.is_file() and built.stat().st_mtime > source.stat().st_mtime:
        spec = importlib.util.spec_from_file_location(_NAME, built)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    try:
        from torch.utils import cpp_extension

        folder.mkdir(parents=True, exist_ok=True)
        return cpp_extension.load(
            name=_NAME,
            sources=[str(source)],
            # at::parallel_for runs on one thread in an extension built without -fopenmp.
            extra_cflags=["-O3", "-fopenmp"],
            extra_ldflags=["-fopenmp"],
            build_directory=str(folder),
        )
    except Exception as error:
        return f"floors.cpp cannot be built: {str(error).splitlines()[0]}"


def build() -> str:
    """Builds floors.cpp ahead of the first case; returns a line for the console."""
    extension = load_extension()
    if isinstance(extension, str):
        return extension
    return f"parallel width of the read floor: {extension.parallel_width()}"


class Floor(PerCall):
    """What a part of a step costs in a straightforward way; no loss, and so no trajectory."""

    role = "floor"

    def prepare(self, data: Data) -> None:
        if data.case.dtype != "float32":
            raise Unavailable("the floors are measured in float32")
        super().prepare(data)

    def extension(self) -> ModuleType:
        extension = load_extension()
        if isinstance(extension, str):
            raise Unavailable(extension)
        return extension

    def trajectory(self, steps: int) -> Trajectory | None:
        return None

    def last_loss(self) -> float | None:
        return None


class CallFloor(Floor):
    """One pybind11 call with two tensors that returns a new 0-dim tensor."""

    def build(self, data: Data) -> Callable[[Any, Any], Any]:
        call: Callable[[Any, Any], Any] = self.extension().call
        return call

    def trajectory(self, steps: int) -> Trajectory | None:
        result = self._call(*self._arguments)
        if result.dim() != 0 or result.dtype != torch.float32:
            raise AssertionError("the call floor must return a 0-dim float32 tensor")
        return None


class ReadFloor(Floor):
    """One vectorised, multithreaded read of x. The target is not touched."""

    def build(self, data: Data) -> Callable[[Any, Any], Any]:
        read: Callable[[Any, Any], Any] = self.extension().read
        return read

    def trajectory(self, steps: int) -> Trajectory | None:
        x, target = self._arguments
        # Small integers: every partial sum is exact in float32, so an element missed or read twice
        # shows as a wrong sum whatever the order of the additions.
        generator = torch.Generator().manual_seed(0)
        integers = torch.randint(-8, 9, x.shape, generator=generator).float()
        expected = float(integers.sum(dtype=torch.float64))
        total = self._call(integers, target)
        if total != expected:
            raise AssertionError(f"the read floor summed to {total}, expected {expected}")
        return None


class GemmFloor(Floor):
    """x Wᵀ and Rᵀ x, each into a buffer that exists already: the arithmetic, and nothing else."""

    def build(self, data: Data) -> Callable[[Any, Any], Any]:
        weight = torch.from_numpy(data.weight).clone()  # [O, I]
        weight_t = weight.T  # [I, O]
        output = torch.empty(data.case.batch, data.case.outputs)  # [B, O]
        residual = torch.from_numpy(data.target).clone()  # [B, O] stands for R
        residual_t = residual.T  # [O, B]
        gradient = torch.empty_like(weight)  # [O, I]
        mm = torch.mm

        def two_gemms(x: torch.Tensor, target: torch.Tensor) -> None:
            mm(x, weight_t, out=output)
            mm(residual_t, x, out=gradient)

        return two_gemms
