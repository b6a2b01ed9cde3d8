# SPDX-License-Identifier: MIT
"""PyTorch's own list of SGD's cases, every entry of it, run on fused_step.SGD."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import assert_within_rule

import fused_step

pytest.importorskip("expecttest")  # which torch's list needs
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

INFO = next(info for info in optim_db if info.optim_cls is torch.optim.SGD)
INPUTS = INFO.optim_inputs_func(device="cpu")
ERRORS = INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
# Every value of the flags that torch takes for its implementations.
IMPLS = ({}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False})


def test_the_list_is_there():
    assert len(INPUTS) >= 9
    assert len(ERRORS) >= 7
    assert len(INFO.scheduler_inputs) >= 7
    assert INFO.supported_impls == ("foreach", "differentiable", "fused")


def train(make, dtype, kwargs, impl, schedulers=(), start_dtype=None, steps=4):
    """Two parameters in two groups, in `dtype`, from values that `start_dtype` holds."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        wide = torch.complex128 if dtype.is_complex else torch.float64
        values = torch.randn(*shape, generator=generator, dtype=wide)
        return values.to(dtype if start_dtype is None else start_dtype).to(dtype)

    weight, bias = torch.nn.Parameter(randn(10, 5)), torch.nn.Parameter(randn(10))
    kwargs = copy.deepcopy(kwargs)
    optimizer = make([{"params": [weight]}, {"params": [bias]}], **kwargs, **impl)
    made = [s(optimizer) for s in schedulers]
    for _ in range(steps):
        grads = randn(10, 5), randn(10)

        def closure(grads=grads):
            optimizer.zero_grad()
            weight.grad, bias.grad = (g.clone() for g in grads)
            return torch.ones(())

        loss = optimizer.step(closure)
        for scheduler in made:
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step(loss)
            else:
                scheduler.step()
    return weight.detach(), bias.detach()


def check(dtype, kwargs, impl, schedulers=()):
    plain = {"foreach": False, "fused": False}
    ours = train(fused_step.SGD, dtype, kwargs, impl, schedulers)
    same = train(torch.optim.SGD, dtype, kwargs, plain, schedulers)
    if dtype not in (torch.bfloat16, torch.float16):
        wide = same
    else:
        wide = train(torch.optim.SGD, torch.float64, kwargs, plain, schedulers, dtype)
    for a, b, c in zip(ours, same, wide, strict=True):
        if dtype in (torch.bfloat16, torch.float16):
            # Values stay below 8.
            assert_within_rule(str(kwargs), a, b, c, 8.0)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", INPUTS, ids=lambda case: case.desc)
def test_every_input(case, dtype, impl):
    check(dtype, case.kwargs, impl)


@pytest.mark.parametrize("case", INPUTS, ids=lambda case: case.desc)
@pytest.mark.parametrize("number", range(len(INFO.scheduler_inputs)))
@pytest.mark.filterwarnings("ignore")  # of schedulers that are given a tensor lr
def test_every_input_with_every_chain_of_schedulers(number, case):
    check(torch.float32, case.kwargs, {}, INFO.scheduler_inputs[number])


@pytest.mark.parametrize("case", INPUTS, ids=lambda case: case.desc)
def test_every_input_differentiably(case):
    results = []
    for make in (fused_step.SGD, torch.optim.SGD):
        start = torch.arange(6.0).requires_grad_()
        weight = start.clone()
        # torch's update of many tensors at once, its default on CUDA, has no derivative.
        options = {**copy.deepcopy(case.kwargs), "foreach": False}
        optimizer = make([weight], differentiable=True, **options)
        for _ in range(2):
            weight.grad = torch.ones(6)
            optimizer.step()
        (grad,) = torch.autograd.grad(weight.sum(), start)
        results.append((weight.detach(), grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_sparse_gradients_by_the_lists_options():
    kwargs, schedulers = INFO.metadata_for_sparse
    results = []
    for make in (fused_step.SGD, torch.optim.SGD):
        weight = torch.nn.Parameter(torch.arange(10.0).reshape(5, 2))
        optimizer = make([weight], **kwargs)
        made = [s(optimizer) for s in schedulers]
        for _ in range(3):
            weight.grad = torch.sparse_coo_tensor(
                [[0, 3]], torch.ones(2, 2), (5, 2), check_invariants=True
            )
            optimizer.step()
            for scheduler in made:
                scheduler.step()
        results.append(weight.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: case.optimizer_error_input.desc)
def test_every_error(case):
    assert case.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = case.optimizer_error_input
    params = given.params if given.params is not None else [torch.nn.Parameter(torch.ones(2))]
    if issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            fused_step.SGD(params, **given.kwargs)
    else:
        with pytest.raises(case.error_type, match=case.error_regex):
            fused_step.SGD(params, **given.kwargs)
