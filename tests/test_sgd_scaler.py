# SPDX-License-Identifier: MIT
"""GradScaler and gradient clipping around and inside fused_step.SGD."""

from __future__ import annotations

import pytest
import torch
from device import DEVICE
from oracle import assert_within_rule
from sgd_oracle import DTYPES, EXACT_DTYPES, MOMENTUM, Twins, copy_of, momentum_of, random_params
from torch.nn import Parameter

import fused_step

SIZES = (1, 7, 8, 9, 16, 17, 33, 1000, 0)


def make_scaler(scale: float) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=scale, growth_interval=1000)
    scaler.scale(torch.zeros(()))  # makes its tensor
    return scaler


@pytest.mark.parametrize("scale", (1.0, 4.0, 3.0))
@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
def test_a_scaled_step_has_the_plain_ones_bits(dtype, scale):
    twins = Twins(random_params(*SIZES, dtype=dtype), **MOMENTUM, weight_decay=0.1)
    scalers = make_scaler(scale), make_scaler(scale)
    for _ in range(3):
        twins.set_grads()
        for params in (twins.ours, twins.same_dtype):
            for p in params:
                p.grad *= scale
        scalers[0].step(twins.optimizer)
        scalers[1].step(twins.torch_optimizer)
        for scaler in scalers:
            scaler.update()
        for p, q in zip(twins.ours, twins.same_dtype, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(p.grad, q.grad)  # unscaled, both


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_scaled_16_bit_gradients_are_unscaled_in_float32(dtype):
    # 2^-20 is below the smallest normal float16; scaled it is not rounded at all.
    weight = Parameter(torch.zeros(33, dtype=dtype))
    optimizer = fused_step.SGD([weight], lr=2.0**15)
    scaler = make_scaler(2.0**16)
    weight.grad = torch.full((33,), 1.5 * 2.0**-4, dtype=dtype)
    scaler.step(optimizer)
    assert torch.equal(weight, torch.full((33,), -1.5 * 2.0**-5, dtype=dtype))


class ClippingOf:
    """A step that clips before it updates."""

    def step(self, closure=None):
        torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 0.5)
        return super().step(closure)


class ClippingSGD(ClippingOf, fused_step.SGD):
    pass


class ClippingTorchSGD(ClippingOf, torch.optim.SGD):
    pass


def clip_before(optimizer):
    params = optimizer.param_groups[0]["params"]
    optimizer.register_step_pre_hook(
        lambda *_: torch.nn.utils.clip_grad_norm_(params, 0.5) and None
    )


def clip_in_its_own_step(optimizer):
    step, params = optimizer.step, optimizer.param_groups[0]["params"]

    def clipping(closure=None):
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        return step(closure)

    optimizer.step = clipping


@pytest.mark.parametrize("by", ["hook", "step", "step of the instance"])
def test_what_looks_at_gradients_before_a_scaled_step_finds_them_unscaled(by):
    def trained(make):
        params = [copy_of(p) for p in random_params(3, 17)]
        optimizer = make(params, lr=0.1, momentum=0.9)
        if by == "hook":
            clip_before(optimizer)
        elif by == "step of the instance":
            clip_in_its_own_step(optimizer)
        scaler = make_scaler(1024.0)
        for k in range(3):
            for p in params:
                p.grad = torch.full_like(p, 1024.0 * (k + 1))
            scaler.step(optimizer)
            scaler.update()
        return params

    ours = ClippingSGD if by == "step" else fused_step.SGD
    torchs = ClippingTorchSGD if by == "step" else torch.optim.SGD
    for p, q in zip(trained(ours), trained(torchs), strict=True):
        assert torch.equal(p, q)


def test_hooks_are_not_called_for_a_step_that_the_scaler_skips():
    weight = Parameter(torch.ones(3))
    optimizer = fused_step.SGD([weight], lr=0.5)
    calls = []
    handle = optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    scaler = make_scaler(2.0)
    for grad in (float("inf"), 2.0):
        weight.grad = torch.full((3,), grad)
        scaler.step(optimizer)
        scaler.update()
    assert calls == ["post"]
    handle.remove()
    assert optimizer._step_supports_amp_scaling  # fused again
    optimizer._step_supports_amp_scaling = False
    assert not optimizer._step_supports_amp_scaling


@pytest.mark.parametrize("bad", (float("inf"), float("nan")))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_skipped_step_changes_nothing(dtype, bad):
    for first in (True, False):
        params = [copy_of(p) for p in random_params(*SIZES, dtype=dtype)]
        optimizer = fused_step.SGD(params, **MOMENTUM, weight_decay=0.1)
        if not first:
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        before = [p.detach().clone() for p in params]
        bufs = [None if first else momentum_of(optimizer, p).clone() for p in params]
        versions = [p._version for p in params]
        scaler = make_scaler(8.0)
        for p in params:
            p.grad = torch.ones_like(p)
        params[3].grad[2] = bad
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 4.0
        for p, was, buf, version in zip(params, before, bufs, versions, strict=True):
            assert torch.equal(p, was)
            now = momentum_of(optimizer, p)
            if DEVICE.type == "cpu":
                assert p._version == version
                assert (now is None) == (buf is None)
            elif first:
                # That it was skipped only the device knows: zeros are what it would start from.
                assert not now.any()
            assert buf is None or torch.equal(now, buf)
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("dampening", (0.0, 0.3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_skipped_first_step_is_made_up_for_by_the_next(dtype, dampening):
    twins = Twins(random_params(*SIZES, dtype=dtype), **MOMENTUM, dampening=dampening)
    scaler = make_scaler(8.0)
    for p in twins.ours:
        p.grad = torch.full_like(p, float("inf"))
    scaler.step(twins.optimizer)
    scaler.update(1.0)
    for _ in range(3):
        twins.set_grads()
        scaler.step(twins.optimizer)
        scaler.update()
        for optimizer in twins.optimizers()[1:]:
            optimizer.step()
    twins.check()


def test_a_skipped_step_zeroes_the_gradients_if_asked_to():
    for set_to_none in (True, False):
        weight = Parameter(torch.ones(5))
        optimizer = fused_step.SGD([weight], lr=0.1)
        scaler = make_scaler(8.0)
        weight.grad = torch.full((5,), float("inf"))
        scaler.step(optimizer, zero_grad=True, set_to_none=set_to_none)
        assert torch.equal(weight, torch.ones(5))
        assert weight.grad is None if set_to_none else not weight.grad.any()


def test_unscale_before_the_step_is_not_done_twice():
    twins = Twins(random_params(9, 33), **MOMENTUM)
    scalers = make_scaler(8.0), make_scaler(8.0)
    twins.set_grads()
    for scaler, optimizer, params in zip(
        scalers, twins.optimizers(), (twins.ours, twins.same_dtype), strict=False
    ):
        for p in params:
            p.grad *= 8.0
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        scaler.step(optimizer)
    for p, q in zip(twins.ours, twins.same_dtype, strict=True):
        assert torch.equal(p, q)


def test_parameters_that_torch_updates_are_unscaled_and_skipped_too():
    for bad in (False, True):
        found = []
        for make in (fused_step.SGD, torch.optim.SGD):
            base = torch.ones(10)
            params = [Parameter(base[::2]), Parameter(torch.ones(7))]
            optimizer = make(params, **MOMENTUM)
            scaler = make_scaler(8.0)
            for _ in range(2):
                for p in params:
                    p.grad = torch.full_like(p, 8.0)
                if bad:
                    params[1].grad[3] = float("inf")
                scaler.step(optimizer)
                scaler.update(8.0)
            # Of a skipped step the gradients are left as they are, here as in torch's fused one.
            grads = [] if bad else [p.grad for p in params]
            found.append([*(p.detach() for p in params), *grads])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


def test_a_scaled_training_by_autocast():
    torch.manual_seed(0)
    start = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    x, t = torch.randn(16, 4), torch.randn(16, 1)
    trained = []
    for make in (fused_step.SGD, torch.optim.SGD):
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        model.load_state_dict(start.state_dict())
        optimizer = make(model.parameters(), **MOMENTUM)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10)
        for _ in range(5):
            with torch.amp.autocast(DEVICE.type, dtype=torch.bfloat16):
                loss = torch.nn.functional.mse_loss(model(x), t)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        trained.append([p.detach() for p in model.parameters()])
    for a, b in zip(*trained, strict=True):
        assert torch.equal(a, b)


def test_clip_grad_norm_before_the_step():
    twins = Twins(random_params(9, 33), **MOMENTUM)
    for _ in range(3):
        twins.set_grads()
        for params, optimizer in zip(
            (twins.ours, twins.same_dtype, twins.exact), twins.optimizers(), strict=True
        ):
            torch.nn.utils.clip_grad_norm_(params, 0.5)
            optimizer.step()
    twins.check()


@pytest.mark.parametrize("max_norm", (0.0, 0.5, 2, 1e6))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_grad_norm_clips_as_clip_grad_norm(dtype, max_norm):
    twins = Twins(random_params(*SIZES, dtype=dtype), **MOMENTUM, max_grad_norm=max_norm)
    norms = []
    for _ in range(3):
        twins.set_grads()
        kept = [p.grad.clone() for p in twins.ours]
        twins.optimizer.step()
        for p, grad in zip(twins.ours, kept, strict=True):
            assert torch.equal(p.grad, grad)
        norms = []
        for params, optimizer in zip(
            (twins.same_dtype, twins.exact), twins.optimizers()[1:], strict=True
        ):
            norms.append(torch.nn.utils.clip_grad_norm_(params, max_norm))
            optimizer.step()
        ours = twins.optimizer.grad_norm
        assert_within_rule("norm", ours, norms[0].to(ours.dtype), norms[1], float(norms[1]))
    for k, (a, b, c) in enumerate(zip(twins.ours, twins.same_dtype, twins.exact, strict=True)):
        # The norm is rounded otherwise than torch's: not the same bits, but within the rule.
        scale = twins.scales[k] + 3 * 3 * 0.1 * float(c.grad.abs().max() if c.numel() else 0.0)
        assert_within_rule(f"param {k}", a.detach(), b.detach(), c.detach(), scale)


def test_max_grad_norm_may_be_changed_between_steps():
    weight = Parameter(torch.zeros(4))
    optimizer = fused_step.SGD([weight], lr=1.0, max_grad_norm=1.0)
    weight.grad = torch.full((4,), 2.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == 4.0
    assert torch.allclose(weight, torch.full((4,), -0.5), rtol=2e-6, atol=0)
    optimizer.max_grad_norm = None
    optimizer.step()
    assert torch.allclose(weight, torch.full((4,), -2.5), rtol=2e-6, atol=0)


@pytest.mark.parametrize("value", (float("inf"), float("nan")))
def test_max_grad_norm_of_gradients_that_are_not_finite(value):
    results = []
    for max_grad_norm in (1.0, None):
        make = fused_step.SGD if max_grad_norm else torch.optim.SGD
        options = {"max_grad_norm": max_grad_norm} if max_grad_norm else {}
        weight = Parameter(torch.ones(5))
        optimizer = make([weight], lr=1.0, **options)
        weight.grad = torch.ones(5)
        weight.grad[2] = value
        if max_grad_norm is None:
            torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
        results.append(weight.detach())
    assert torch.equal(results[0].isnan(), results[1].isnan())
    assert torch.equal(results[0].nan_to_num(), results[1].nan_to_num())


@pytest.mark.parametrize("fused", (True, False))
def test_max_grad_norm_is_of_unscaled_gradients(fused):
    base = torch.zeros(8)
    weight = Parameter(base[::1] if fused else base[::2])
    optimizer = fused_step.SGD([weight], lr=1.0, max_grad_norm=1.0)
    scaler = make_scaler(8.0)
    weight.grad = torch.full_like(weight, 16.0)
    scaler.step(optimizer)
    norm = 2.0 * weight.numel() ** 0.5
    assert optimizer.grad_norm.item() == pytest.approx(norm)
    assert torch.allclose(weight, torch.full_like(weight, -2.0 / norm), rtol=2e-6, atol=0)
    assert torch.equal(weight.grad, torch.full_like(weight, 2.0))


def test_max_grad_norm_is_over_all_groups_and_kinds_of_parameters():
    base = torch.zeros(8)
    strided, plain = Parameter(base[::2]), Parameter(torch.zeros(5, dtype=torch.bfloat16))
    optimizer = fused_step.SGD([{"params": [strided]}, {"params": [plain]}], 1.0, max_grad_norm=1.0)
    strided.grad, plain.grad = torch.ones(4), torch.ones(5, dtype=torch.bfloat16)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(3.0)
    assert torch.allclose(strided, torch.full((4,), -1 / 3), rtol=2e-6, atol=0)
    assert plain[0].item() == pytest.approx(-1 / 3, rel=2**-8)
    assert not base[1::2].any()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_max_grad_norm_keeps_the_type_of_0_dim_parameters_that_torch_updates(dtype):
    scalar, strided = Parameter(torch.tensor(1.0, dtype=dtype)), Parameter(torch.zeros(8)[::2])
    optimizer = fused_step.SGD([scalar, strided], lr=1.0, momentum=0.9, max_grad_norm=1.0)
    scalar.grad, strided.grad = torch.ones_like(scalar), torch.ones(4)
    optimizer.step()
    assert momentum_of(optimizer, scalar).dtype == dtype
    assert scalar.item() == pytest.approx(1 - 5**-0.5, rel=2**-7)


def test_large_float_gradients_do_not_overflow_the_norm():
    weight = Parameter(torch.zeros(2, dtype=torch.float32))
    optimizer = fused_step.SGD([weight], lr=1.0, max_grad_norm=1.0)
    weight.grad = torch.tensor([3e25, 4e25])
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(5e25)
    assert torch.allclose(weight, torch.tensor([-0.6, -0.8]))


def test_no_gradients_at_all():
    weight = Parameter(torch.ones(3))
    optimizer = fused_step.SGD([weight], lr=1.0, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == 0.0
    assert torch.equal(weight, torch.ones(3))
