# SPDX-License-Identifier: MIT
"""fused_step.SGD updates as torch.optim.SGD's for-loop does."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import describe, same_bits
from sgd_oracle import (
    DTYPES,
    EXACT_DTYPES,
    MOMENTUM,
    OPTION_SETS,
    SIZES,
    Twins,
    copy_of,
    momentum_of,
    random_params,
    torch_sgd,
)
from torch.nn import Parameter

import fused_step
from fused_step._extension import _C

ISA_LEVELS = _C.isa_levels(supported_only=True)


@pytest.fixture
def count_torch_updates(monkeypatch):
    """How often torch's own functions had to update something."""
    calls = []
    update = fused_step.SGD._update_by_torch
    monkeypatch.setattr(
        fused_step.SGD,
        "_update_by_torch",
        lambda self, left=None: (calls.append(left), update(self, left))[1],
    )
    return calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTION_SETS, ids=describe)
def test_every_size_has_the_for_loops_values(dtype, options, count_torch_updates):
    twins = Twins(random_params(*SIZES, dtype=dtype), **options)
    for step in range(4):
        twins.step()
        twins.check(f"step {step}")
    assert count_torch_updates == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTION_SETS, ids=describe)
def test_a_tensor_alone_has_the_for_loops_values(dtype, options):
    for n in range(34):
        twins = Twins(random_params(n, dtype=dtype, seed=n), **options)
        twins.step(steps=3)
        twins.check(f"n {n}")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("options", OPTION_SETS, ids=describe)
def test_16_bit_parameters_with_a_float32_buffer(dtype, options):
    twins = Twins(random_params(*SIZES, dtype=dtype), **options, momentum_dtype=torch.float32)
    twins.step(steps=4)
    twins.check()
    if options["momentum"]:
        assert momentum_of(twins.optimizer, twins.ours[-1]).dtype == torch.float32


def test_a_16_bit_parameter_is_rounded_once_an_update():
    # 1 - 2^-9 - 2^-9 in bfloat16: each half of it alone is lost, together they are not.
    weight = Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = fused_step.SGD([weight], lr=1.0, weight_decay=2.0**-9)
    weight.grad = torch.full((1,), 2.0**-9, dtype=torch.bfloat16)
    optimizer.step()
    assert weight.item() == 1.0 - 2.0**-8


@pytest.mark.cpu_only("instruction sets of the processor")
@pytest.mark.parametrize("isa", ISA_LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_keeps_the_rule(isa, dtype):
    before = _C.isa_used()
    _C.use_isa(isa)
    try:
        # Without a fused multiply-add the bits are not torch's, which has one here.
        for options in OPTION_SETS:
            params = random_params(*SIZES, dtype=dtype)
            ours, exact = [copy_of(p) for p in params], [copy_of(p) for p in params]
            optimizers = fused_step.SGD(ours, **options), torch_sgd(exact, **options)
            for _ in range(3):
                for p, q in zip(ours, exact, strict=True):
                    p.grad = torch.randn_like(p)
                    q.grad = p.grad.clone()
                for optimizer in optimizers:
                    optimizer.step()
            eps = torch.finfo(dtype).eps
            for p, q in zip(ours, exact, strict=True):
                # Three steps of at most six roundings each, of values below 8.
                assert ((p - q).abs() <= 3 * 6 * 8 * eps).all()
    finally:
        _C.use_isa(before)


@pytest.mark.cpu_only("threads of torch")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    sizes = (3, 70_001, 1, 40_000, 0, 129, 33_333)
    found = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        twins = Twins(random_params(*sizes, dtype=dtype), **MOMENTUM, max_grad_norm=1.0)
        for _ in range(3):
            twins.set_grads()
            twins.optimizer.step()
        found.append([*twins.ours, twins.optimizer.grad_norm])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_tensors_on_all_threads(dtype):
    twins = Twins(random_params(100_003, (300, 400), 7, dtype=dtype), **MOMENTUM)
    twins.step(steps=2)
    twins.check()


def test_param_groups_have_options_of_their_own():
    shapes = (5, 17, 33, 3)
    groups = [
        {},
        {"lr": 0.01, "momentum": 0.5, "nesterov": True, "dampening": 0.0},
        {"weight_decay": 0.1, "maximize": True},
        {"momentum": 0.0},
    ]
    params = random_params(*shapes)
    ours, theirs = ([copy_of(p) for p in params] for _ in range(2))
    optimizers = [
        make([{"params": [p], **g} for p, g in zip(of, groups, strict=True)], **MOMENTUM)
        for make, of in ((fused_step.SGD, ours), (torch_sgd, theirs))
    ]
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


def test_groups_of_different_dtypes():
    params = [
        random_params(n, dtype=dtype)[0] for n, dtype in zip((19, 35, 21, 5), DTYPES, strict=True)
    ]
    twins = Twins(params, **MOMENTUM)
    twins.step(steps=3)
    twins.check()


def test_a_change_of_options_counts_at_the_next_step():
    twins = Twins(random_params(9, 33), **MOMENTUM)
    changes = (
        {"lr": 0.3},
        {"momentum": 0.5},
        {"weight_decay": 0.2},
        {"dampening": 0.7},
        {"maximize": True},
        {"dampening": 0.0, "nesterov": True},
        {"momentum": 0.0, "nesterov": False},
        {"momentum": 0.9},
        {"lr": torch.tensor(0.2)},
    )
    for change in changes:
        for optimizer in twins.optimizers():
            optimizer.param_groups[0].update(change)
        twins.step(steps=2)
        twins.check(str(change))


def test_a_tensor_lr_is_read_at_each_step(count_torch_updates):
    for lr in (torch.tensor(0.1), torch.tensor([0.1]), torch.tensor(0.1, dtype=torch.float64)):
        twins = Twins(random_params(9, 33), lr=lr, momentum=0.9)
        for _ in range(3):
            lr.mul_(0.5)
            twins.step()
            twins.check()
    assert count_torch_updates == []


def test_a_parameter_that_joins_later():
    params = random_params(9, 33, 4)
    ours, theirs = ([copy_of(p) for p in params] for _ in range(2))
    optimizers = fused_step.SGD(ours[:2], **MOMENTUM), torch_sgd(theirs[:2], **MOMENTUM)
    for step in range(4):
        if step == 2:
            optimizers[0].add_param_group({"params": ours[2], "lr": 0.5})
            optimizers[1].add_param_group({"params": theirs[2], "lr": 0.5})
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


def test_a_parameter_that_is_replaced_in_its_group():
    twins = Twins(random_params(9, 33), **MOMENTUM)
    twins.step()
    for params, optimizer in zip(
        (twins.ours, twins.same_dtype, twins.exact), twins.optimizers(), strict=True
    ):
        params[0] = copy_of(torch.arange(9.0).to(params[0].dtype))
        optimizer.param_groups[0]["params"][0] = params[0]
    twins.step(steps=2)
    twins.check()


def test_new_data_under_a_parameter():
    twins = Twins(random_params(9, 33), **MOMENTUM)
    twins.step()
    for params in (twins.ours, twins.same_dtype, twins.exact):
        params[0].data = torch.ones(9, dtype=params[0].dtype)
    twins.step(steps=2)
    twins.check()


def test_a_buffer_that_is_put_into_the_state():
    twins = Twins(random_params(9, 33), **MOMENTUM)
    twins.step(steps=3)  # by then the state is known by its version
    for optimizer, params in zip(
        twins.optimizers(), (twins.ours, twins.same_dtype, twins.exact), strict=True
    ):
        optimizer.state[params[0]]["momentum_buffer"] = torch.ones_like(params[0])
    twins.step(steps=2)
    twins.check()
    for optimizer, params in zip(
        twins.optimizers(), (twins.ours, twins.same_dtype, twins.exact), strict=True
    ):
        optimizer.state[params[0]]["momentum_buffer"] = None
        del optimizer.state[params[1]]
    twins.step(steps=2)
    twins.check()


@pytest.mark.parametrize("special", (float("inf"), -float("inf"), float("nan")))
@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
def test_nan_and_infinity_stand_where_torch_has_them(dtype, special):
    for options in OPTION_SETS:
        twins = Twins(random_params(37, 5, dtype=dtype), **options)
        twins.step()
        grads = [torch.ones(37, dtype=dtype), torch.ones(5, dtype=dtype)]
        grads[0][18] = special
        twins.step(grads)
        for p, q in zip(twins.ours, twins.same_dtype, strict=True):
            assert same_bits(p.detach(), q.detach())


def test_parameters_without_gradient_are_left_alone():
    twins = Twins(random_params(9, 33, 4), **MOMENTUM, weight_decay=0.1)
    twins.step([torch.ones(9), None, torch.ones(4)])
    twins.check()
    assert twins.ours[1] not in twins.optimizer.state
    twins.optimizer.zero_grad()
    twins.torch_optimizer.zero_grad()
    before = [p.detach().clone() for p in twins.ours]
    twins.optimizer.step()
    for p, q in zip(twins.ours, before, strict=True):
        assert torch.equal(p, q)


def test_frozen_parameters_with_a_gradient_are_updated_as_torch_does():
    twins = Twins(random_params(9), **MOMENTUM)
    for params in (twins.ours, twins.same_dtype, twins.exact):
        params[0].requires_grad_(False)
    twins.step(steps=2)
    twins.check()


def test_closure_runs_with_gradients_and_its_value_is_returned():
    weight = Parameter(torch.tensor([2.0]))
    optimizer = fused_step.SGD([weight], lr=0.5)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (weight * weight).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 4.0
        assert not torch.is_grad_enabled()
    assert weight.item() == 0.0


def test_step_works_on_whatever_grad_mode():
    for context in (torch.no_grad(), torch.enable_grad()):
        twins = Twins(random_params(9), **MOMENTUM)
        with context:
            twins.step(steps=2)
        twins.check()


# Of the second, threads see to a part each; of the third, to parts of one tensor.
@pytest.mark.parametrize("sizes", ((5,), (5,) * 600, (0, 3, 0, 0, 200_000, 0)), ids=len)
def test_every_written_tensor_has_a_new_version(sizes):
    torch.set_num_threads(2)
    weights = [Parameter(torch.ones(n)) for n in sizes]
    loose = Parameter(torch.ones(5))
    optimizer = fused_step.SGD([*weights, loose], **MOMENTUM)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        before = [p._version for p in (*weights, loose)]
        optimizer.step()
        assert [p._version for p in (*weights, loose)] == [
            *(v + 1 for v in before[:-1]),
            before[-1],
        ]
        bufs = [momentum_of(optimizer, weight) for weight in weights]
        before = [buf._version for buf in bufs]
        optimizer.step()
        assert [buf._version for buf in bufs] == [v + 1 for v in before]


def test_a_stale_backward_is_an_error():
    weight = Parameter(torch.ones(5))
    optimizer = fused_step.SGD([weight], lr=0.1)
    loss = (weight * weight).sum()
    weight.grad = torch.ones(5)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("set_to_none", (True, False))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_grad_with_the_step(dtype, set_to_none):
    twins = Twins(random_params(*SIZES, dtype=dtype), **MOMENTUM, weight_decay=0.1)
    for _ in range(3):
        twins.set_grads()
        grads = [p.grad for p in twins.ours]
        versions = [g._version for g in grads]
        twins.optimizer.step(zero_grad=True, set_to_none=set_to_none)
        for optimizer in twins.optimizers()[1:]:
            optimizer.step()
        for p, grad, version in zip(twins.ours, grads, versions, strict=True):
            if set_to_none:
                assert p.grad is None
            else:
                assert p.grad is grad
                assert not grad.any()
                assert grad._version > version
    twins.check()


def test_zero_grad_with_the_step_detaches_what_has_a_history():
    weight = Parameter(torch.tensor([3.0]))
    optimizer = fused_step.SGD([weight], lr=0.1)
    (weight.grad,) = torch.autograd.grad((weight**3).sum(), weight, create_graph=True)
    assert weight.grad.requires_grad
    optimizer.step(zero_grad=True, set_to_none=False)
    assert not weight.grad.requires_grad
    assert weight.grad.item() == 0.0


def test_zero_grad_with_the_step_comes_after_the_hooks():
    weight = Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = fused_step.SGD([weight], lr=0.1)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(weight.grad.clone()))
    optimizer.step(zero_grad=True)
    assert torch.equal(seen[0], torch.ones(3))
    assert weight.grad is None


@given(
    shapes=st.lists(st.lists(st.integers(0, 6), max_size=4).map(tuple), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    options=st.sampled_from(OPTION_SETS),
    lr=st.floats(-2.0, 2.0),
    steps=st.integers(1, 4),
    permute=st.booleans(),
)
def test_random_trainings(shapes, dtype, options, lr, steps, permute):
    params = random_params(*shapes, dtype=dtype)
    if permute:
        params = [p.permute(*reversed(range(p.dim()))) if p.dim() else p for p in params]
    options = {**options, "lr": 0.1}
    twins = Twins(params, **options)
    for optimizer in twins.optimizers():
        optimizer.param_groups[0]["lr"] = lr
    twins.scales = [s + steps * steps * abs(lr) * (3 + s) for s in twins.scales]
    twins.step(steps=steps)
    twins.check()


def test_plain_numbers_of_every_kind_are_options():
    for lr, momentum in itertools.product((0, 1, 0.5), (0, 1, 0.5)):
        twins = Twins(random_params(9), lr=lr, momentum=momentum)
        twins.step(steps=3)
        twins.check()


def test_an_lr_without_end_is_as_torch_has_it():
    for lr in (float("inf"), float("nan")):
        twins = Twins(random_params(9), lr=0.1)
        for optimizer in twins.optimizers():
            optimizer.param_groups[0]["lr"] = lr
        twins.step()
        assert same_bits(twins.ours[0].detach(), twins.same_dtype[0].detach())


def test_norm_beyond_the_range_of_a_float_raises_and_changes_nothing():
    weight = Parameter(torch.ones(3))
    optimizer = fused_step.SGD([weight], lr=0.1, max_grad_norm=1.0)
    optimizer.max_grad_norm = 10**400
    weight.grad = torch.ones(3)
    with pytest.raises(OverflowError):
        optimizer.step()
    assert torch.equal(weight, torch.ones(3))


@pytest.mark.parametrize("isa", _C.isa_levels(supported_only=True))
@pytest.mark.cpu_only("the processor's switch")
def test_small_float16_numbers_count_where_denormals_are_flushed(isa):
    """They are denormal in float16 alone. Sizes leave a vector's tail of each kind."""
    before = _C.isa_used()
    torch.set_num_threads(1)
    _C.use_isa(isa)
    torch.set_flush_denormal(True)
    try:
        for size in (1, 7, 16, 123):
            weight = Parameter(torch.full((size,), 3e-5, dtype=torch.float16))
            expected = weight.detach().clone()
            weight.grad = torch.zeros(size, dtype=torch.float16)
            fused_step.SGD([weight], lr=0.1).step()
            assert torch.equal(weight.view(torch.int16), expected.view(torch.int16)), size
    finally:
        torch.set_flush_denormal(False)
        _C.use_isa(before)
