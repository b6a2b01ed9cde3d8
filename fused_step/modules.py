# SPDX-License-Identifier: MIT
"""LinearMSELoss: a linear layer that gives its loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fused_step._extension import _C
from fused_step.functional import linear_mse_loss

# What runs when a linear layer is called and its output is compared with the target.
_FORWARD, _CALL, _CALL_IMPL = nn.Linear.forward, nn.Module.__call__, nn.Module._call_impl
_LINEAR, _MSE_LOSS = F.linear, F.mse_loss


class LinearMSELoss(nn.Module):
    """A linear layer and the mean squared error of its output: the head of a model.

    ``head(input, target)`` is ``nn.MSELoss()(head.linear(input), target)``, by
    :func:`fused_step.linear_mse_loss`. The layer is ``head.linear``, an ``nn.Linear`` with its
    usual initialisation; a ``state_dict`` of a bare ``nn.Linear`` loads, too.

    Args:
        in_features: I, the size of a row of the input.
        out_features: O, the size of a row of the target.
        bias: whether the layer has a bias.
        reduction: "mean", "sum" or "none".
        device: of the layer's parameters.
        dtype: of the layer's parameters.

    Raises:
        ValueError: `reduction` is none of the three.

    Shapes: input [..., I], target [..., O]; the loss is 0-dim, or [..., O] for "none".

    Example:
        >>> head = LinearMSELoss(3, 2)
        >>> loss = head(torch.randn(5, 3), torch.randn(5, 2))
        >>> loss.backward()
        >>> head.predict(torch.randn(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        reduction: str = "mean",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(
                f"LinearMSELoss: reduction must be 'mean', 'sum' or 'none', got {reduction!r}"
            )
        self.linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``predict(input)`` against `target`.

        Args:
            input: [..., I].
            target: [..., O].

        Raises:
            As :func:`fused_step.linear_mse_loss` does.
        """
        linear = self.linear
        # A tracer, whose inputs are no tensors, replaces functions; a compiler reads through them.
        is_traced = not isinstance(input, Tensor) or torch.compiler.is_compiling()
        if _is_called_as_it_is(linear) and (is_traced or _functions_are_torchs()):
            return linear_mse_loss(
                input,
                linear.weight,
                target,
                linear_bias=linear.bias,
                reduction=self.reduction,
            )
        output = linear(input)
        if output.shape != target.shape:
            raise ValueError(
                "fused_step::linear_mse: target must have the shape of the output "
                f"{list(output.shape)}, got {list(target.shape)}"
            )
        return F.mse_loss(output, target, reduction=self.reduction)

    def predict(self, input: Tensor) -> Tensor:
        """[..., O] the layer's output for `input` [..., I]."""
        output: Tensor = self.linear(input)
        return output

    def extra_repr(self) -> str:
        """What stands in the module's ``repr`` beside its layer."""
        return f"reduction={self.reduction!r}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Module.load_state_dict has copied the dictionary; that of a bare nn.Linear is renamed.
        for name in ("weight", "bias"):
            if prefix + name in state_dict and f"{prefix}linear.{name}" not in state_dict:
                state_dict[f"{prefix}linear.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _is_called_as_it_is(linear: nn.Module) -> bool:
    """Whether calling `linear` is F.linear with its weight and bias, and nothing more."""
    return (
        type(linear) is nn.Linear
        and "forward" not in linear.__dict__
        and "_call_impl" not in linear.__dict__
        and not (
            linear._forward_hooks
            or linear._forward_pre_hooks
            or linear._backward_hooks
            or linear._backward_pre_hooks
            or _has_any_global_hook()  # type: ignore[no-untyped-call]  # without annotations
        )
    )


def _functions_are_torchs() -> bool:
    """Whether nobody has replaced what runs when a layer is called, or its loss computed."""
    return (
        nn.Linear.forward is _FORWARD
        and nn.Module.__call__ is _CALL
        and nn.Module._call_impl is _CALL_IMPL
        and F.linear is _LINEAR
        and F.mse_loss is _MSE_LOSS
    )


_C.set_linear_mse_loss(LinearMSELoss)
