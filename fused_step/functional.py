# SPDX-License-Identifier: MIT
"""linear_mse_loss: a linear layer and the mean squared error as one differentiable function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import Parameter

from fused_step import _autocast
from fused_step._extension import _C
from fused_step.autograd import LinearMSEFunction

_Operands = tuple[Tensor, Tensor, Tensor | None, Tensor]  # input, weight, bias, target
_OP = torch.ops.fused_step.linear_mse_loss.default
_NAME = "fused_step::linear_mse"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda") if hasattr(_C, "cuda_archs") else ("cpu",)


def linear_mse_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The squared error of a linear layer: ``F.mse_loss(F.linear(input, W, b), target)`` in one.

    Loss and gradients are made in the forward pass, which reads `input` once where the layer has
    few outputs; the output of the layer is never stored. Only the gradients that are needed are
    made; the backward pass multiplies them by that of the loss. Second derivatives, ``torch.func``
    and ``torch.compile`` work. The derivative is an operator's, in C++; under ``torch.func`` it is
    :class:`fused_step.autograd.LinearMSEFunction`, an ``autograd.Function``.

    The fused operator serves float32, float64, bfloat16 and float16 tensors on the CPU and, in
    builds with CUDA, on GPUs; these types also under autocast. Of 16-bit types the sums are made in
    float32, and each result is rounded once. Everything else (other types and devices, tensor
    subclasses, ``vmap``, forward-mode derivatives, autocast where its own GEMMs are faster) is
    computed as the composition above, with its result. ``vmap`` within a function that is compiled
    goes through the samples one by one.

    Args:
        input: [..., I], leading dimensions are rows.
        linear_weight: [O, I].
        target: [..., O], the shape of the layer's output exactly: it does not broadcast.
        linear_bias: [O], or None.
        reduction: "mean" or "sum" over all squared errors, or "none".

    Returns:
        The loss, 0-dim; [..., O] for "none". With no rows the mean is NaN and the gradients are
        zeros, as in PyTorch.

    Raises:
        ValueError: a shape or device does not fit, `linear_weight` is a sharded DTensor, or
            `reduction` is none of the three.
        TypeError: the dtypes differ (unless autocast makes them equal).

    Example:
        >>> weight = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> loss = linear_mse_loss(torch.tensor([[3.0, 4.0]]), weight, torch.tensor([[10.0]]))
        >>> loss.backward()
        >>> loss.item(), weight.grad.tolist()
        (1.0, [[6.0, 8.0]])
    """
    if not torch.compiler.is_compiling():
        loss = _C.linear_mse_loss(input, linear_weight, linear_bias, target, reduction)
        if loss is not None:
            return loss
    if isinstance(reduction, str) and _is_served(input, linear_weight, linear_bias, target):
        transforms = () if torch.compiler.is_compiling() else _transforms()
        if not transforms:
            operands: _Operands | None = (input, linear_weight, linear_bias, target)
            if _is_autocast(linear_weight):
                operands = _autocast.operands(input, linear_weight, linear_bias, target)
            if operands is not None:
                served: Tensor = _OP(*operands, reduction)
                return served
        elif all(kind == TransformType.Grad for kind in transforms) and _is_wide(linear_weight):
            nested = len(transforms) > 1
            return _by_function(input, linear_weight, linear_bias, target, reduction, nested)
    _check(input, linear_weight, target, linear_bias, reduction)
    return F.mse_loss(F.linear(input, linear_weight, linear_bias), target, reduction=reduction)


def _is_plain(t: Tensor) -> bool:
    """Whether the operator takes `t`; what it does not take has a result or an error elsewhere."""
    return (
        (type(t) is Tensor or type(t) is Parameter)
        and t.dtype in _DTYPES
        and t.device.type in _DEVICES
        and t.layout is torch.strided
    )


def _stands_for_tensor(t: object) -> bool:
    """Whether `t` is no tensor, but may stand for one in PyTorch's functions, as torch.fx's do."""
    return not isinstance(t, Tensor) and hasattr(type(t), "__torch_function__")


def _has_engine(device: torch.device) -> bool:
    if device.type == "cpu" or torch.compiler.is_compiling():
        return True  # a compiler cannot look into _C, nor is there one for so old a GPU
    return _C.serves(device)


def _is_autocast(t: Tensor) -> bool:
    return torch.is_autocast_enabled(t.device.type)


def _is_served(input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> bool:
    return (
        _is_plain(input)
        and _is_plain(weight)
        and _is_plain(target)
        and (bias is None or _is_plain(bias))
        and _has_engine(weight.device)
        # There autocast may have the faster operators, which a compiler cannot ask for.
        and not (torch.compiler.is_compiling() and _is_autocast(weight) and weight.is_cuda)
        and (input.dtype == weight.dtype or _is_autocast(weight))
        and (torch.compiler.is_compiling() or forward_ad._current_level < 0)
    )


def _is_wide(weight: Tensor) -> bool:
    """Whether the derivative in Python serves: it takes no 16-bit types, and no autocast."""
    return weight.dtype in _DTYPES[:2] and not _is_autocast(weight)


def _transforms() -> list[TransformType]:
    """The kinds of the ``torch.func`` transforms that are at work, from the outermost."""
    return [interpreter.key() for interpreter in get_interpreter_stack() or ()]


def _by_function(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, reduction: str, nested: bool
) -> Tensor:
    # Of nested transforms only the innermost shows in requires_grad.
    needs = [t is not None and (nested or t.requires_grad) for t in (input, weight, bias, target)]
    needs[3] |= reduction == "none" and any(needs)
    loss: Tensor = LinearMSEFunction.apply(  # type: ignore[no-untyped-call]  # no annotations
        input, weight, bias, target, reduction, *needs
    )[0]
    return loss


def _autocasts(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _check(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    reduction: str,
) -> None:
    """Raises what :func:`linear_mse_loss` raises, with the operator's words."""

    def no(name: str, must: str, got: object) -> str:
        return f"{_NAME}: {name} must {must}, got {got}"

    if any(_stands_for_tensor(t) for t in (input, weight, target, bias)):
        return
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(no("reduction", "be 'mean', 'sum' or 'none'", repr(reduction)))
    others = {"input": input, "target": target}
    if bias is not None:
        others["linear_bias"] = bias
    for name, t in {"linear_weight": weight, **others}.items():
        if not isinstance(t, Tensor):
            raise TypeError(no(name, "be a torch.Tensor", type(t).__qualname__))
    # A DTensor; its class is not named here, since importing it takes a second.
    placements = getattr(weight, "placements", ())
    if not all(placement.is_replicate() for placement in placements):
        raise ValueError(no("linear_weight", "not be sharded", f"placements {placements}"))
    for name, t in others.items():
        if t.dtype != weight.dtype and not _autocasts(weight.device.type):
            raise TypeError(no(name, f"have the dtype of linear_weight {weight.dtype}", t.dtype))
        if t.device != weight.device:
            raise ValueError(
                no(name, f"be on the device of linear_weight {weight.device}", t.device)
            )
    if weight.dim() != 2:
        raise ValueError(no("linear_weight", "have the shape [O, I]", list(weight.shape)))
    O, I = weight.shape
    if bias is not None and bias.shape != (O,):
        raise ValueError(no("linear_bias", f"have the shape [{O}]", list(bias.shape)))
    if input.dim() < 1 or input.shape[-1] != I:
        must = f"have the shape [*, {I}] for linear_weight {list(weight.shape)}"
        raise ValueError(no("input", must, list(input.shape)))
    expected = (*input.shape[:-1], O)
    if target.shape != expected:
        must = f"have the shape of the output {list(expected)}"
        raise ValueError(no("target", must, list(target.shape)))
