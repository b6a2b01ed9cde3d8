# SPDX-License-Identifier: MIT
"""What stands around an optimizer: hooks, profiler, schedulers, threads, torch.compile."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref

import pytest
import torch
from sgd_oracle import MOMENTUM, Twins, copy_of, momentum_of, random_params, torch_sgd
from test_train_step_schedulers import SCHEDULERS
from torch.nn import Parameter
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fused_step


def one_parameter():
    weight = Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    return weight


def test_step_hooks_run_in_torchs_order_with_torchs_arguments():
    seen = {}
    for make in (fused_step.SGD, torch.optim.SGD):
        weight = one_parameter()
        optimizer = make([weight], lr=0.5)
        log = seen[make] = []

        def note(name, log=log, weight=weight, mine=optimizer):
            def hook(given, args, kwargs):
                assert given is mine
                assert args[0] is mine
                log.append((name, len(args), dict(kwargs), weight.tolist()))

            return hook

        handles = [
            register_optimizer_step_pre_hook(note("global pre")),
            register_optimizer_step_post_hook(note("global post")),
            optimizer.register_step_pre_hook(note("pre 1")),
            optimizer.register_step_pre_hook(note("pre 2")),
            optimizer.register_step_post_hook(note("post 1")),
        ]
        optimizer.step()
        optimizer.step(lambda: torch.zeros(()))
        for handle in handles:
            handle.remove()
        optimizer.step()
    assert seen[fused_step.SGD] == seen[torch.optim.SGD]
    assert len(seen[fused_step.SGD]) == 2 * 5


def test_a_pre_hook_may_replace_the_arguments():
    weight = one_parameter()
    optimizer = fused_step.SGD([weight], lr=0.5)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 42), {}))
    assert optimizer.step() == 42
    optimizer.register_step_pre_hook(lambda o, args, kwargs: "no")
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


def test_a_subclass_with_a_step_of_its_own_runs_hooks_once():
    calls = []

    class Louder(fused_step.SGD):
        def step(self, closure=None):
            calls.append("step")
            return super().step(closure)

    weight = one_parameter()
    optimizer = Louder([weight], lr=0.5)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step()
    assert calls == ["pre", "step", "post"]
    assert torch.equal(weight, torch.full((3,), 0.5))


def test_a_subclass_with_parts_of_its_own_is_asked():
    class Picky(fused_step.SGD):
        def _init_group(self, group, params, grads, momentum_buffer_list):
            return super()._init_group(
                {**group, "params": group["params"][:1]}, params, grads, momentum_buffer_list
            )

        def zero_grad(self, set_to_none=True):
            super().zero_grad(set_to_none=False)

    first, second = one_parameter(), one_parameter()
    Picky([first, second], lr=0.5).step(zero_grad=True)
    assert torch.equal(first, torch.full((3,), 0.5))
    assert torch.equal(second, torch.ones(3))
    assert torch.equal(first.grad, torch.zeros(3))


def test_the_profiler_sees_torchs_range():
    weight = one_parameter()
    optimizer = fused_step.SGD([weight], lr=0.5)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step(zero_grad=True)
    names = [event.key for event in profile.key_averages()]
    assert "Optimizer.step#SGD.step" in names
    assert "Optimizer.zero_grad#SGD.zero_grad" in names
    assert torch.equal(weight, torch.zeros(3))


def test_a_small_step_is_not_wrapped_by_torch():
    fused_step.SGD([one_parameter()], lr=0.5)
    assert not hasattr(fused_step.SGD.step, "__wrapped__")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_it_as_they_drive_torchs(name):
    twins = Twins(random_params(9, 33), lr=0.02, momentum=0.9)
    schedulers = [SCHEDULERS[name](optimizer) for optimizer in twins.optimizers()]
    for _ in range(12):
        twins.step()
        for scheduler in schedulers:
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step(1.0)
            else:
                scheduler.step()
        twins.check(name)


def test_a_scheduler_that_steps_first_is_warned_of():
    optimizer = fused_step.SGD([one_parameter()], lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        scheduler.step()


def test_zero_grad_is_torchs():
    weight = one_parameter()
    grad = weight.grad
    optimizer = fused_step.SGD([weight], lr=0.5)
    optimizer.zero_grad(set_to_none=False)
    assert weight.grad is grad
    assert not grad.any()
    optimizer.zero_grad()
    assert weight.grad is None


def test_optimizers_are_collected_with_their_parameters():
    weight = one_parameter()
    optimizer = fused_step.SGD([weight], **MOMENTUM)
    optimizer.step()
    gone = weakref.ref(weight), weakref.ref(optimizer)
    del weight, optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_gradients_are_not_kept_alive():
    weight = Parameter(torch.ones(200_000))
    optimizer = fused_step.SGD([weight], lr=0.5)
    weight.grad = torch.ones(200_000)
    gone = weakref.ref(weight.grad)
    optimizer.step()
    weight.grad = None
    assert gone() is None
    weight.grad = torch.ones(200_000)
    gone = weakref.ref(weight.grad)
    optimizer.step(zero_grad=True)
    assert gone() is None


def test_steps_of_two_optimizers_in_two_threads():
    twins = [Twins(random_params(70_000, 33, seed=k), **MOMENTUM) for k in range(2)]

    def work(k):
        twins[k].step(steps=5)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for twin in twins:
        twin.check()


@pytest.mark.cpu_only("a step on a GPU is enqueued before another thread is awake")
def test_other_threads_run_while_a_large_step_does():
    weight = Parameter(torch.ones(4_000_000))
    weight.grad = torch.ones(4_000_000)
    optimizer = fused_step.SGD([weight], lr=0.0)
    stop, turns = threading.Event(), []

    def count():
        while not stop.is_set():
            turns.append(1)
            time.sleep(0)  # gives the GIL back

    thread = threading.Thread(target=count)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(100.0)  # only who gives the GIL away lets others run
    try:
        thread.start()
        before = len(turns)
        for _ in range(20):
            optimizer.step()
        assert len(turns) > before
    finally:
        stop.set()
        sys.setswitchinterval(switch)
        thread.join()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        )

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("momentum", (0.0, 0.9))
@pytest.mark.parametrize("whole", (True, False), ids=("whole step", "optimizer alone"))
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_torch_compile_of_a_training_step(whole, momentum):
    start, x, t = Net(), torch.randn(16, 4), torch.randn(16, 1)
    trained = []
    for make, compiled in ((fused_step.SGD, True), (torch_sgd, False)):
        torch._dynamo.reset()
        model = Net()
        model.load_state_dict(start.state_dict())
        optimizer = make(model.parameters(), lr=0.1, momentum=momentum)

        def backward(model=model):
            loss = torch.nn.functional.mse_loss(model(x), t)
            loss.backward()
            return loss.detach()

        def step(backward=backward, optimizer=optimizer):
            loss = backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        update = optimizer.step
        if compiled and whole:
            step = torch.compile(step, backend="eager")
        elif compiled:
            update = torch.compile(lambda optimizer=optimizer: optimizer.step(), backend="eager")
        losses = []
        for _ in range(4):
            if whole:
                losses.append(step())
            else:
                losses.append(backward())
                update()
                optimizer.zero_grad()
        trained.append([*losses, *(p.detach() for p in model.parameters())])
        if momentum:
            assert all(momentum_of(optimizer, p) is not None for p in model.parameters())
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore")
def test_hooks_run_in_a_compiled_step():
    torch._dynamo.reset()
    weight = one_parameter()
    optimizer = fused_step.SGD([weight], lr=0.5)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    step()
    step()
    assert seen == ["pre", "post"] * 2
    assert torch.equal(weight, torch.zeros(3))


@pytest.mark.cpu_only("a mesh of CPUs")
@pytest.mark.filterwarnings("ignore")
def test_dtensor_parameters(tmp_path):
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for placement in (Shard(0), Replicate()):
            start, grad = torch.randn(6, 3), torch.randn(6, 3)
            weight = Parameter(distribute_tensor(start, mesh, [placement]))
            plain = copy_of(start)
            optimizers = fused_step.SGD([weight], **MOMENTUM), torch_sgd([plain], **MOMENTUM)
            for _ in range(3):
                weight.grad = distribute_tensor(grad, mesh, [placement])
                plain.grad = grad.clone()
                for optimizer in optimizers:
                    optimizer.step()
            assert isinstance(weight, DTensor)
            assert torch.equal(weight.full_tensor(), plain)
            assert isinstance(momentum_of(optimizers[0], weight), DTensor)
    finally:
        dist.destroy_process_group()


def test_torch_updates_one_tensor_after_the_other_and_leaves_gradients_as_they_are(monkeypatch):
    """Many at once, its default on CUDA, it adds Nesterov's momentum to p.grad."""
    taken = []
    update = fused_step.optim.sgd

    def noted(*args, foreach, **keywords):
        taken.append(foreach)
        return update(*args, foreach=foreach, **keywords)

    monkeypatch.setattr(fused_step.optim, "sgd", noted)
    for nesterov in (False, True):
        param = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))  # torch's to update
        optimizer = fused_step.SGD([param], lr=0.1, momentum=0.9, nesterov=nesterov)
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert torch.equal(param.grad, torch.ones_like(param))
    assert taken == [False, False]
