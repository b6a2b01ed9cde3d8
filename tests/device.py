# SPDX-License-Identifier: MIT
"""The device under test: `pytest --device cuda` runs the tests there, the same ones.

On another device than the CPU torch's functions that make tensors make them there, unless a test
names one. torch.set_default_device would do that by a TorchFunctionMode, under which nothing is
fused.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Not randperm: the order of a shuffled run is drawn on the CPU, whatever the data are on.
_FACTORIES = (
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
)

DEVICE = torch.device("cpu")


def use(name: str) -> None:
    """Makes `name` the device under test. To be called once, before tests are collected."""
    global DEVICE
    DEVICE = torch.device(name)
    # Its first use compiles functions of torch's own from their source, which names those below.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))
    for factory in _FACTORIES:
        setattr(torch, factory, _made_on(DEVICE, getattr(torch, factory)))


def _made_on(where: torch.device, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("device") is not None or kwargs.get("out") is not None:
            return make(*args, **kwargs)
        if kwargs.get("generator") is not None:
            # Seeded on the CPU: the same numbers on every device.
            return make(*args, **kwargs).to(where)
        return make(*args, **{**kwargs, "device": where})

    return made
