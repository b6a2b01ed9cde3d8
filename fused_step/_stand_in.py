# SPDX-License-Identifier: MIT
"""In place of the compiled module where there is none: nothing is fused, everything works.

The same names as in ``fused_step._C``, each with the answer "not by a fused plan", so that the
doors go on as they do for what the kernels do not serve. The operators are registered with the
formulas of ``fused_step.reference``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_step import reference

REASON = "it was not looked for"  # why there is no compiled module; set by the loader

# As in csrc/bindings/schema.h; a test holds them equal.
SCHEMAS = (
    "linear_mse_sgd_(Tensor(a!) weight, Tensor(b!)? bias, Tensor(c!)? weight_momentum_buffer, "
    "Tensor(d!)? bias_momentum_buffer, Tensor input, Tensor target, *, float lr, "
    "float momentum=0., float dampening=0., float weight_decay=0., bool nesterov=False, "
    'bool maximize=False, str reduction="mean", bool first_step=False) -> Tensor',
    "linear_mse_loss(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, "
    'str reduction="mean") -> Tensor',
    "linear_mse(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, "
    "str reduction, bool need_dinput, bool need_dweight, bool need_dbias, bool need_dy) -> "
    "(Tensor loss, Tensor dinput, Tensor dweight, Tensor dbias, Tensor dy)",
)

compiler = "none"


def parallel_width() -> int:
    """The number of threads of PyTorch's own operators."""
    return torch.get_num_threads()


def isa_levels(supported_only: bool = False) -> list[str]:
    """No loops were compiled."""
    return []


def isa_used() -> str:
    """What PyTorch's own operators use."""
    return str(torch.backends.cpu.get_cpu_capability())


def serves(device: torch.device) -> bool:
    """Whether there are kernels for `device`: none."""
    return False


def linear_mse_loss(*operands: Any) -> None:
    """Not fused."""


def set_linear_mse_loss(kind: type) -> None:
    """Nothing here asks for the class."""


def set_sgd(kind: type) -> None:
    """Nothing here asks for the class."""


class LinearStep:
    """No step of TrainStep is fused."""

    plan = None

    def __init__(self, model: Any, loss_function: Any, optimizer: Any) -> None:
        pass

    def step(self, input: Tensor, target: Tensor) -> None:
        """Not fused."""

    def run(
        self,
        inputs: Tensor,
        targets: Tensor,
        epochs: int,
        batch_size: int,
        shuffle: bool,
        generator: torch.Generator | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        """Not fused."""

    def explain(self, input: Tensor, target: Tensor) -> tuple[str, list[str]]:
        """The plain plan, since there is no compiled module."""
        return "plain", [f"there is no compiled module: {REASON}"]


class HeadStep:
    """No head of a model is fused."""

    def __init__(self, model: Any, loss_function: Any, optimizer: Any) -> None:
        pass

    def parts(self) -> None:
        """Not fused."""

    def confirms(self, number: int) -> bool:
        """Not fused."""
        return False

    def step(self, hidden: Any, target: Tensor) -> None:
        """Not fused."""

    def loss(self, hidden: Any, target: Tensor) -> None:
        """Not fused."""

    def explain(self, input: Tensor, target: Tensor) -> tuple[bool, list[str]]:
        """Not fused, for the reason that LinearStep gives."""
        return False, []


class SgdStep:
    """No step of fused_step.SGD is fused."""

    def step(self, optimizer: Any, after: int) -> bool:
        """Not fused."""
        return False

    def update(self, optimizer: Any, update_left: Callable[..., None]) -> bool:
        """Not fused."""
        return False


def _linear_mse_sgd_(
    weight: Tensor,
    bias: Tensor | None,
    weight_momentum_buffer: Tensor | None,
    bias_momentum_buffer: Tensor | None,
    input: Tensor,
    target: Tensor,
    *,
    first_step: bool = False,
    **options: Any,
) -> Tensor:
    bufs = (None, None) if first_step else (weight_momentum_buffer, bias_momentum_buffer)
    step = reference.linear_mse_sgd(*_wide(input, weight, bias, target, *bufs), **options)
    written = [(weight, step.W.param), (weight_momentum_buffer, step.W.buf)]
    if bias is not None and step.b is not None:
        written += [(bias, step.b.param), (bias_momentum_buffer, step.b.buf)]
    for old, new in written:
        if old is not None and new is not None:
            old.copy_(new)
    return step.loss.to(weight.dtype)


def _linear_mse_loss(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, reduction: str = "mean"
) -> Tensor:
    output = F.linear(input.to(weight.dtype), weight, bias)
    return F.mse_loss(output, target, reduction=reduction)


def _linear_mse(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    reduction: str,
    *needs: bool,
) -> tuple[Tensor, ...]:
    x, W, b, t = _wide(input, weight, bias, target)
    y = F.linear(x, W, b)
    loss = F.mse_loss(y, t, reduction=reduction).to(weight.dtype)
    dy_scale = 2.0 / max(1, t.numel()) if reduction == "mean" else 2.0
    dy = dy_scale * (y - t)
    if reduction == "none":
        made = (dy, dy, dy, _unscaled(dy, target))
        needs = (False, False, False, needs[3])
    else:
        step = reference.linear_mse(x, W, W.new_zeros(len(W)) if b is None else b, t, reduction)
        assert step.db is not None
        made = (_unscaled(step.dx, input), step.dW, step.db, _unscaled(dy, target))
    return loss, *(m if needed else m.new_empty(0) for m, needed in zip(made, needs, strict=True))


def _wide(*tensors: Tensor | None) -> list[Any]:
    """The same in the type that sums are made in."""
    return [
        None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors
    ]


def _unscaled(t: Tensor, like: Tensor) -> Tensor:
    """`t` as it is kept until dL/dloss is known: see csrc/bindings/linear_mse.h."""
    return t.float() if like.dtype == torch.float16 else t.to(like.dtype)


_library = torch.library.Library("fused_step", "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)
_library.impl("linear_mse_sgd_", _linear_mse_sgd_, "CompositeExplicitAutograd")
_library.impl("linear_mse", _linear_mse, "CompositeExplicitAutograd")
_library.impl("linear_mse_loss", _linear_mse_loss, "CompositeImplicitAutograd")
