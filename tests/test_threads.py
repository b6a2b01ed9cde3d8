# SPDX-License-Identifier: MIT
"""Two models in two Python threads, through every door: the bits of one after the other.

tests/test_run.py and tests/test_sgd_surroundings.py have two runs and two large optimizers. The
loops below the doors are looked at by ThreadSanitizer (tests/cpp/threads_test.cpp). The extension
as a whole is not: torch, Python and the OpenMP runtime are not instrumented, and every join of its
threads would be reported as a race.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import pytest
import torch
from oracle import FUSED_PLANS, Problem
from torch import Tensor, nn

import fused_step

Job = Callable[[], list[Tensor]]
STEPS = 10
pytestmark = pytest.mark.cpu_only("threads that share cores")


def step_job(B: int, I: int, O: int, seed: int) -> list[Tensor]:
    problem = Problem.random(B, I, O, options={"momentum": 0.9}, seed=seed)
    model, loss_function, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    losses = [step(problem.input, problem.target) for _ in range(STEPS)]
    assert step.plan in FUSED_PLANS
    return [torch.stack(losses), model.weight.detach(), model.bias.detach()]


def run_job(B: int, I: int, O: int, seed: int) -> list[Tensor]:
    problem = Problem.random(B, I, O, seed=seed)
    model, loss_function, optimizer = problem.build()
    step = fused_step.TrainStep(model, loss_function, optimizer)
    generator = torch.Generator().manual_seed(seed)
    losses = step.run(
        problem.input,
        problem.target,
        epochs=STEPS,
        batch_size=max(1, B // 2),
        shuffle=True,
        generator=generator,
    )
    assert step.plan in FUSED_PLANS
    return [losses, model.weight.detach(), model.bias.detach()]


def loss_job(B: int, I: int, O: int, seed: int) -> list[Tensor]:
    problem = Problem.random(B, I, O, seed=seed)
    weight, bias = nn.Parameter(problem.weight.clone()), nn.Parameter(problem.bias.clone())
    found = []
    for _ in range(STEPS):
        input = problem.input.clone().requires_grad_()
        loss = fused_step.linear_mse_loss(input, weight, problem.target, linear_bias=bias)
        loss.backward()
        found += [loss.detach(), input.grad]
    return [*found, weight.grad, bias.grad]


def sgd_job(B: int, I: int, O: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(n, generator=generator)) for n in (B * I, O, 1)]
    optimizer = fused_step.SGD(params, lr=0.1, momentum=0.9, max_grad_norm=1.0)
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step(zero_grad=True)
    return [p.detach() for p in params]


JOBS = {"step": step_job, "run": run_job, "loss": loss_job, "sgd": sgd_job}
# With the GIL held, with it given away and several chunks, and by the gemm plan.
SHAPES = {"small": (7, 5, 2), "large": (3000, 64, 3), "many outputs": (64, 40, 70)}


def in_threads(jobs: list[Job], at_once: bool) -> list[list[Tensor]]:
    """The results of jobs, each in a thread of its own."""
    found: list[list[Tensor] | None] = [None] * len(jobs)
    start = threading.Barrier(len(jobs) if at_once else 1)

    def work(index: int) -> None:
        # A new thread has the default number of threads below it.
        torch.set_num_threads(2)
        start.wait()
        found[index] = jobs[index]()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
        if not at_once:
            thread.join()
    for thread in threads:
        thread.join()
    assert all(result is not None for result in found), "a thread has raised"
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("first", "second"), [*((name, name) for name in JOBS), ("step", "sgd"), ("run", "loss")]
)
def test_two_models_in_two_threads_have_the_bits_of_one_after_the_other(first, second, shape):
    jobs = [
        lambda name=name, seed=seed: JOBS[name](*SHAPES[shape], seed)
        for seed, name in enumerate((first, second))
    ]
    alone, together = in_threads(jobs, at_once=False), in_threads(jobs, at_once=True)
    for a, b in zip(alone, together, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


def test_two_threads_may_share_a_step():
    """What they compute is a race as it is in the plain loop; the process goes on."""
    model = nn.Linear(512, 64)
    step = fused_step.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=1e-4))
    torch.set_num_threads(1)
    failures = []

    def go(rows: int) -> None:
        try:
            for k in range(200):
                B = rows * (1 + k % 7)
                step(torch.randn(B, 512), torch.randn(B, 64))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=go, args=(rows,)) for rows in (64, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.isfinite(model.weight).all()
    assert not failures


def replace(model: nn.Linear, optimizer: torch.optim.SGD, new: nn.Parameter) -> None:
    model._parameters["weight"] = optimizer.param_groups[0]["params"][0] = new


def swap(model: nn.Linear, optimizer: torch.optim.SGD, new: nn.Parameter) -> None:
    with contextlib.suppress(RuntimeError):  # in the middle of a step: it is in use
        torch.utils.swap_tensors(model.weight, new)


@pytest.mark.parametrize("take_away", [replace, swap])
def test_parameter_that_another_thread_takes_away_outlives_the_step(take_away):
    """Half a megabyte, which malloc gives back to the system when it is freed."""
    model = nn.Linear(4096, 32, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    step = fused_step.TrainStep(model, nn.MSELoss(), optimizer)
    x, t = torch.randn(64, 4096), torch.randn(64, 32)
    done = threading.Event()
    times = 0

    def take() -> None:
        nonlocal times
        while not done.is_set():
            take_away(model, optimizer, nn.Parameter(torch.zeros(32, 4096)))
            times += 1

    thread = threading.Thread(target=take)
    thread.start()
    plans = set()
    for _ in range(300):
        assert torch.isfinite(step(x, t))
        plans.add(step.plan)
    done.set()
    thread.join()
    assert times > 0
    assert plans & {"one-pass", "gemm"}
