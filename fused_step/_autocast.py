# SPDX-License-Identifier: MIT
"""Door 2 under autocast: what the operator takes in place of ``nn.Linear`` and ``MSELoss``."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_step._extension import _C

_CAST = (torch.float32, torch.bfloat16, torch.float16)


def operands(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor] | None:
    """The operands whose loss is the one that PyTorch's operators have under autocast.

    There the layer multiplies 16-bit copies of `input` and `weight`, and the loss is computed in
    float32. The operator accumulates in float32 what it is given: an `input` of 16 bit as it is,
    one of float32 without rounding it, parameters and target in float32. So the loss is float32
    too, and gradients are rounded once, to the dtype of what they belong to. The copies that
    autocast keeps of parameters are neither read nor made: `weight` counts as it is now.

    Returns None where PyTorch's own operators are to be called: autocast casts otherwise (float64
    beside other types, integers), or the processor multiplies bfloat16 and the layer is so large
    that its copies pay. float64 alone autocast leaves as it is.
    """
    given = [t for t in (input, weight, bias, target) if t is not None]
    if all(t.dtype == torch.float64 for t in given):
        return input, weight, bias, target
    if not all(t.dtype in _CAST for t in given):
        return None
    # A compiler cannot look into _C.
    if not torch.compiler.is_compiling() and _C.is_left_to_autocast(input, weight):
        return None
    return input, weight.float(), None if bias is None else bias.float(), target.float()
