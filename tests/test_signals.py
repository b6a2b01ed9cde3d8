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
