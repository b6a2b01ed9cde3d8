# SPDX-License-Identifier: MIT
"""What exists on CUDA alone: streams, graphs, several GPUs, waiting, memory.

What a step computes there is in the other files, run with `pytest --device cuda`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from device import DEVICE
from gpu_probe import BUSY_CYCLES, IS_EMULATED, launches_of, waiting_is_an_error
from oracle import Problem, assert_trains_like_plain, plain_step, same_bits, train_fused
from torch import nn
from torch.nn import functional as F

import fused_step
from fused_step._extension import _C

if DEVICE.type != "cuda":
    pytest.skip("needs a GPU: run with --device cuda", allow_module_level=True)
if not hasattr(_C, "cuda_archs"):
    pytest.skip("this is a CPU build of fused_step", allow_module_level=True)

MOMENTUM = {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
# One problem of each plan; of one-pass some 300 blocks, or where they are slow, 30.
ROWS = 4_003 if IS_EMULATED else 40_003
SHAPES = {"tiny": (37, 13, 1), "one-pass": (ROWS, 61, 3), "gemm": (515, 67, 131)}
each_plan = pytest.mark.parametrize("plan", SHAPES)


def trainer(problem: Problem, **sgd_options) -> tuple[nn.Linear, fused_step.TrainStep]:
    model, loss_function, _ = problem.build()
    optimizer = torch.optim.SGD(model.parameters(), **{**problem.options, **sgd_options})
    return model, fused_step.TrainStep(model, loss_function, optimizer)


@contextlib.contextmanager
def plan_for_all(name: str) -> Iterator[None]:
    """Whatever a plan serves takes it."""
    _C.use_cuda_plan(name)
    try:
        yield
    finally:
        _C.use_cuda_plan(None)


def parameters(model: nn.Linear) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_all_close(ours: list[torch.Tensor], other: list[torch.Tensor], exact: bool) -> None:
    """The same bits, or for what a library's GEMM made, nearly."""
    for a, b in zip(ours, other, strict=True):
        if exact:
            assert same_bits(a, b)
        else:
            torch.testing.assert_close(a, b)


@each_plan
def test_each_shape_takes_the_plan_it_stands_for(plan):
    problem = Problem.random(*SHAPES[plan], options=MOMENTUM)
    assert_trains_like_plain(problem, plans=(plan,))


# One-pass on the units that multiply matrices: a warp and several for a row, 8, 16 and 32 outputs,
# rows of x that end within a step, and its smallest width.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1_001, 64, 8), (1_003, 520, 5), (1_500, 264, 16), (2_500, 200, 32)],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, MOMENTUM], ids=["bare", "momentum"])
def test_more_outputs_of_16_bit_in_one_pass_train_like_plain(shape, dtype, options):
    problem = Problem.random(*shape, dtype=dtype, options=options).stable()
    assert_trains_like_plain(problem, plans=("one-pass",))


def test_widest_rows_of_16_bit_in_one_pass_train_like_plain():
    problem = Problem.random(150, 4096, 3, dtype=torch.bfloat16, options=MOMENTUM).stable()
    with plan_for_all("one-pass"):  # so few of them would go to the GEMMs
        assert_trains_like_plain(problem, plans=("one-pass",))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("outputs", [3, 11, 29])
def test_integers_of_16_bit_have_exact_gradients(outputs, dtype):
    """Whole numbers have no rounding errors: an element in the wrong place shows as such."""
    generator = torch.Generator().manual_seed(outputs)

    def integers(*shape: int, most: int) -> torch.Tensor:
        values = torch.randint(-most, most + 1, shape, generator=generator, device="cpu")
        return values.to(DEVICE, torch.float64)

    x = integers(203, 264, most=1) * (integers(203, 264, most=4) == 0)
    weight, target = integers(outputs, 264, most=3), integers(203, outputs, most=9)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    F.mse_loss(F.linear(*leaves), target, reduction="sum").backward()
    fused = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    fused_step.linear_mse_loss(*fused, target.to(dtype), reduction="sum").backward()
    for ours, exact in zip(fused, leaves, strict=True):
        assert exact.grad.abs().max() > 9
        assert torch.equal(ours.grad, exact.grad.to(dtype))


def test_rows_of_16_bit_that_begin_anywhere_train_like_plain():
    problem = Problem.random(3_001, 72, 6, dtype=torch.bfloat16)
    base = torch.zeros(3_001, 75, dtype=torch.bfloat16)
    rows = base[:, 1:73]
    rows.copy_(problem.input)
    assert_trains_like_plain(dataclasses.replace(problem, input=rows), plans=("one-pass",))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((9_001, 64, 33), "up to 32 outputs of a BFloat16 input, the layer has 33"),
        ((9_001, 68, 5), "multiple of 8 columns, from 64 to 4096"),
        ((9_001, 2056, 9), "multiple of 8 columns, from 64 to 2048"),
        ((200, 4096, 8), "enough rows to share out"),
    ],
    ids=str,
)
def test_more_outputs_of_16_bit_than_one_pass_serves_say_why(shape, words):
    problem = Problem.random(*shape, dtype=torch.bfloat16)
    _, step = trainer(problem)
    step(problem.input, problem.target)
    assert step.plan == "gemm"
    assert words in step.explain(problem.input, problem.target)


@pytest.mark.parametrize("shape", [(500, 33, 2), (1_003, 72, 6)], ids=str)
def test_plan_that_is_asked_for_trains_like_plain_where_it_serves(shape):
    problem = Problem.random(*shape, dtype=torch.bfloat16, options=MOMENTUM).stable()
    for plan in ("one-pass", "gemm"):
        with plan_for_all(plan):
            assert_trains_like_plain(problem, plans=(plan,))
    with plan_for_all("one-pass"):
        _, step = trainer(Problem.random(*SHAPES["gemm"]))  # which it does not serve
        step(torch.zeros(515, 67), torch.zeros(515, 131))
        assert step.plan == "gemm"
    with pytest.raises(ValueError, match="name must be tiny, one-pass or gemm, got best"):
        _C.use_cuda_plan("best")


# --- launches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("plan", "most"), [("tiny", 1), ("one-pass", 1), ("gemm", 5)])
def test_step_takes_as_few_launches_as_promised(plan, most):
    problem = Problem.random(*SHAPES[plan])
    _, step = trainer(problem)
    step(problem.input, problem.target)  # makes its scratch memory
    launched = launches_of(lambda: step(problem.input, problem.target))
    # A GEMM that cuBLAS shares out is two.
    launched = [name for name in launched if "splitK" not in name]
    assert 1 <= len(launched) <= most, launched
    assert step.plan == plan


def test_step_whose_sums_are_large_takes_one_launch_more():
    problem = Problem.random(2_312, 4_096, 8, dtype=torch.bfloat16)
    _, step = trainer(problem)
    with plan_for_all("one-pass"):
        step(problem.input, problem.target)  # makes its scratch memory
        launched = launches_of(lambda: step(problem.input, problem.target))
    assert len(launched) == 2, launched


@pytest.mark.parametrize("needs_dx", [False, True])
def test_loss_of_up_to_32_outputs_of_16_bit_takes_one_kernel(needs_dx):
    def launches(outputs: int) -> int:
        x = torch.randn(1_003, 136, dtype=torch.bfloat16, requires_grad=needs_dx)
        weight = torch.randn(outputs, 136, dtype=torch.bfloat16, requires_grad=True)
        target = torch.randn(1_003, outputs, dtype=torch.bfloat16)
        return len(launches_of(lambda: fused_step.linear_mse_loss(x, weight, target)))

    assert launches(29) <= 2  # and what makes its tickets zero
    assert launches(33) > 2  # by GEMMs


def test_tiny_run_takes_one_launch_for_many_steps():
    problem = Problem.random(40, 5, 1)
    _, step = trainer(problem)
    losses = []
    run = functools.partial(step.run, problem.input, problem.target, epochs=100, batch_size=3)
    launched = launches_of(lambda: losses.append(run()))
    assert len(losses[0]) == 1400
    assert len(launched) == 1, launched


# --- streams ------------------------------------------------------------------------------------


@each_plan
def test_step_runs_on_the_current_stream_and_nobody_waits(plan):
    problem = Problem.random(*SHAPES[plan], options=MOMENTUM)
    expected = train_fused(problem, 2)
    model, step = trainer(problem)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    step(problem.input, problem.target)  # loads the kernels, which may wait
    model, step = trainer(problem)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY_CYCLES)
        losses = [step(problem.input, problem.target) for _ in range(2)]
        assert not stream.query(), "the step waited for the device"
    stream.synchronize()
    assert_all_close(losses, expected.losses, exact=plan != "gemm")
    assert_all_close(parameters(model), [expected.weight, expected.bias], exact=plan != "gemm")


@each_plan
def test_steps_in_turn_on_two_streams_equal_those_on_one(plan):
    problem = Problem.random(*SHAPES[plan], options=MOMENTUM)
    expected = train_fused(problem, 20)
    model, step = trainer(problem)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    last = torch.cuda.current_stream()
    for number in range(20):
        stream = streams[number % 2]
        stream.wait_stream(last)
        with torch.cuda.stream(stream):
            step(problem.input, problem.target)
            # Takes what the step may have given back.
            torch.full((1 << 20,), float("nan"))
        last = stream
    last.synchronize()
    assert_all_close(parameters(model), [expected.weight, expected.bias], exact=plan != "gemm")


@each_plan
def test_two_steps_on_two_streams_at_once_do_not_disturb_each_other(plan):
    problem = Problem.random(*SHAPES[plan], options=MOMENTUM)
    expected = train_fused(problem, 30)
    trainers = [trainer(problem) for _ in range(2)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(30):
        for (_, step), stream in zip(trainers, streams, strict=True):
            with torch.cuda.stream(stream):
                step(problem.input, problem.target)
    torch.cuda.synchronize()
    for model, _ in trainers:
        assert_all_close(parameters(model), [expected.weight, expected.bias], exact=plan != "gemm")


# --- waiting ------------------------------------------------------------------------------------


@each_plan
def test_nothing_waits_for_the_device(plan):
    problem = Problem.random(*SHAPES[plan], options=MOMENTUM)
    lr = torch.tensor(problem.options["lr"])
    for options in ({}, {"lr": lr}):
        _, step = trainer(problem, **options)
        with waiting_is_an_error():
            for _ in range(3):
                step(problem.input, problem.target)
            assert step.plan == plan
            for shuffle in (False, True):
                step.run(problem.input, problem.target, epochs=2, batch_size=200, shuffle=shuffle)
    weight = problem.weight.clone().requires_grad_()
    with waiting_is_an_error():
        fused_step.linear_mse_loss(problem.input, weight, problem.target).backward()


@each_plan
def test_run_returns_before_its_steps_are_done(plan):
    problem = Problem.random(*SHAPES[plan])
    _, step = trainer(problem)
    step.run(problem.input, problem.target, epochs=2, batch_size=200)
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    step.run(problem.input, problem.target, epochs=2, batch_size=200)
    assert not torch.cuda.current_stream().query()


def test_ctrl_c_ends_a_run_after_a_whole_step():
    problem = Problem.random(64, 5, 1)
    model, step = trainer(problem)
    step.run(problem.input, problem.target)
    timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    start = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            step.run(problem.input, problem.target, epochs=10**7, batch_size=8)
        torch.cuda.synchronize()
    finally:
        signal.signal(signal.SIGINT, before)
        timer.cancel()
    assert time.perf_counter() - start < 3
    assert all(p.isfinite().all() for p in model.parameters())
    step(problem.input, problem.target)


# --- graphs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, MOMENTUM], ids=["bare", "momentum"])
@each_plan
def test_captured_step_follows_a_learning_rate_on_the_device(plan, options):
    problem = Problem.random(*SHAPES[plan], options=options)
    rates = [problem.options["lr"] * factor for factor in (1.0, 0.5, 0.0, 0.25)]
    batches = [(problem.input * f, problem.target * f) for f in (1.0, 0.9, 0.8, 0.7)]

    def fresh():
        lr = torch.tensor(problem.options["lr"])
        model, step = trainer(problem, lr=lr)
        step(problem.input, problem.target)  # makes the momentum buffers
        return lr, model, step

    lr, model, step = fresh()
    x, t = problem.input.clone(), problem.target.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(x, t)
    assert step.plan == plan
    losses = []
    for rate, (new_x, new_t) in zip(rates, batches, strict=True):
        lr.fill_(rate)
        x.copy_(new_x)
        t.copy_(new_t)
        graph.replay()
        losses.append(loss.clone())

    twin_lr, twin, twin_step = fresh()
    twin_losses = []
    for rate, batch in zip(rates, batches, strict=True):
        twin_lr.fill_(rate)
        twin_losses.append(twin_step(*batch))
    assert_all_close(losses, twin_losses, exact=plan != "gemm")
    assert_all_close(parameters(model), parameters(twin), exact=plan != "gemm")


@each_plan
def test_replays_among_steps_outside_of_the_graph_do_not_share_scratch_memory(plan):
    problem = Problem.random(*SHAPES[plan], options=MOMENTUM)
    expected = train_fused(problem, 9)
    model, step = trainer(problem)
    step(problem.input, problem.target)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(problem.input, problem.target)
    for _ in range(4):
        graph.replay()
        step(problem.input, problem.target)
    assert_all_close(parameters(model), [expected.weight, expected.bias], exact=plan != "gemm")


@each_plan
def test_a_graph_outlives_an_earlier_one_of_the_same_step(plan):
    problem = Problem.random(*SHAPES[plan], options=MOMENTUM)
    expected = train_fused(problem, 4)
    model, step = trainer(problem)
    step(problem.input, problem.target)
    torch.cuda.synchronize()
    earlier, later = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    for graph in (earlier, later):
        with torch.cuda.graph(graph):
            step(problem.input, problem.target)
    del graph, earlier
    torch.cuda.empty_cache()
    rubbish = [torch.full((1 << k,), -1, dtype=torch.int8) for k in range(4, 22)]
    for _ in range(3):
        later.replay()
    del rubbish
    assert_all_close(parameters(model), [expected.weight, expected.bias], exact=plan != "gemm")


@each_plan
def test_captured_run_equals_the_run(plan):
    problem = Problem.random(*SHAPES[plan], options=MOMENTUM)
    arguments = {"epochs": 2, "batch_size": SHAPES[plan][0] // 3 + 1}

    def fresh():
        model, step = trainer(problem)
        step(problem.input, problem.target)
        return model, step

    model, step = fresh()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = step.run(problem.input, problem.target, **arguments)
    graph.replay()
    twin, twin_step = fresh()
    twin_losses = twin_step.run(problem.input, problem.target, **arguments)
    assert_all_close([losses], [twin_losses], exact=plan != "gemm")
    assert_all_close(parameters(model), parameters(twin), exact=plan != "gemm")


# --- learning rates on the device ---------------------------------------------------------------


@each_plan
def test_learning_rate_on_the_device_is_that_of_a_number(plan):
    problem = Problem.random(*SHAPES[plan], options=MOMENTUM)
    rate = float(torch.tensor(problem.options["lr"]))  # as float32 has it
    found = []
    for lr in (rate, torch.tensor(rate), torch.tensor([rate])):
        model, step = trainer(problem, lr=lr)
        for _ in range(3):
            step(problem.input, problem.target)
        assert step.plan == plan
        found.append(parameters(model))
    for other in found[1:]:
        assert_all_close(other, found[0], exact=True)


def test_groups_may_have_learning_rates_of_both_kinds():
    problem = Problem.random(*SHAPES["tiny"])
    found = []
    for lr in (0.25, torch.tensor(0.25)):
        model, loss_function, _ = problem.build()
        groups = [{"params": [model.weight], "lr": lr}, {"params": [model.bias], "lr": 0.125}]
        step = fused_step.TrainStep(model, loss_function, torch.optim.SGD(groups))
        step(problem.input, problem.target)
        assert step.plan == "tiny"
        found.append(parameters(model))
    assert_all_close(*found, exact=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_learning_rate_on_the_device_of_another_dtype_is_not_read_by_the_layers_kernels(dtype):
    problem = Problem.random(*SHAPES["tiny"])
    lr = torch.tensor(0.25, dtype=dtype)
    model, step = trainer(problem, lr=lr)
    step(problem.input, problem.target)
    assert step.plan == "head"
    assert "learning rate is a CUDA tensor" in step.explain(problem.input, problem.target)
    twin, loss_function, _ = problem.build()
    optimizer = torch.optim.SGD(twin.parameters(), lr=lr)
    plain_step(twin, loss_function, optimizer, problem.input, problem.target)
    assert_all_close(parameters(model), parameters(twin), exact=False)


# --- devices ------------------------------------------------------------------------------------


@each_plan
def test_second_gpu_is_used_whatever_the_current_one_is(plan):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    problem = Problem.random(*SHAPES[plan], options=MOMENTUM)
    expected = train_fused(problem, 3)
    second = torch.device("cuda:1")
    model, loss_function, _ = problem.build()
    model.to(second)
    step = fused_step.TrainStep(
        model, loss_function, torch.optim.SGD(model.parameters(), **problem.options)
    )
    for _ in range(3):
        loss = step(problem.input.to(second), problem.target.to(second))
    assert step.plan == plan
    assert loss.device == second
    assert torch.cuda.current_device() == 0
    for ours, other in zip(model.parameters(), (expected.weight, expected.bias), strict=True):
        torch.testing.assert_close(ours.detach().to(other.device), other)


@pytest.mark.parametrize("which", ["input", "target"])
def test_data_on_the_cpu_raise_what_the_plain_loop_raises(which):
    problem = Problem.random(*SHAPES["tiny"])
    problem = dataclasses.replace(problem, **{which: getattr(problem, which).cpu()})
    model, step = trainer(problem)
    model_twin, loss_function, optimizer = problem.build()
    errors = []
    for call in (
        step,
        functools.partial(plain_step, model_twin, loss_function, optimizer),
    ):
        with pytest.raises(RuntimeError) as error:
            call(problem.input, problem.target)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert f"{which} is not an ordinary tensor" in step.explain(problem.input, problem.target)
    assert_all_close(parameters(model), parameters(model_twin), exact=True)


def test_model_that_moves_to_the_gpu_and_back_is_trained_in_each_place():
    problem = Problem.random(64, 5, 1)
    model, loss_function, _ = problem.build()
    optimizer = torch.optim.SGD(model.parameters(), **problem.options)
    step = fused_step.TrainStep(model, loss_function, optimizer)
    for where in ("cuda", "cpu", "cuda"):
        model.to(where)
        step(problem.input.to(where), problem.target.to(where))
        assert step.plan == ("tiny" if where == "cuda" else "one-pass")


def test_op_refuses_tensors_of_several_devices():
    weight, x, t = torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(3, 1)
    op = torch.ops.fused_step.linear_mse_sgd_
    with pytest.raises(ValueError, match="input must be on the device of weight cuda:0, got cpu"):
        op(weight, None, None, None, x.cpu(), t, lr=0.1)
    with pytest.raises(ValueError, match="bias must be on the device of weight cuda:0, got cpu"):
        op(weight, torch.zeros(1, device="cpu"), None, None, x, t, lr=0.1)


# --- autocast -----------------------------------------------------------------------------------


def test_autocast_for_the_cpu_is_nothing_to_a_model_on_the_gpu():
    problem = Problem.random(*SHAPES["one-pass"], options=MOMENTUM)
    outside = train_fused(problem, 2)
    with torch.autocast("cpu"):
        inside = train_fused(problem, 2)
    assert set(inside.plans) == {"one-pass"}
    for (name, a), (_, b) in zip(outside.tensors(), inside.tensors(), strict=True):
        assert a is b is None or same_bits(a, b), name


def test_autocast_for_the_gpu_is_nothing_to_a_model_on_the_cpu():
    model = nn.Linear(5, 2).cpu()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = fused_step.TrainStep(model, nn.MSELoss(), optimizer)
    with torch.autocast("cuda"):
        loss = step(torch.ones(3, 5, device="cpu"), torch.ones(3, 2, device="cpu"))
    assert step.plan == "one-pass"
    assert loss.dtype == torch.float32


def test_step_of_the_gemm_plan_is_left_to_autocast_and_says_why():
    problem = Problem.random(*SHAPES["gemm"])
    _, step = trainer(problem)
    with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
        step(problem.input, problem.target)
        assert step.plan == "optimizer"
        assert "GEMMs of 16 bit are faster" in step.explain(problem.input, problem.target)


# --- memory -------------------------------------------------------------------------------------


def allocated_by(call) -> int:
    """Peak bytes of torch's allocator in a call, beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@each_plan
def test_steps_take_no_memory_that_stays(plan):
    problem = Problem.random(*SHAPES[plan], options=MOMENTUM)
    _, step = trainer(problem)
    step(problem.input, problem.target)
    torch.cuda.synchronize()
    reserved, kept = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    for _ in range(100):
        step(problem.input, problem.target)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == kept
    assert torch.cuda.memory_reserved() == reserved


def test_gemm_step_without_momentum_stores_no_gradient():
    problem = Problem.random(256, 2048, 2048, bias=False)
    model, step = trainer(problem)
    step(problem.input, problem.target)
    ours = allocated_by(lambda: step(problem.input, problem.target))
    twin, loss_function, optimizer = problem.build()
    plain = functools.partial(plain_step, twin, loss_function, optimizer)
    plain(problem.input, problem.target)
    theirs = allocated_by(lambda: plain(problem.input, problem.target))
    assert step.plan == "gemm"
    assert ours <= theirs - model.weight.nbytes


# x in one case, y in the other has more than 2³¹ elements; bytes are those of the float64 oracle.
@pytest.mark.parametrize(("B", "I", "O"), [(2**21 + 5, 1024, 1), (2**21 + 5, 16, 1024)])
def test_more_than_2_to_the_31_elements(B, I, O):
    # Of x the loop has fewer copies than of y: 128 GiB of an H200's were enough, and too few.
    needed = (8 if O == 1 else 10) * 8 * B * max(I, O)
    torch.cuda.empty_cache()  # what earlier tests have left in it is not free
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of the GPU's memory, {free >> 30} GiB are free")
    problem = dataclasses.replace(
        Problem.random(8, I, O), input=torch.randn(B, I), target=torch.randn(B, O)
    )
    assert_trains_like_plain(problem.stable(), steps=1)


# --- bits and precision -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1_000_003, 64, 4), (300_007, 1000, 1), (37, 13, 1)], ids=str)
def test_same_bits_again_and_again_beside_other_work(shape):
    problem = Problem.random(*shape, options=MOMENTUM)
    first = train_fused(problem, 2)
    busy = torch.cuda.Stream()
    a = torch.randn(2048, 2048)
    for _ in range(5):
        with torch.cuda.stream(busy):
            for _ in range(20):
                a @ a
        again = train_fused(problem, 2)
        for (name, ours), (_, other) in zip(first.tensors(), again.tensors(), strict=True):
            assert same_bits(ours, other), name
    torch.cuda.synchronize()


def test_gemm_follows_the_switch_of_tf32():
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("this GPU has no TF32")
    problem = Problem.random(512, 512, 256)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        found = []
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            found.append(train_fused(problem, 1).weight)
        assert not same_bits(*found)
        torch.backends.cuda.matmul.allow_tf32 = False
        assert_trains_like_plain(problem)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
