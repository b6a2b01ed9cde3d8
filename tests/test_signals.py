# SPDX-License-Identifier: MIT
"""Signals in the middle of run(), in every kind of plan.

tests/test_run.py has Ctrl-C itself, in processes of its own; here the signal is SIGUSR1, whose
handler raises or does not, and SIGTERM as it comes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from oracle import GEMM, ONE_PASS
from torch import Tensor, nn

import fused_step

# Rows, inputs, outputs, the loss, and the plans that they give.
KINDS = {
    "one-pass": (2000, 16, 1, nn.MSELoss(), ONE_PASS),
    "gemm": (300, 32, 64, nn.MSELoss(), GEMM),
    "optimizer": (2000, 16, 1, nn.L1Loss(), ("optimizer",)),
}
# For steps of some 10 µs: far more than run() can make before the signal.
FOREVER = 10**7
each_kind = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.cpu_only("signals are looked for by the CPU's loop")


class Stop(Exception):
    """What a handler raises."""


@pytest.fixture
def on_signal() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Calls a function at SIGUSR1, which comes after 0.2 s."""
    before = signal.getsignal(signal.SIGUSR1)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))

    def arrange(call: Callable[[], None]) -> None:
        signal.signal(signal.SIGUSR1, lambda number, frame: call())
        timer.start()

    yield arrange
    timer.cancel()
    signal.signal(signal.SIGUSR1, before)


def build(kind: str) -> tuple[fused_step.TrainStep, Tensor, Tensor]:
    """A step without bias or momentum, whose weight alone is all of its state, and its data."""
    B, I, O, loss_function, _ = KINDS[kind]
    torch.set_num_threads(1)
    torch.manual_seed(1)
    inputs, targets = torch.randn(B, I), torch.randn(B, O)
    model = nn.Linear(I, O, bias=False)
    # So slow that every step moves the weights, and never back.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, foreach=False)
    return fused_step.TrainStep(model, loss_function, optimizer), inputs, targets


@each_kind
def test_handler_that_raises_ends_the_run_after_a_whole_step(kind, on_signal):
    step, inputs, targets = build(kind)
    start = step.model.weight.detach().clone()
    raised_at = []

    def handler() -> None:
        raised_at.append(time.perf_counter())
        raise Stop

    on_signal(handler)
    with pytest.raises(Stop):
        step.run(inputs, targets, epochs=FOREVER)
    assert time.perf_counter() - raised_at[0] < 1.0
    ours = step.model.weight.detach()
    assert not torch.equal(ours, start)

    twin, _, _ = build(kind)
    deadline = time.perf_counter() + 60
    while not torch.equal(twin.model.weight, ours):
        twin(inputs, targets)
        assert time.perf_counter() < deadline, "not the weights after any number of whole steps"
    assert twin.plan in KINDS[kind][-1]
    # And both go on from there; the plain loop may have been stopped with gradients in place.
    step.optimizer.zero_grad()
    for _ in range(2):
        assert torch.equal(step(inputs, targets), twin(inputs, targets))
    assert torch.equal(step.model.weight, twin.model.weight)


@each_kind
def test_handler_that_does_not_raise_lets_the_run_go_on(kind, on_signal):
    step, inputs, targets = build(kind)
    start = time.perf_counter()
    step.run(inputs, targets, epochs=100)
    # Four times as long as the signal needs.
    epochs = 100 * max(1, round(0.8 / (time.perf_counter() - start)))
    found, calls = [], []
    for disturbed in (False, True):
        step, inputs, targets = build(kind)
        if disturbed:
            on_signal(lambda: calls.append(time.perf_counter()))
        losses = step.run(inputs, targets, epochs=epochs)
        end = time.perf_counter()
        found.append((losses, step.model.weight.detach().clone()))
    assert len(calls) == 1
    assert calls[0] < end
    for alone, disturbed in zip(*found, strict=True):
        assert torch.equal(alone, disturbed)


TERMINATED = """
    import torch, fused_step
    from torch import nn

    model = nn.Linear(16, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    step = fused_step.TrainStep(model, nn.{loss}(), optimizer)
    inputs, targets = torch.randn(2000, 16), torch.randn(2000, 1)
    step(inputs, targets)
    print(step.plan, flush=True)
    step.run(inputs, targets, epochs=10**7)
"""


def test_sigterm_ends_the_process_at_once():
    """Nothing here keeps the signal from doing what it does to any process."""
    processes = {
        plan: subprocess.Popen(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(TERMINATED).format(loss=loss)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for plan, loss in (("one-pass", "MSELoss"), ("optimizer", "L1Loss"))
    }
    try:
        for plan, process in processes.items():
            assert process.stdout.readline().strip() == plan
            time.sleep(0.2)  # into the run
            assert process.poll() is None
            process.terminate()
            assert process.wait(timeout=5) == -signal.SIGTERM
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def test_handler_runs_in_the_world_of_the_caller(on_signal):
    """Autograd records, updates in place are counted, and views are known as views."""
    step, inputs, targets = build("gemm")
    found = []

    def handler() -> None:
        weight, z = torch.ones(3, requires_grad=True), torch.zeros(3)
        z.add_(1)
        (2 * weight).sum().backward()
        found.append((weight.grad.tolist(), z._version, z[:2]._is_view()))
        raise Stop

    on_signal(handler)
    with pytest.raises(Stop):
        step.run(inputs, targets, epochs=FOREVER)
    assert found == [([2.0] * 3, 1, True)]


def test_handler_may_step_meanwhile(on_signal):
    """A call within a call is no fused one, and disturbs none."""
    step, inputs, targets = build("gemm")
    plans = []

    def handler() -> None:
        step(inputs[:7], targets[:7])
        plans.append(step.plan)
        raise Stop

    on_signal(handler)
    with pytest.raises(Stop):
        step.run(inputs, targets, epochs=FOREVER)
    assert len(plans) == 1
    assert all(p.grad is None for p in step.model.parameters())
    assert torch.isfinite(step(inputs, targets))
    assert step.plan in GEMM


def test_handler_in_a_first_run_finds_the_momentum_buffers(on_signal):
    step, inputs, targets = build("one-pass")
    step.optimizer.param_groups[0]["momentum"] = 0.9
    found = []

    def handler() -> None:
        found.append(step.optimizer.state[step.model.weight]["momentum_buffer"].clone())
        raise Stop

    on_signal(handler)
    with pytest.raises(Stop):
        step.run(inputs, targets, epochs=FOREVER)
    assert found[0].abs().max() > 0


# Handlers run at the first line of Python after the kernels, wherever that is.
@pytest.mark.parametrize("delay", [0.001, 0.003, 0.006, 0.012, 0.025])
@pytest.mark.parametrize("door", ["run", "step", "SGD"])
def test_signal_in_a_first_step_leaves_no_update_without_its_momentum(door, delay):
    sizes = {"run": (4096, 8, 1), "step": (4096, 512, 512), "SGD": (1, 2048, 2048)}
    B, I, O = sizes[door]
    model = nn.Linear(I, O)
    before = model.weight.detach().clone()
    x, t = torch.randn(B, I), torch.randn(B, O)
    make = fused_step.SGD if door == "SGD" else torch.optim.SGD
    optimizer = make(model.parameters(), lr=1e-3, momentum=0.9)
    step = fused_step.TrainStep(model, nn.MSELoss(), optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if door == "SGD" else None

    def handler(number, frame) -> None:
        raise Stop

    before_it = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        if door == "run":
            step.run(x, t, epochs=2500, batch_size=64)
        elif door == "step":
            step(x, t)
        else:
            optimizer.step()
    except Stop:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before_it)
    moved = not torch.equal(model.weight, before)
    assert ("momentum_buffer" in optimizer.state.get(model.weight, {})) == moved
