# SPDX-License-Identifier: MIT
"""SGD: the optimizer, in place of torch.optim.SGD."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    _use_grad_for_differentiable,
)
from torch.optim.sgd import sgd

from fused_step import _stock
from fused_step._extension import _C

KEEP_GRAD, GRAD_TO_NONE, GRAD_TO_ZERO = range(3)  # ZeroGrad in csrc/bindings/sgd_step.h
_NARROW_DTYPES = (torch.float16, torch.bfloat16)
_Loss = TypeVar("_Loss")


class SGD(torch.optim.SGD):
    r"""Stochastic gradient descent, in place of :class:`torch.optim.SGD` and by its rule::

        for each parameter p with a gradient:
            g = -p.grad if maximize else p.grad
            g = g + weight_decay · p
            if momentum ≠ 0:
                buf = g at p's first step, later momentum · buf + (1 − dampening) · g
                g = g + momentum · buf if nesterov else buf
            p = p − lr · g

    A step reads and writes each parameter once, for all parameters of all groups in one call.
    float32 and float64 parameters have, bit for bit, the values of torch.optim.SGD's for-loop
    (``foreach=False, fused=False``) on the same processor. bfloat16 and float16 parameters are
    computed in float32 and rounded once, where torch rounds after each operation.

    Ordinary, dense tensors on the CPU take this path, and on CUDA where the extension was built
    with it: there a step is one launch for each group and dtype, waits for nothing, reads a
    learning rate that is a tensor on the device there, and can be captured in a graph. Whatever
    else there is (other devices, sparse gradients, complex parameters, strided views, gradients
    that lie in memory in another order than their parameter, memory that is shared, tensor
    subclasses such as DTensor) is updated by torch's own functions, with their results and errors;
    so is everything under ``torch.compile``, ``torch.func`` and dispatch modes.

    The ``state_dict()`` is torch.optim.SGD's and loads in either. Hooks, schedulers, closures,
    profiler ranges and ``torch.amp.GradScaler`` work as they do there, hooks under a scaler, too; a
    step that the scaler skips changes nothing, but that on CUDA the buffers of a first step are
    there then, and zero.

    Args:
        params: parameters or named parameters, or dicts that define groups.
        lr: learning rate, a number or a tensor of one element.
        momentum: momentum factor.
        dampening: dampening of the momentum.
        weight_decay: factor of the L2 penalty.
        nesterov: Nesterov momentum; needs a momentum and no dampening.
        maximize: follow the gradient upwards.
        foreach: accepted and kept in the groups; it changes nothing.
        differentiable: run the step under autograd, by torch's functions.
        fused: accepted and kept in the groups; it changes nothing.
        momentum_dtype: ``torch.float32`` keeps the momentum buffers of bfloat16 and float16
            parameters in float32, also when a state is loaded. None: in the parameters' type.
        max_grad_norm: if the 2-norm of all gradients together exceeds this, the step is made as if
            :func:`torch.nn.utils.clip_grad_norm_` had been called before. ``p.grad`` is left as it
            is. An attribute; ``grad_norm`` is the norm that the last step found.

    Raises:
        ValueError: a number is out of range, or nesterov lacks what it needs.
        TypeError: `momentum_dtype` is neither, or `max_grad_norm` is no number.
        RuntimeError: ``fused=True`` together with `foreach` or `differentiable`, as in torch; or
            `differentiable` with `momentum_dtype` or `max_grad_norm`, which have no derivative.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = SGD([weight], lr=0.5, momentum=0.9)
        >>> (weight * weight).sum().backward()
        >>> optimizer.step(zero_grad=True)
        >>> weight.tolist(), weight.grad
        ([0.0, 0.0], None)
    """

    _takes_grad_scale = True

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves it to ``step()`` to unscale and to skip.

        Hooks, the step of a subclass and one set on the instance look at ``p.grad``, and count
        steps: for them the scaler unscales the gradients before the call, and makes none to skip,
        as for torch.optim.SGD.
        """
        return (
            self._takes_grad_scale
            and type(self).step is SGD.step
            and _stock.is_stock_sgd_step(self.__dict__.get("step", SGD.step))
            and not _stock.has_step_hooks(self)
        )

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self._takes_grad_scale = value

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        momentum_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        _check_momentum_dtype(momentum_dtype)
        if max_grad_norm is not None:
            if not isinstance(max_grad_norm, numbers.Real):
                raise TypeError(
                    "fused_step.SGD: max_grad_norm must be a number or None, "
                    f"got {type(max_grad_norm).__qualname__}"
                )
            if not max_grad_norm >= 0:
                raise ValueError(
                    f"fused_step.SGD: max_grad_norm must be at least 0, got {max_grad_norm}"
                )
            max_grad_norm = float(max_grad_norm)
        if differentiable and (momentum_dtype is not None or max_grad_norm is not None):
            raise RuntimeError(
                "fused_step.SGD: differentiable must be False with momentum_dtype or max_grad_norm"
            )
        self._engine = _C.SgdStep()
        self._engine_step = self._engine.step
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        # torch.optim.SGD has made the defaults, and the first groups by them.
        # Only where it is asked for: a checkpoint of torch.optim.SGD has no such key.
        if momentum_dtype is not None:
            self.defaults["momentum_dtype"] = momentum_dtype
            for group in self.param_groups:
                group.setdefault("momentum_dtype", momentum_dtype)

    @overload
    def step(
        self, closure: None = None, *, zero_grad: bool = False, set_to_none: bool = True
    ) -> None: ...

    @overload
    def step(
        self, closure: Callable[[], _Loss], *, zero_grad: bool = False, set_to_none: bool = True
    ) -> _Loss: ...

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        zero_grad: bool = False,
        set_to_none: bool = True,
    ) -> Any:
        """Updates all parameters that have a gradient.

        Args:
            closure: evaluates the model again and returns the loss.
            zero_grad: do what ``optimizer.zero_grad(set_to_none)`` directly after would do, in the
                same pass over the parameters.
            set_to_none: of that zero_grad.

        Returns:
            What `closure` returned; None without one.
        """
        if torch.compiler.is_compiling():
            if _stock.has_step_hooks(self):
                loss = _uncompiled_step_with_hooks(self, closure)
            else:
                loss = self._compiled_step(closure)
        else:
            # A subclass may have its own zero_grad or _init_group.
            if closure is None and type(self) is SGD:
                after = (
                    KEEP_GRAD if not zero_grad else GRAD_TO_NONE if set_to_none else GRAD_TO_ZERO
                )
                if self._engine_step(self, after):
                    return None
            # A subclass that has its own step() is wrapped by torch, and its hooks have been run.
            run = _step_with_hooks if type(self).step is SGD.step else _step_without_hooks
            loss = run(self) if closure is None else run(self, closure)
        if zero_grad:
            self.zero_grad(set_to_none)
        return loss

    # So that torch does not wrap it: _step_with_hooks does the same, where it is needed. The
    # wrapper takes 23 of the 74 µs of a small step of torch.optim.SGD.
    step.hooked = True  # type: ignore[attr-defined]

    @_use_grad_for_differentiable
    def _compiled_step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_by_torch()
        return loss

    def _update_by_torch(self, left: list[tuple[int, list[Tensor]]] | None = None) -> None:
        """torch's own update, of all parameters or of those that are left in some groups."""
        if left is None:
            groups = self.param_groups
        else:
            groups = [{**self.param_groups[g], "params": params} for g, params in left]
        work = []
        for group in groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            bufs: list[Tensor | None] = []
            has_sparse_grad = self._init_group(group, params, grads, bufs)
            work.append((group, params, grads, bufs, has_sparse_grad))

        if not self._unscale([w[2] for w in work]):
            return
        factor = self._clip_factor([grad for w in work for grad in w[2]])
        # One tensor after the other. Over many at once, torch's default on CUDA, tensors that share
        # memory come out otherwise, and Nesterov's momentum is added to p.grad itself. For a
        # compiler None, as torch.optim.SGD has it: of many tensors at once it makes fewer kernels.
        is_traced = torch.compiler.is_compiling() and not self.defaults["differentiable"]

        for group, params, grads, bufs, has_sparse_grad in work:
            if factor is not None:
                # 0-dim tensors of 16 bit would take the factor's type.
                grads = [(grad * factor.to(grad.device)).to(grad.dtype) for grad in grads]
            if group["momentum"] != 0 and group.get("momentum_dtype") is not None:
                grads = [
                    grad.to(group["momentum_dtype"]) if p.dtype in _NARROW_DTYPES else grad
                    for p, grad in zip(params, grads, strict=True)
                ]
            sgd(
                params,
                grads,
                bufs,
                has_sparse_grad=has_sparse_grad,
                foreach=None if is_traced and not group["nesterov"] else False,
                lr=group["lr"],
                momentum=group["momentum"],
                dampening=group["dampening"],
                weight_decay=group["weight_decay"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
            )
            if group["momentum"] != 0:
                for p, buf in zip(params, bufs, strict=True):
                    self.state[p]["momentum_buffer"] = buf

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        momentum_buffer_list: list[Tensor | None],
    ) -> bool:
        # torch's, but for its check of `fused`, which here changes nothing.
        has_sparse_grad = False
        for p in group["params"]:
            if p.grad is not None:
                params.append(p)
                grads.append(p.grad)
                has_sparse_grad |= p.grad.is_sparse
                if group["momentum"] != 0:
                    momentum_buffer_list.append(self.state[p].get("momentum_buffer"))
        return has_sparse_grad

    def _unscale(self, grads_of_groups: list[list[Tensor]]) -> bool:
        """Does for torch's functions what a GradScaler asks for; False: the step is skipped."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and float(found_inf) != 0:
            return False
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            inverse = scale.double().reciprocal().float()
            for grads in grads_of_groups:
                for grad in grads:
                    grad.mul_(inverse.to(grad.device))
        return True

    def _clip_factor(self, grads: list[Tensor]) -> Tensor | None:
        if self.max_grad_norm is None:
            return None
        norm = torch.nn.utils.get_total_norm(
            [grad.float() if grad.dtype in _NARROW_DTYPES else grad for grad in grads]
        )
        self.grad_norm = norm
        return torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch.optim.SGD does.

        Args:
            param_group: the group's ``"params"``, and its options where they differ from the
                optimizer's, ``"momentum_dtype"`` among them.

        Raises:
            TypeError: its `momentum_dtype` is neither None nor ``torch.float32``.
        """
        if isinstance(param_group, dict):
            _check_momentum_dtype(param_group.get("momentum_dtype"))
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called for a copy or a pickle, which has no engine yet, and by load_state_dict().
        if "_engine" not in self.__dict__:
            self._engine = _C.SgdStep()
            self._engine_step = self._engine.step
            self.grad_norm = None
        for param, entry in state.get("state", {}).items():
            buf = entry.get("momentum_buffer") if isinstance(entry, dict) else None
            if isinstance(buf, _Uncast):
                entry["momentum_buffer"] = buf.tensor.to(device=param.device, dtype=torch.float32)
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # without annotations

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class or of torch.optim.SGD.

        Options that only this class has and that the state lacks stay as they are.

        Args:
            state_dict: from a call of ``state_dict()``.
        """
        # Registered here and now: it comes after the hooks of others.
        handle = self.register_load_state_dict_pre_hook(_keep_from_torch)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()


class _Uncast:
    """A buffer on its way through Optimizer.load_state_dict, which casts what is a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _keep_from_torch(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state to load, with buffers that stay float32 and options that torch does not know."""
    groups = []
    state = dict(state_dict["state"])
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=False):
        if "momentum_dtype" in group:
            saved = {"momentum_dtype": group["momentum_dtype"], **saved}
        groups.append(saved)
        if saved.get("momentum_dtype") is None:
            continue
        for key, param in zip(saved["params"], group["params"], strict=False):
            entry = state.get(key)
            if isinstance(entry, dict) and param.dtype in _NARROW_DTYPES:
                buf = entry.get("momentum_buffer")
                if isinstance(buf, Tensor):
                    state[key] = {**entry, "momentum_buffer": _Uncast(buf)}
    groups += state_dict["param_groups"][len(groups) :]
    return {**state_dict, "state": state, "param_groups": groups}


def _check_momentum_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype is not torch.float32:
        raise TypeError(
            f"fused_step.SGD: momentum_dtype must be None or torch.float32, got {dtype!r}"
        )


def _step_without_hooks(self: SGD, closure: Callable[[], Any] | None = None) -> Any:
    loss = None
    with torch.set_grad_enabled(self.defaults["differentiable"]):
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        is_ours = type(self)._init_group is SGD._init_group
        if not (is_ours and self._engine.update(self, self._update_by_torch)):
            self._update_by_torch()
    return loss


_step_with_hooks = Optimizer.profile_hook_step(_step_without_hooks)


@_disable_dynamo
def _uncompiled_step_with_hooks(self: SGD, closure: Callable[[], Any] | None) -> Any:
    return _step_with_hooks(self) if closure is None else _step_with_hooks(self, closure)


_stock.add_step(SGD.step)
_C.set_sgd(SGD)
