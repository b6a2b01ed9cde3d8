# SPDX-License-Identifier: MIT
# What csrc/bindings/module.cpp offers; held to the built module by tests/test_stub.py.
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

compiler: str

def parallel_width() -> int: ...
def isa_levels(supported_only: bool = False) -> list[str]: ...
def isa_used() -> str: ...
def use_isa(name: str) -> None: ...
def cuda_archs() -> list[str]: ...  # builds with CUDA only
def serves(device: torch.device) -> bool: ...
def linear_mse_loss(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    reduction: str,
    /,
) -> Tensor | None: ...
def set_linear_mse_loss(type: type) -> None: ...
def set_sgd(type: type) -> None: ...

class LinearStep:
    def __init__(
        self,
        model: nn.Module,
        loss_function: Callable[[Tensor, Tensor], Tensor] | None,
        optimizer: torch.optim.Optimizer,
    ) -> None: ...
    @property
    def step(self) -> Callable[[Tensor, Tensor], Tensor | None]: ...
    @property
    def plan(self) -> str | None: ...
    def run(
        self,
        inputs: Tensor,
        targets: Tensor,
        epochs: int,
        batch_size: int,
        shuffle: bool,
        generator: torch.Generator | None,
        progress: Callable[[int], Any] | None,
    ) -> Tensor | None: ...
    def explain(self, input: Tensor, target: Tensor) -> tuple[str, list[str]]: ...

class HeadStep:
    def __init__(
        self,
        model: nn.Module,
        loss_function: Callable[[Tensor, Tensor], Tensor] | None,
        optimizer: torch.optim.Optimizer,
    ) -> None: ...
    def modules(self) -> tuple[nn.Module, ...] | None: ...
    def step(self, hidden: Any, target: Tensor) -> Tensor | None: ...
    def loss(self, hidden: Any, target: Tensor) -> Tensor | None: ...
    def explain(self, input: Tensor, target: Tensor) -> tuple[bool, list[str]]: ...

class SgdStep:
    def __init__(self) -> None: ...
    @property
    def step(self) -> Callable[[torch.optim.Optimizer, int], bool]: ...
    def update(
        self,
        optimizer: torch.optim.Optimizer,
        update_left: Callable[[list[tuple[int, list[Tensor]]]], None],
    ) -> bool: ...
