# SPDX-License-Identifier: MIT
"""TrainStep: a whole training step as one call."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fused_step._extension import _C
from fused_step._stock import has_stock_zero_grad, is_stock_sgd, is_stock_sgd_step
from fused_step.optim import GRAD_TO_NONE, SGD

_IS_COMPILED = _C.serves(torch.device("cpu"))
_OF_ENGINES = ("_fused", "_fused_step", "_head", "_update", "_loop_plan")

LossFunction = Callable[[Tensor, Tensor], Tensor]
_Call = Callable[[Any], Any]
# Of a model before its last layer; see csrc/bindings/head_step.h.
_BodyPart = tuple[Any, nn.Module | None, int, _Call | None]


class TrainStep:
    """The five lines of a training step as one call.

    ``step(input, target)`` does what these lines do, and returns the loss::

        output = model(input)
        loss = loss_function(output, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    Args:
        model: any ``nn.Module``. More than SGD's update is fused for an ``nn.Linear``, for an
            ``nn.Sequential`` that ends in one, and for a class whose ``forward`` ends in
            ``return self.layer(...)``.
        loss_function: ``loss_function(output, target)`` returning a 0-dim tensor. More than that
            update is fused for ``nn.MSELoss``, ``F.mse_loss`` and functions that compute the same.
            None for a model whose ``model(input, target)`` is the loss, as
            :class:`fused_step.LinearMSELoss` is.
        optimizer: an optimizer over the model's parameters.

    Raises:
        TypeError: an argument is none of that.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_function: LossFunction | None,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"TrainStep: model must be an nn.Module, got {type(model).__qualname__}"
            )
        if loss_function is None and type(model) in (nn.Linear, nn.Sequential):
            raise TypeError(
                "TrainStep: loss_function may be None for a model that takes the target and gives "
                f"the loss, got None for {type(model).__qualname__}"
            )
        if loss_function is not None and not callable(loss_function):
            raise TypeError(
                f"TrainStep: loss_function must be callable, got {type(loss_function).__qualname__}"
            )
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                "TrainStep: optimizer must be a torch.optim.Optimizer, "
                f"got {type(optimizer).__qualname__}"
            )
        self._make_engines(model, loss_function, optimizer)

    def _make_engines(
        self,
        model: nn.Module,
        loss_function: LossFunction | None,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._model = model
        self._loss_function = loss_function
        self._optimizer = optimizer
        self._fused = _C.LinearStep(model, loss_function, optimizer)
        self._fused_step = self._fused.step
        self._head = _C.HeadStep(model, loss_function, optimizer)
        self._update = _C.SgdStep().step
        self._loop_plan: str | None = None  # of the last call that was no one fused step

    # For copies and pickles: the engines are made anew, and no step has been made by them. All else
    # belongs to a subclass or the user.
    def __getstate__(self) -> dict[str, Any]:
        return {name: v for name, v in self.__dict__.items() if name not in _OF_ENGINES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_engines(self._model, self._loss_function, self._optimizer)

    def __repr__(self) -> str:
        loss = self._loss_function
        name = getattr(loss, "__name__", None) or repr(loss)
        return (
            f"TrainStep(model={type(self._model).__name__}, loss_function={name}, "
            f"optimizer={type(self._optimizer).__name__})"
        )

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self._model

    @property
    def loss_function(self) -> LossFunction | None:
        """The loss function; None where the model gives the loss."""
        return self._loss_function

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, whose options and state are read at each call."""
        return self._optimizer

    @property
    def plan(self) -> str | None:
        """The plan of the last call, None before the first.

        "one-pass", "gemm", "head", "optimizer" or "plain"; on CUDA also "tiny".
        """
        return self._fused.plan or self._loop_plan

    def explain(self, input: Tensor, target: Tensor) -> str:
        """Says which plan ``step(input, target)`` would take, and why no deeper one.

        Runs nothing and changes nothing. So of "head" and "optimizer" it says as much as can be
        told before the model has run and there are gradients.

        Args:
            input: as for a step.
            target: as for a step.
        """
        plan, reasons = self._fused.explain(input, target)
        if plan == "plain":
            has_head, reasons_of_head = self._head.explain(input, target)
            has_update = self._has_fused_update()
            if has_update and not _C.sgd_options_are_fused(self._optimizer):
                has_update = self._is_ours()  # which leaves some parameters to torch
                reasons.append("an option is not fused: torch updates the parameters of its group")
            elif has_update and not self._is_ours() and _C.operators_are_watched():
                has_update = False
                reasons_of_head.append(
                    "a mode, a transform or a profiler looks at PyTorch's operators"
                )
            elif not has_update and _IS_COMPILED:  # else that is the reason
                reasons_of_head.append(
                    "optimizer.step() and zero_grad() are called as they are: the optimizer is not "
                    "fused_step.SGD or torch.optim.SGD itself, or has been changed, or has hooks"
                )
            plan = "head" if has_head else "optimizer" if has_update else "plain"
            reasons += reasons_of_head
        reasons = list(dict.fromkeys(reasons))  # some hold for more than one plan
        return "\n".join([f"plan: {plan}", *(f"not deeper: {reason}" for reason in reasons)])

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        """Runs one training step.

        Args:
            input: what the model takes.
            target: what the loss function takes beside the model's output.

        Returns:
            The loss before the update, detached, 0-dim.

        Raises:
            Whatever the five lines raise.
        """
        loss = self._fused_step(input, target)
        return loss if loss is not None else self._loop_step(input, target)

    def _loop_step(self, input: Tensor, target: Tensor) -> Tensor:
        """The five lines, with what of them can be fused."""
        self._loop_plan = "optimizer" if self._has_fused_update() else "plain"
        if self._loss_function is None:
            return self._last_lines(self._model(input, target))
        parts = self._head.parts()
        if parts is None:
            return self._last_lines(self._loss_function(self._model(input), target))
        loss, is_done = self._loss_by_parts(*parts, input, target)
        return loss if is_done else self._last_lines(loss)

    def _loss_by_parts(
        self,
        body: tuple[_BodyPart, ...],
        linear: nn.Module,
        reading: int,
        input: Tensor,
        target: Tensor,
    ) -> tuple[Tensor, bool]:
        """Runs the model part by part; the loss, and whether the rest of the step is done, too.

        Where a part changes the way to the last layer, Python goes on from there.
        """
        hidden: Any = input
        after: list[Any] = []  # what is still done to a result, the outer ones first
        for module, last, calls, flatten in body:
            if flatten is not None:
                after.append(flatten)
            if last is not None:
                # forward() without its last call: what it would call, and on what.
                called, hidden = module(hidden)
                if called is not last or not self._head.confirms(reading):
                    return self._loss_of(called(hidden), after, target), False
            elif module is not None:
                modules = iter(module)
                after.append(modules)
                for _ in range(calls):
                    hidden = next(modules)(hidden)
                    if not self._head.confirms(reading):
                        return self._loss_of(hidden, after, target), False
                next(modules)  # is the next part, or the last layer
        loss = self._head.step(hidden, target)
        if loss is not None:
            self._loop_plan = "head"
            return loss, True
        loss = self._head.loss(hidden, target)
        if loss is not None:
            self._loop_plan = "head"
            return loss, False
        return self._loss_of(linear(hidden), after, target), False

    def _loss_of(self, output: Any, after: list[Any], target: Tensor) -> Tensor:
        for step in reversed(after):
            if callable(step):
                output = step(output)
            else:  # a Sequential's other modules
                for module in step:
                    output = module(output)
        return self._loss_function(output, target)  # type: ignore[misc]

    def _last_lines(self, loss: Tensor) -> Tensor:
        loss.backward()  # type: ignore[no-untyped-call]  # without annotations
        self._step_and_zero_grad()
        return loss.detach()

    def _step_and_zero_grad(self) -> None:
        """The last two lines, as one call where SGD's update is fused."""
        optimizer = self._optimizer
        if self._is_ours():
            optimizer.step(zero_grad=True)  # type: ignore[call-overload]
        elif is_stock_sgd(optimizer) and self._update(optimizer, GRAD_TO_NONE):
            if "step" in optimizer.__dict__:  # a scheduler's: it wants to know of the call
                optimizer._opt_called = True  # type: ignore[attr-defined]
        else:
            if self._loop_plan == "optimizer":  # as it had looked
                self._loop_plan = "plain"
            optimizer.step()
            optimizer.zero_grad()

    def _has_fused_update(self) -> bool:
        return _IS_COMPILED and (self._is_ours() or is_stock_sgd(self._optimizer))

    def _is_ours(self) -> bool:
        """Whether the optimizer is a fused_step.SGD as it was made."""
        optimizer = self._optimizer
        return (
            type(optimizer) is SGD
            and is_stock_sgd_step(optimizer.__dict__.get("step", SGD.step))
            and has_stock_zero_grad(optimizer)
        )

    def _loss_dtype(self) -> torch.dtype:
        """The model's, which its losses most likely would have."""
        of_model = (p.dtype for p in self._model.parameters() if p.is_floating_point())
        return next(of_model, torch.get_default_dtype())

    def run(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        epochs: int = 1,
        batch_size: int | None = None,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Runs many training steps: for each epoch, for each batch, ``step(batch)``.

        Args:
            inputs: [n, ...] all rows.
            targets: [n, ...] their targets.
            epochs: how many times to go through all rows.
            batch_size: rows of a batch; the last one of an epoch may be shorter. None: all rows.
            shuffle: go through the rows in the order ``torch.randperm(n, generator=generator)``,
                drawn anew each epoch.
            generator: source of that order; None: torch's default generator.
            progress: show a progress bar (needs tqdm).

        Returns:
            [epochs · ceil(n / batch_size)] the losses of all steps.

        Raises:
            ValueError: `inputs` and `targets` differ in their rows, or a number is out of range.
            TypeError: an argument is none of that.
            ImportError: `progress` without tqdm.
        """
        for name, tensor in (("inputs", inputs), ("targets", targets)):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"TrainStep.run: {name} must be a torch.Tensor, got {type(tensor).__qualname__}"
                )
            if tensor.dim() == 0:
                raise ValueError(
                    f"TrainStep.run: {name} must have a dimension of rows, got a 0-dim tensor"
                )
        n = inputs.shape[0]
        if targets.shape[0] != n:
            raise ValueError(
                f"TrainStep.run: targets must have as many rows as inputs ({n}), "
                f"got {targets.shape[0]}"
            )
        epochs = _integer("epochs", epochs)
        if epochs < 0:
            raise ValueError(f"TrainStep.run: epochs must not be negative, got {epochs}")
        batch_size = max(n, 1) if batch_size is None else _integer("batch_size", batch_size)
        if batch_size < 1:
            raise ValueError(f"TrainStep.run: batch_size must be at least 1, got {batch_size}")
        batch_size = min(batch_size, max(n, 1))  # however large: it fits 64 bits from here on

        if not isinstance(shuffle, bool):
            raise TypeError(f"TrainStep.run: shuffle must be a bool, got {shuffle!r}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                "TrainStep.run: generator must be a torch.Generator or None, "
                f"got {type(generator).__qualname__}"
            )
        if epochs * max(math.ceil(n / batch_size), 1) >= 1 << 63:
            raise ValueError(
                f"TrainStep.run: epochs must give fewer than 2**63 steps, got {epochs} epochs"
            )

        bar = _progress_bar(epochs * math.ceil(n / batch_size)) if progress else None
        try:
            if type(self).__call__ is TrainStep.__call__:
                fused = self._fused.run(
                    inputs,
                    targets,
                    epochs,
                    batch_size,
                    shuffle,
                    generator,
                    None if bar is None else lambda done: bar.update(done - bar.n),
                )
                if fused is not None:
                    return fused
            losses = []
            for input, target in _batches(inputs, targets, epochs, batch_size, shuffle, generator):
                losses.append(self(input, target))
                if bar is not None:
                    bar.update()
        finally:
            if bar is not None:
                bar.close()
        if not losses:
            return torch.empty(0, dtype=self._loss_dtype(), device=inputs.device)
        return torch.stack(losses)


def _integer(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"TrainStep.run: {name} must be an integer, got {value!r}") from None


def _batches(
    inputs: Tensor,
    targets: Tensor,
    epochs: int,
    batch_size: int,
    shuffle: bool,
    generator: torch.Generator | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    n = inputs.shape[0]
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator) if shuffle else None
        for first in range(0, n, batch_size):
            rows: slice | Tensor = slice(first, first + batch_size)
            if order is not None:
                rows = order[rows].to(inputs.device)
            yield inputs[rows], targets[rows]


def _progress_bar(steps: int) -> Any:
    """A tqdm bar over `steps` steps."""
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "TrainStep.run: progress=True needs tqdm; install it with `pip install tqdm`"
        ) from error
    return tqdm(total=steps, unit="step")
