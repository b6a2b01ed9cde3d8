# SPDX-License-Identifier: MIT
"""Contestants on a GPU: the five lines, the step by hand, both in CUDA graphs, compiled, JAX, ours.

Each contestant makes `step(k)`, which takes batch k of the data and returns the loss.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from harness.contestant import Contestant, Unavailable, collector_off
from harness.gpu_case import GpuData, Span
from harness.gpu_oracle import GpuTrajectory

StepOf = Callable[[int], torch.Tensor]


class GpuContestant(Contestant):
    """`build` makes the step; `parameters` are changed by it in place."""

    settle_seconds = 0.0  # a sample ends when the device has nothing left to do

    def prepare(self, data: GpuData) -> None:
        self._data = data
        self._loss: torch.Tensor | None = None
        self._step = self.build(data)
        # Capturing and warming up has moved them.
        with torch.no_grad():
            for parameter, initial in zip(self.parameters(), (data.weight, data.bias), strict=True):
                parameter.copy_(initial)

    def build(self, data: GpuData) -> StepOf:
        raise NotImplementedError

    def parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The live (weight, bias)."""
        raise NotImplementedError

    def trajectory(self, steps: int) -> Any:
        losses = torch.stack([self._step(0).detach().clone() for _ in range(steps)])
        weight, bias = self.parameters()
        return GpuTrajectory(losses, weight.detach().clone(), bias.detach().clone())

    def sample(self, steps: int) -> float:
        step, batches = self._step, itertools.cycle(range(len(self._data.batches)))
        span = Span(self._data.case.device)
        with collector_off(), span.measured():
            for k in itertools.islice(batches, steps):
                loss = step(k)
        self._loss = loss
        return span.seconds

    def last_loss(self) -> float | None:
        return None if self._loss is None else float(self._loss.detach())

    def own_peak(self) -> int | None:
        """Bytes of a step, where they are not torch's allocator's."""
        return None

    def release(self) -> None:
        self._step = self._data = self._loss = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class OfModel(GpuContestant):
    """One whose parameters are those of an nn.Linear."""

    _model: torch.nn.Linear | None = None

    def parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._model.weight, self._model.bias

    def release(self) -> None:
        super().release()
        self._model = None


class Eager(OfModel):
    """The five lines, as every tutorial writes them."""

    def __init__(self, key: str, label: str, note: str = "", **sgd_options: Any):
        super().__init__(key, label, note)
        self._sgd_options = sgd_options

    def build(self, data: GpuData) -> StepOf:
        five_lines = self.five_lines(data)
        return lambda k: five_lines(*data.batches[k])

    def five_lines(self, data: GpuData) -> Callable[..., torch.Tensor]:
        model = self._model = data.model()
        loss_function = torch.nn.MSELoss()
        optimizer = self._optimizer = torch.optim.SGD(
            model.parameters(), lr=data.case.learning_rate, **self._sgd_options
        )

        def step(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            output = model(x)
            loss = loss_function(output, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return step

    def release(self) -> None:
        super().release()
        self._optimizer = None


def captured(step: Callable[..., torch.Tensor], data: GpuData) -> StepOf:
    """A graph of `step` for each batch; step k is a replay."""
    if data.case.device == "cpu":
        raise Unavailable("CUDA graphs need a GPU")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*data.batches[0])
    torch.cuda.current_stream().wait_stream(side)
    # By default torch captures on one stream, and all graphs captured there share a workspace of
    # cuBLAS that lies in the memory of the first: when that is freed, the others replay into it.
    stream = torch.cuda.Stream()
    if torch.version.cuda:
        torch._C._cuda_clearCublasWorkspaces()
    graphs = []
    for x, target in data.batches:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            loss = step(x, target)
        graphs.append((graph, loss.detach()))

    def replay(k: int) -> torch.Tensor:
        graph, loss = graphs[k]
        graph.replay()
        return loss

    return replay


class EagerInGraph(Eager):
    """The five lines captured in a CUDA graph."""

    def build(self, data: GpuData) -> StepOf:
        return captured(self.five_lines(data), data)


class Hand(GpuContestant):
    """The step in torch operations without autograd: the update is a GEMM into the weight."""

    def build(self, data: GpuData) -> StepOf:
        step = self.by_hand(data)
        return lambda k: step(*data.batches[k])

    def by_hand(self, data: GpuData) -> Callable[..., torch.Tensor]:
        case = data.case
        weight, bias = self._parameters = data.weight.clone(), data.bias.clone()
        alpha = -2.0 * case.learning_rate / (case.batch * case.outputs)

        def step(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            error = torch.addmm(bias, x, weight.T) - target
            loss = error.square().mean()
            weight.addmm_(error.T, x, alpha=alpha)
            bias.add_(error.sum(0), alpha=alpha)
            return loss

        return step

    def parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._parameters

    def trajectory(self, steps: int) -> Any:
        with torch.no_grad():
            return super().trajectory(steps)

    def sample(self, steps: int) -> float:
        # Once around a batch of steps, as someone who writes such a loop would do.
        with torch.no_grad():
            return super().sample(steps)

    def release(self) -> None:
        super().release()
        self._parameters = None


class HandInGraph(Hand):
    """The same, captured in a CUDA graph."""

    def build(self, data: GpuData) -> StepOf:
        with torch.no_grad():
            return captured(self.by_hand(data), data)


class Compiled(Hand):
    """torch.compile of the functional step, mode reduce-overhead: its own kernels, in graphs."""

    def build(self, data: GpuData) -> StepOf:
        case = data.case
        if case.device == "cpu":
            raise Unavailable("mode reduce-overhead needs a GPU")
        weight, bias = self._parameters = data.weight.clone(), data.bias.clone()
        rate, scale = case.learning_rate, 2.0 / (case.batch * case.outputs)

        def step(
            x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
        ) -> torch.Tensor:
            error = F.linear(x, weight, bias) - target
            loss = error.square().mean()
            dy = error * scale
            weight.sub_(rate * (dy.T @ x))
            bias.sub_(rate * dy.sum(0))
            return loss

        # At addresses that stay: else the graph refuses tensors that are changed in place, and
        # copies its input, which with several batches it does anyway.
        fixed = [weight, bias, *(data.batches[0] if len(data.batches) == 1 else ())]
        for tensor in fixed:
            torch._dynamo.mark_static_address(tensor)
        torch._dynamo.reset()
        compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False)

        def call(k: int) -> torch.Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(*data.batches[k], weight, bias)

        with torch.no_grad():
            for _ in range(3):  # compiles, then records
                call(0)
        return call


class Jax(Contestant):
    """jax.jit with donated parameters, on the same memory by DLPack; float32 without TF32."""

    of_torch = False
    settle_seconds = 0.0

    def prepare(self, data: GpuData) -> None:
        # Else JAX takes three quarters of the GPU's memory for itself.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        try:
            import jax
            import jax.numpy as jnp
        except ImportError as error:
            raise Unavailable(f"JAX cannot be imported: {error}") from None
        on_gpu = data.case.device != "cpu"
        if jax.default_backend() != ("gpu" if on_gpu else "cpu"):
            raise Unavailable(f"JAX runs on {jax.default_backend()} here")
        jax.config.update("jax_default_matmul_precision", "highest")
        self._jax, self._data = jax, data
        case = data.case
        rate, scale = case.learning_rate, 2.0 / (case.batch * case.outputs)

        def step(weight, bias, x, target):
            error = x @ weight.T + bias - target
            dy = error * scale
            weight = weight - rate * (dy.T @ x)
            bias = bias - rate * dy.sum(0)
            return jnp.square(error).mean(), weight, bias

        def shared(t: torch.Tensor) -> Any:
            return jax.dlpack.from_dlpack(t.detach())

        self._function = step
        self._call = jax.jit(step, donate_argnums=(0, 1))
        self._batches = [(shared(x), shared(t)) for x, t in data.batches]
        # Copies: what is donated is overwritten.
        self._parameters = [jnp.array(shared(t), copy=True) for t in (data.weight, data.bias)]
        self._loss: Any = None
        # A warm-up on copies of its own.
        self._step(*self._batches[0], [jnp.array(p, copy=True) for p in self._parameters])

    def _step(self, x: Any, target: Any, parameters: list[Any]) -> tuple[Any, list[Any]]:
        loss, *parameters = self._call(*parameters, x, target)
        return loss, parameters

    def trajectory(self, steps: int) -> Any:
        losses = []
        for _ in range(steps):
            loss, self._parameters = self._step(*self._batches[0], self._parameters)
            losses.append(torch.utils.dlpack.from_dlpack(loss).clone().reshape(()))
        weight, bias = (torch.utils.dlpack.from_dlpack(p).clone() for p in self._parameters)
        return GpuTrajectory(torch.stack(losses), weight, bias)

    def sample(self, steps: int) -> float:
        # JAX has streams of its own, which torch's events do not see: the host's clock, to the end.
        span, batches = Span("cpu"), itertools.cycle(self._batches)
        parameters = self._parameters
        self._jax.block_until_ready(parameters)
        with collector_off(), span.measured():
            for batch in itertools.islice(batches, steps):
                loss, parameters = self._step(*batch, parameters)
            self._jax.block_until_ready(parameters)
        self._loss, self._parameters = loss, parameters
        return span.seconds

    def last_loss(self) -> float | None:
        return None if self._loss is None else float(self._loss)

    def own_peak(self) -> int | None:
        """What XLA has planned: the peak of JAX's allocator cannot be reset."""
        compiled = self._call.lower(*self._parameters, *self._batches[0]).compile()
        planned = compiled.memory_analysis()
        if planned is None:
            raise RuntimeError("XLA tells nothing of its memory here")
        written = planned.output_size_in_bytes - planned.alias_size_in_bytes
        return planned.temp_size_in_bytes + written

    def release(self) -> None:
        self._call = self._batches = self._parameters = self._loss = self._data = None


class JaxScan(Jax):
    """Many steps in one jitted call, by jax.lax.scan; compiled once for each number of steps.

    All of them on the first batch: a scan over copies would copy them.
    """

    def prepare(self, data: GpuData) -> None:
        if len(data.batches) > 1:
            raise Unavailable("lax.scan steps on one batch: its rows would stay in L2")
        super().prepare(data)
        jax, one = self._jax, self._function

        def many(parameters: Any, x: Any, target: Any, steps: int) -> tuple[Any, Any]:
            def body(state: Any, _: Any) -> tuple[Any, Any]:
                loss, *state = one(*state, x, target)
                return tuple(state), loss

            return jax.lax.scan(body, tuple(parameters), length=steps)

        self._jitted = jax.jit(many, donate_argnums=0, static_argnums=3)
        self._compiled: dict[int, Any] = {}  # by the number of steps

    def _run(self, steps: int) -> Any:
        """Takes them and returns their losses."""
        self.ready(steps)
        call = self._compiled[steps]
        self._parameters, losses = call(tuple(self._parameters), *self._batches[0])
        return losses

    def ready(self, steps: int) -> None:
        arguments = (tuple(self._parameters), *self._batches[0])
        if steps not in self._compiled:
            self._compiled[steps] = self._jitted.lower(*arguments, steps).compile()

    def trajectory(self, steps: int) -> Any:
        losses = torch.utils.dlpack.from_dlpack(self._run(steps)).clone()
        weight, bias = (torch.utils.dlpack.from_dlpack(p).clone() for p in self._parameters)
        return GpuTrajectory(losses, weight, bias)

    def sample(self, steps: int) -> float:
        self.ready(steps)
        span = Span("cpu")
        self._jax.block_until_ready(self._parameters)
        with collector_off(), span.measured():
            losses = self._run(steps)
            self._jax.block_until_ready((losses, self._parameters))
        self._loss = losses[-1]
        return span.seconds

    def release(self) -> None:
        super().release()
        self._jitted = self._compiled = self._function = None


def _train_step(model: torch.nn.Linear, rate: float) -> Any:
    try:
        import fused_step
    except ImportError as error:
        raise Unavailable(f"fused_step cannot be imported: {error}") from None
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    return fused_step.TrainStep(model, torch.nn.MSELoss(), optimizer)


class Step(OfModel):
    """`loss = step(input, target)`."""

    ours = True
    _train: Any = None

    def build(self, data: GpuData) -> StepOf:
        self._model = data.model()
        step = self._train = _train_step(self._model, data.case.learning_rate)
        return lambda k: step(*data.batches[k])

    def describe(self) -> dict[str, str]:
        return {"plan": str(self._train.plan)}

    def release(self) -> None:
        super().release()
        self._train = None


class StepOfPlan(Step):
    """The same by a plan that is named."""

    def __init__(self, key: str, label: str, plan: str):
        super().__init__(key, label)
        self._plan = plan

    def build(self, data: GpuData) -> StepOf:
        step = super().build(data)
        with self._chosen():
            step(0)
        if self._train.plan != self._plan:
            raise Unavailable(f"the plan {self._plan} has no kernel for these sizes")
        return step

    def trajectory(self, steps: int) -> Any:
        with self._chosen():
            return super().trajectory(steps)

    def sample(self, steps: int) -> float:
        with self._chosen():
            return super().sample(steps)

    @contextlib.contextmanager
    def _chosen(self) -> Iterator[None]:
        if self._data.case.device == "cpu":
            raise Unavailable("plans are chosen by name on a GPU alone")
        from fused_step._extension import _C

        _C.use_cuda_plan(self._plan)
        try:
            yield
        finally:
            _C.use_cuda_plan(None)


class StepInGraph(Step):
    """The same, captured in a CUDA graph."""

    def build(self, data: GpuData) -> StepOf:
        super().build(data)
        return captured(self._train, data)


class Run(Step):
    """`losses = step.run(inputs, targets, epochs=n, batch_size=B)`: many steps a call."""

    def trajectory(self, steps: int) -> Any:
        x, target = self._data.batches[0]
        losses = self._train.run(x, target, epochs=steps, batch_size=self._data.case.batch)
        weight, bias = self.parameters()
        return GpuTrajectory(losses, weight.detach().clone(), bias.detach().clone())

    def sample(self, steps: int) -> float:
        data, span = self._data, Span(self._data.case.device)
        epochs = max(1, round(steps / len(data.batches)))
        with collector_off(), span.measured():
            losses = self._train.run(
                data.inputs, data.targets, epochs=epochs, batch_size=data.case.batch
            )
        self._loss = losses[-1]
        return span.seconds * steps / losses.numel()
