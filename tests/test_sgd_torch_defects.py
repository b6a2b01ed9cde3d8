# SPDX-License-Identifier: MIT
"""What torch 2.13's ``SGD(fused=True)`` gets wrong on the CPU, fused_step.SGD gets right.

The oracle is torch's for-loop; in every dtype, at every size around the vector widths.
"""

from __future__ import annotations

import pytest
import torch
from device import DEVICE
from sgd_oracle import DTYPES, MOMENTUM, WIDEST, Twins, copy_of, momentum_of, random_params
from torch.nn import Parameter

import fused_step

SIZES = range(2 * WIDEST + 2)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@EVERY_DTYPE
@pytest.mark.parametrize("momentum", (0.0, 0.9))
def test_full_vectors_are_updated(dtype, momentum):
    for n in SIZES:
        weight = Parameter(torch.ones(n, dtype=dtype))
        optimizer = fused_step.SGD([weight], lr=0.5, momentum=momentum)
        for expected in (0.5, 0.0 - 0.5 * momentum):
            weight.grad = torch.ones(n, dtype=dtype)
            optimizer.step()
            assert torch.allclose(
                weight.detach().double(),
                torch.full((n,), expected, dtype=torch.float64),
                rtol=0,
                atol=torch.finfo(dtype).eps,
            )


@EVERY_DTYPE
def test_an_infinite_gradient_at_the_first_scaled_step_leaves_no_buffer_behind(dtype):
    for n in SIZES:
        if n == 0:
            continue
        twins = Twins(random_params(n, dtype=dtype), **MOMENTUM)
        before = twins.ours[0].detach().clone()
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
        scaler.scale(torch.zeros(()))  # makes the scale
        twins.ours[0].grad = torch.full((n,), float("inf"), dtype=dtype)
        scaler.step(twins.optimizer)
        scaler.update()
        assert torch.equal(twins.ours[0].detach(), before)
        buf = momentum_of(twins.optimizer, twins.ours[0])
        # On CUDA only the device knows that the step was skipped: there are zeros.
        assert buf is None if DEVICE.type == "cpu" else not buf.any()
        for _ in range(2):
            twins.set_grads()
            for optimizer in twins.optimizers()[1:]:
                optimizer.step()
            twins.ours[0].grad *= scaler.get_scale()
            scaler.step(twins.optimizer)
            scaler.update()
        twins.check(f"n {n}")


@EVERY_DTYPE
def test_a_gradient_that_appears_later(dtype):
    for n in SIZES:
        twins = Twins(random_params(n, n, dtype=dtype), **MOMENTUM)
        grad = torch.full((n,), 0.5, dtype=dtype)
        twins.step([grad, None])
        twins.step([grad, None])
        twins.step([grad, -grad])
        twins.step([None, grad])
        twins.check(f"n {n}")


@EVERY_DTYPE
@pytest.mark.parametrize("momentum", (0.0, 0.9))
def test_a_gradient_with_other_strides_than_its_parameter(dtype, momentum):
    for n in SIZES:
        twins = Twins(random_params((n, 3), dtype=dtype), lr=0.1, momentum=momentum)
        for _ in range(3):
            twins.set_grads()
            for params in (twins.ours, twins.same_dtype, twins.exact):
                params[0].grad = params[0].grad.t().contiguous().t()
            for optimizer in twins.optimizers():
                optimizer.step()
        twins.check(f"n {n}")


@EVERY_DTYPE
@pytest.mark.parametrize("momentum", (0.0, 0.9))
@pytest.mark.parametrize("stride", (2, 3))
def test_a_strided_view_leaves_its_neighbours_alone(dtype, momentum, stride):
    for n in SIZES:
        base = random_params((3, n), dtype=dtype)[0]
        columns = slice(None, None, stride)
        beside = torch.ones(n, dtype=torch.bool)
        beside[columns] = False
        twins = Twins([base[:, columns]], lr=0.1, momentum=momentum)
        for optimizer, params in zip(
            twins.optimizers(), (twins.ours, twins.same_dtype, twins.exact), strict=True
        ):
            whole = base.to(params[0].dtype).clone()
            params[0] = Parameter(whole[:, columns])
            assert params[0].data_ptr() == whole.data_ptr()
            optimizer.param_groups[0]["params"][0] = params[0]
            params.append(whole)
        for _ in range(3):
            grad = torch.randn(3, len(range(n)[columns]), dtype=torch.float64).to(dtype)
            for optimizer, params in zip(
                twins.optimizers(), (twins.ours, twins.same_dtype, twins.exact), strict=True
            ):
                params[0].grad = grad.to(params[0].dtype)
                optimizer.step()
        whole = twins.ours.pop()
        del twins.same_dtype[1:], twins.exact[1:]
        twins.check(f"n {n}")
        assert torch.equal(whole[:, beside], base[:, beside]), f"n {n}"


@EVERY_DTYPE
def test_a_dense_view_inside_a_larger_tensor_leaves_its_neighbours_alone(dtype):
    for n in SIZES:
        for offset in range(4):
            base = random_params(n + 8, dtype=dtype)[0]
            whole = base.clone()
            view = Parameter(whole[offset : offset + n])
            twins = Twins([view], **MOMENTUM)
            optimizer = fused_step.SGD([view], **MOMENTUM)
            for _ in range(2):
                twins.set_grads()
                view.grad = twins.ours[0].grad.clone()
                optimizer.step()
                for other in twins.optimizers():
                    other.step()
            assert torch.equal(view, twins.ours[0])
            twins.check(f"n {n}, offset {offset}")
            assert torch.equal(whole[:offset], base[:offset])
            assert torch.equal(whole[offset + n :], base[offset + n :])


def test_loading_a_state_keeps_the_fused_path():
    weight = Parameter(torch.ones(20))
    theirs = torch.optim.SGD([copy_of(weight)], foreach=False, fused=False, **MOMENTUM)
    ours = fused_step.SGD([weight], **MOMENTUM)
    ours.load_state_dict(theirs.state_dict())
    weight.grad = torch.ones(20)
    # A part of the step that is left to torch is a reason for False.
    assert ours._engine.step(ours, 0) is True
