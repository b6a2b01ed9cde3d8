# SPDX-License-Identifier: MIT
"""What fused_step.SGD does on CUDA alone: launches, waiting, streams, graphs, several GPUs.

What a step computes there is in the other files, run with `pytest --device cuda`.
"""

from __future__ import annotations

import pytest
import torch
from device import DEVICE
from gpu_probe import BUSY_CYCLES, launches_of, waiting_is_an_error
from oracle import same_bits
from sgd_oracle import MOMENTUM, copy_of, momentum_of, random_params, torch_sgd
from torch.nn import Parameter

import fused_step
from fused_step._extension import _C

if DEVICE.type != "cuda":
    pytest.skip("needs a GPU: run with --device cuda", allow_module_level=True)
if not hasattr(_C, "cuda_archs"):
    pytest.skip("this is a CPU build of fused_step", allow_module_level=True)

OPTIONS = {**MOMENTUM, "weight_decay": 0.01, "nesterov": True}
SHAPES = (1, 3, 64, 1000, (33, 7), 4096, 4097, 100_003)


def make(**options) -> tuple[list[Parameter], fused_step.SGD]:
    """Parameters with gradients, two steps on: buffers and tables are as they will stay."""
    params = [copy_of(p) for p in random_params(*SHAPES)]
    set_grads(params, 1)
    optimizer = fused_step.SGD(params, **{**OPTIONS, **options})
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    return params, optimizer


def set_grads(params: list[Parameter], seed: int) -> None:
    """New values in the gradients that are there, or new ones."""
    for p, g in zip(params, random_params(*SHAPES, dtype=params[0].dtype, seed=seed), strict=True):
        if p.grad is None:
            p.grad = g.to(p.device)
        else:
            p.grad.copy_(g)


def assert_same(ours: list[Parameter], theirs: list[Parameter]) -> None:
    for k, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        assert same_bits(p.detach(), q.detach().to(p.device)), k


# --- launches -----------------------------------------------------------------------------------


def test_one_launch_for_all_tensors_of_a_group_and_dtype():
    _, optimizer = make()
    assert len(launches_of(lambda: optimizer._engine.update(optimizer, None))) == 1
    assert len(launches_of(lambda: optimizer._engine.update(optimizer, None))) == 1


def test_one_launch_for_each_group_and_dtype():
    params = random_params(9, 33, 4)
    params = [*map(copy_of, params), Parameter(torch.ones(5, dtype=torch.bfloat16))]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = fused_step.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    optimizer.step()
    assert len(launches_of(lambda: optimizer._engine.update(optimizer, None))) == 3


def test_the_norm_is_a_launch_of_its_own():
    _, optimizer = make(max_grad_norm=1.0)
    assert len(launches_of(lambda: optimizer._engine.update(optimizer, None))) == 2


def test_a_pointer_that_changes_is_a_launch_more():
    params, optimizer = make()
    params[2].grad = params[2].grad.clone()
    launched = launches_of(lambda: optimizer._engine.update(optimizer, None))
    assert len(launched) == 2, launched
    assert len(launches_of(lambda: optimizer._engine.update(optimizer, None))) == 1


def test_tables_survive_changes_of_everything_in_them():
    params, optimizer = make()
    twins = [copy_of(p) for p in params]
    torch_optimizer = torch_sgd(twins, **OPTIONS)
    for p, q in zip(params, twins, strict=True):
        torch_optimizer.state[q]["momentum_buffer"] = momentum_of(optimizer, p).clone()
    for number in range(12):
        for params_of in (params, twins):
            for p in params_of:
                p.grad = None
            set_grads(params_of, 10 + number)
            if number % 3 == 1:
                params_of[number % len(SHAPES)].grad = None
        if number == 6:
            params[3].data, twins[3].data = torch.ones(1000), torch.ones(1000)
        optimizer.step()
        torch_optimizer.step()
        assert_same(params, twins)


# Of the second, the tables are larger than what a launch takes by value.
@pytest.mark.parametrize("count", (30, 1500))
@pytest.mark.parametrize("captured", (False, True))
def test_tables_of_any_size_reach_the_device(count, captured):
    params = [copy_of(p) for p in random_params(*(3 + k % 5 for k in range(count)))]
    twins = [copy_of(p) for p in params]
    for p, q in zip(params, twins, strict=True):
        p.grad = torch.full_like(p, 0.5)
        q.grad = p.grad.clone()
    optimizer, torch_optimizer = fused_step.SGD(params, **OPTIONS), torch_sgd(twins, **OPTIONS)
    for _ in range(2):
        optimizer.step()
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        graph.replay()
    else:
        optimizer.step()
    for _ in range(3):
        torch_optimizer.step()
    assert_same(params, twins)


# --- waiting and streams ------------------------------------------------------------------------


@pytest.mark.parametrize("zero_grad", (False, True))
@pytest.mark.parametrize("scaled", (False, True))
@pytest.mark.parametrize("max_grad_norm", (None, 1.0))
@pytest.mark.parametrize("momentum_dtype", (None, torch.float32))
def test_nothing_waits_for_the_device(scaled, max_grad_norm, momentum_dtype, zero_grad):
    params = [copy_of(p) for p in random_params(*SHAPES, dtype=torch.bfloat16)]
    optimizer = fused_step.SGD(
        params, **OPTIONS, max_grad_norm=max_grad_norm, momentum_dtype=momentum_dtype
    )
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    for number in range(3):
        set_grads(params, number)
        if scaled:
            optimizer.grad_scale = torch.full((), 4.0)
            optimizer.found_inf = torch.full((), float(number == 0))
        with waiting_is_an_error():
            optimizer.step(zero_grad=zero_grad, set_to_none=False)
        if zero_grad:
            assert not any(p.grad.any() for p in params)
    torch.cuda.synchronize()


def test_a_step_runs_on_the_current_stream():
    expected, optimizer = make()
    set_grads(expected, 2)
    optimizer.step()
    params, optimizer = make()
    set_grads(params, 2)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY_CYCLES)
        optimizer.step()
        assert not stream.query(), "the step waited for the device"
    stream.synchronize()
    assert_same(params, expected)


def test_steps_in_turn_on_two_streams_equal_those_on_one():
    expected, optimizer = make()
    for number in range(20):
        set_grads(expected, number)
        optimizer.step()
    params, optimizer = make()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    last = torch.cuda.current_stream()
    for number in range(20):
        stream = streams[number % 2]
        stream.wait_stream(last)
        with torch.cuda.stream(stream):
            set_grads(params, number)
            optimizer.step()
            torch.full((1 << 16,), float("nan"))  # takes what the step may have given back
        last = stream
    last.synchronize()
    assert_same(params, expected)


# --- graphs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", (None, 0.5))
def test_a_captured_step_follows_gradients_and_learning_rate(max_grad_norm):
    found = []
    for captured in (True, False):
        lr = torch.tensor(0.1)
        params, optimizer = make(max_grad_norm=max_grad_norm)
        optimizer.param_groups[0]["lr"] = lr
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for number in range(4):
            lr.fill_(0.1 / (1 + number))
            set_grads(params, number)
            if captured:
                graph.replay()
            else:
                optimizer.step()
        found.append(params)
    assert_same(*found)


def test_replays_among_steps_outside_of_the_graph():
    params, optimizer = make()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    expected, other = make()
    for number in range(4):
        for of in (params, expected):
            set_grads(of, number)
        graph.replay()
        # At other addresses: the table outside of the graph is written anew.
        kept = [p.grad for p in params]
        for p in params:
            p.grad = p.grad.clone()
        optimizer.step()
        for p, grad in zip(params, kept, strict=True):
            p.grad = grad
        other.step()
        other.step()
    assert_same(params, expected)


def test_a_graph_outlives_its_optimizer():
    params, optimizer = make()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    expected, other = make()
    bufs = [
        momentum_of(optimizer, p) for p in params
    ]  # the graph writes them: its tables are its own
    del optimizer
    rubbish = [torch.full((1 << k,), -1, dtype=torch.int8) for k in range(4, 20)]
    for number in range(3):
        for of in (params, expected):
            set_grads(of, number)
        graph.replay()
        other.step()
    del rubbish, bufs
    assert_same(params, expected)


def test_a_graph_outlives_an_earlier_one_of_the_same_optimizer():
    params, optimizer = make(max_grad_norm=0.5)
    earlier, later = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    for graph in (earlier, later):
        with torch.cuda.graph(graph):
            optimizer.step()
    del graph, earlier
    torch.cuda.empty_cache()
    expected, other = make(max_grad_norm=0.5)
    rubbish = [torch.full((1 << k,), -1, dtype=torch.int8) for k in range(4, 22)]
    for number in range(3):
        for of in (params, expected):
            set_grads(of, number)
        later.replay()
        other.step()
    del rubbish
    assert_same(params, expected)


def test_two_graphs_share_a_pool():
    params, optimizer = make()
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first):
        optimizer.step()
    with torch.cuda.graph(second, pool=first.pool()):
        torch.full((1 << 16,), float("nan"))  # where the first one's table may have been
        optimizer.step()
    expected, other = make()
    for number in range(3):
        for of in (params, expected):
            set_grads(of, number)
        for graph in (first, second):
            graph.replay()
            other.step()
    assert_same(params, expected)


# --- learning rates, devices --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_a_learning_rate_on_the_device_is_that_of_a_number(dtype):
    rate = torch.tensor(0.1, dtype=dtype)
    found = []
    for lr in (rate, float(rate)):
        params, optimizer = make()
        optimizer.param_groups[0]["lr"] = lr
        set_grads(params, 3)
        with waiting_is_an_error():
            optimizer.step()
        found.append(params)
    assert_same(*found)


def test_a_learning_rate_that_is_a_parameter_is_torchs():
    lr = torch.tensor(0.5)
    found = []
    for make_optimizer in (fused_step.SGD, torch_sgd):
        weight, rate = Parameter(torch.ones(5)), lr.clone()
        inner = Parameter(rate.view(1))
        optimizer = make_optimizer([{"params": [inner]}, {"params": [weight]}], lr=0.5)
        optimizer.param_groups[1]["lr"] = rate
        for p in (weight, inner):
            p.grad = torch.full_like(p, 0.25)
        optimizer.step()
        found.append([inner, weight])
    assert_same(*found)


def test_parameters_on_the_cpu_and_on_cuda_in_one_optimizer():
    starts = random_params(9, 33, 1000)
    where = ("cpu", DEVICE, "cpu")
    ours, theirs = (
        [copy_of(p.to(d)) for p, d in zip(starts, where, strict=True)] for _ in range(2)
    )
    optimizers = fused_step.SGD(ours, **OPTIONS), torch_sgd(theirs, **OPTIONS)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape).to(p.device)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert_same(ours, theirs)
    assert optimizers[0]._engine.step(optimizers[0], 0) is True


def test_parameters_on_two_gpus_in_one_optimizer():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    starts = random_params(9, 33, 1000)
    where = ("cuda:1", "cuda:0", "cuda:1")
    ours, theirs = (
        [copy_of(p.to(d)) for p, d in zip(starts, where, strict=True)] for _ in range(2)
    )
    optimizer, other = fused_step.SGD(ours, **OPTIONS), torch_sgd(theirs, **OPTIONS)
    optimizer.grad_scale, optimizer.found_inf = torch.full((), 2.0), torch.zeros(())
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            q.grad = torch.randn(p.shape).to(p.device)
            p.grad = q.grad * 2.0
        with waiting_is_an_error():
            optimizer.step()
        other.step()
    assert_same(ours, theirs)
    assert torch.cuda.current_device() == 0


def test_a_model_that_moves_is_updated_in_each_place():
    params, optimizer = make()
    twins = [copy_of(p) for p in params]
    torch_optimizer = torch_sgd(twins, lr=0.1)
    optimizer.param_groups[0].update(momentum=0.0, nesterov=False, weight_decay=0.0)
    for where in ("cuda", "cpu", "cuda"):
        for of in (params, twins):
            for p in of:
                p.grad = None
                p.data = p.data.to(where)
            set_grads(of, 5)
        optimizer.step()
        torch_optimizer.step()
        assert_same(params, twins)


# --- scaling, memory, bits ----------------------------------------------------------------------


def test_a_skipped_first_step_leaves_zeros_for_a_history():
    params = [copy_of(p) for p in random_params(*SHAPES)]
    set_grads(params, 1)
    before = [p.detach().clone() for p in params]
    optimizer = fused_step.SGD(params, **OPTIONS)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert_same(params, before)
    assert all(not momentum_of(optimizer, p).any() for p in params)
    # What is saved trains on as if there were none.
    twins = [copy_of(p) for p in params]
    resumed, fresh = torch_sgd(params, **OPTIONS), torch_sgd(twins, **OPTIONS)
    resumed.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, twins, strict=True):
        q.grad = p.grad.clone()
    for _ in range(2):
        resumed.step()
        fresh.step()
    assert_same(params, twins)


def test_a_skipped_first_step_that_is_dampened_leaves_no_history():
    params = [copy_of(p) for p in random_params(*SHAPES)]
    set_grads(params, 1)
    before = [p.detach().clone() for p in params]
    optimizer = fused_step.SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert_same(params, before)
    assert all(momentum_of(optimizer, p) is None for p in params)


def test_steps_take_no_memory_that_stays():
    _, optimizer = make(max_grad_norm=1.0)
    optimizer.step()
    torch.cuda.synchronize()
    reserved, kept = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    for _ in range(100):
        optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == kept
    assert torch.cuda.memory_reserved() == reserved


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_more_than_2_to_the_31_elements(dtype):
    n = 2**31 + 4099
    needed = 2 * n * dtype.itemsize + (4 << 30)
    torch.cuda.empty_cache()  # what earlier tests have left in it is not free
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of the GPU's memory, {free >> 30} GiB are free")
    weight = Parameter(torch.ones(n, dtype=dtype))
    weight.grad = torch.full((n,), 0.5, dtype=dtype)
    optimizer = fused_step.SGD([weight], lr=0.5)
    optimizer.step()
    assert bool((weight.detach() == 0.75).all())
    optimizer.max_grad_norm = 1.0
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(0.5 * n**0.5, rel=1e-6)


def test_the_norm_has_the_same_bits_again_and_again_beside_other_work():
    _, optimizer = make(max_grad_norm=1.0, lr=0.0)
    optimizer.step()
    first = optimizer.grad_norm.clone()
    busy = torch.cuda.Stream()
    a = torch.randn(2048, 2048)
    for _ in range(20):
        with torch.cuda.stream(busy):
            a @ a
        optimizer.step()
        assert torch.equal(optimizer.grad_norm, first)
    torch.cuda.synchronize()
