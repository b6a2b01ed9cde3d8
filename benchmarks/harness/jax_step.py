# SPDX-License-Identifier: MIT
"""The step in JAX: one jitted call a step, and lax.scan over many. In processes of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from harness.case import Case, Data
from harness.contestant import Contestant, Trajectory, Unavailable, collector_off

State = tuple[Any, Any]  # weight [O, I], bias [O]


def _import_jax() -> Any:
    # XLA's CPU client takes its number of threads from the affinity mask, not from a variable.
    threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    if threads and hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[:threads])
    try:
        import jax
    except ImportError as error:
        raise Unavailable(f"JAX is not installed: {error}") from None
    return jax


def _make_step(jax: Any, case: Case) -> Callable[[State, Any, Any], tuple[State, Any]]:
    def loss_of(state: State, x: Any, target: Any) -> Any:
        weight, bias = state
        return ((x @ weight.T + bias - target) ** 2).mean()

    def step(state: State, x: Any, target: Any) -> tuple[State, Any]:
        loss, gradients = jax.value_and_grad(loss_of)(state, x, target)
        rate = case.learning_rate
        return tuple(p - rate * g for p, g in zip(state, gradients, strict=True)), loss

    return step


class JaxStep(Contestant):
    """One call of a jitted step with donated parameters, ended by a wait for the last one."""

    of_torch = False
    imports = ("jax",)
    settle_seconds = 0.050

    def prepare(self, data: Data) -> None:
        jax = self._jax = _import_jax()
        self._x, self._target = jax.numpy.asarray(data.x), jax.numpy.asarray(data.target)
        self._state: State = (jax.numpy.array(data.weight), jax.numpy.array(data.bias))
        step = jax.jit(_make_step(jax, data.case), donate_argnums=0)
        # Another state: the call compiles, and what is donated is gone.
        state = jax.tree.map(jax.numpy.copy, self._state)
        jax.block_until_ready(step(state, self._x, self._target))
        del state
        self._step = step
        self._loss: Any = None

    def trajectory(self, steps: int) -> Trajectory:
        losses = []
        for _ in range(steps):
            self._state, loss = self._step(self._state, self._x, self._target)
            losses.append(float(loss))
        return Trajectory(np.array(losses), *(np.array(p) for p in self._state))

    def sample(self, steps: int) -> float:
        step, state, x, target, loss = self._step, self._state, self._x, self._target, None
        with collector_off():
            start = time.perf_counter_ns()
            for _ in range(steps):
                state, loss = step(state, x, target)
            self._jax.block_until_ready((state, loss))
            stop = time.perf_counter_ns()
        self._state, self._loss = state, loss
        return (stop - start) * 1e-9

    def last_loss(self) -> float | None:
        return None if self._loss is None else float(self._loss)

    def describe(self) -> dict[str, str]:
        return {"jax": self._jax.__version__}

    def release(self) -> None:
        self._step = self._state = self._x = self._target = None


class JaxScan(JaxStep):
    """Many steps in one jitted call, by jax.lax.scan; compiled once for each number of steps."""

    def prepare(self, data: Data) -> None:
        super().prepare(data)
        jax = self._jax
        one = _make_step(jax, data.case)

        def many(state: State, x: Any, target: Any, steps: int) -> tuple[State, Any]:
            return jax.lax.scan(lambda s, _: one(s, x, target), state, length=steps)

        self._jitted = jax.jit(many, donate_argnums=0, static_argnums=3)
        self._compiled: dict[int, Any] = {}  # by the number of steps

    def _many(self, steps: int) -> Any:
        if steps not in self._compiled:
            lowered = self._jitted.lower(self._state, self._x, self._target, steps)
            self._compiled[steps] = lowered.compile()
        return self._compiled[steps]

    def ready(self, steps: int) -> None:
        self._many(steps)

    def trajectory(self, steps: int) -> Trajectory:
        self._state, losses = self._many(steps)(self._state, self._x, self._target)
        return Trajectory(np.array(losses), *(np.array(p) for p in self._state))

    def sample(self, steps: int) -> float:
        many = self._many(steps)
        with collector_off():
            start = time.perf_counter_ns()
            self._state, losses = many(self._state, self._x, self._target)
            self._jax.block_until_ready((self._state, losses))
            stop = time.perf_counter_ns()
        self._loss = losses[-1]
        return (stop - start) * 1e-9

    def release(self) -> None:
        super().release()
        self._jitted = self._compiled = None
