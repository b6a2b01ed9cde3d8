# SPDX-License-Identifier: MIT
"""fused_step.SGD on tensors of every layout, device and kind: fused, or by torch's functions."""

from __future__ import annotations

import warnings

import pytest
import torch
from device import DEVICE
from sgd_oracle import DTYPES, MOMENTUM, Twins, copy_of, momentum_of, random_params, torch_sgd
from torch import Tensor
from torch.nn import Parameter

import fused_step


def sparse_grad() -> Tensor:
    """[5, 2] with rows 1 and 3."""
    return torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 2), (5, 2), check_invariants=True)


def is_fused(optimizer: fused_step.SGD) -> bool:
    """Whether one more step, which is made, is a single fused call."""
    return optimizer._engine.step(optimizer, 0)


def both(make_params, grads, **options):
    """Parameters made twice, under fused_step.SGD and torch's for-loop, after len(grads) steps."""
    trained = []
    for make in (fused_step.SGD, torch_sgd):
        params = make_params()
        optimizer = make(params, **options)
        for step_grads in grads:
            for p, g in zip(params, step_grads, strict=True):
                p.grad = None if g is None else g.clone()
            optimizer.step()
        trained.append((params, optimizer))
    return trained


def assert_same(trained) -> None:
    (ours, optimizer), (theirs, torch_optimizer) = trained
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        a, b = momentum_of(optimizer, p), momentum_of(torch_optimizer, q)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every other": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("param_layout", LAYOUTS)
def test_every_layout_of_parameter_and_gradient(param_layout, grad_layout, dtype):
    start = random_params((3, 4, 5, 2), dtype=dtype)[0]
    twins = Twins([start], **MOMENTUM, weight_decay=0.1)
    for params, optimizer in zip(
        (twins.ours, twins.same_dtype, twins.exact), twins.optimizers(), strict=True
    ):
        params[0] = Parameter(LAYOUTS[param_layout](start.to(params[0].dtype).clone()))
        optimizer.param_groups[0]["params"][0] = params[0]
    for _ in range(3):
        twins.set_grads()
        for params, optimizer in zip(
            (twins.ours, twins.same_dtype, twins.exact), twins.optimizers(), strict=True
        ):
            params[0].grad = LAYOUTS[grad_layout](params[0].grad)
            optimizer.step()
    twins.check()
    assert is_fused(twins.optimizer) == (
        param_layout == grad_layout and param_layout != "every other"
    )


def test_a_buffer_in_another_order_than_its_parameter():
    weight = Parameter(torch.arange(12.0).reshape(3, 4))
    optimizer = fused_step.SGD([weight], lr=1.0, momentum=1.0)
    optimizer.state[weight]["momentum_buffer"] = torch.arange(12.0).reshape(4, 3).t()
    weight.grad = torch.zeros(3, 4)
    expected = weight.detach() - torch.arange(12.0).reshape(4, 3).t()
    optimizer.step()
    assert torch.equal(weight, expected)
    assert not is_fused(optimizer)


def test_sizes_of_one_have_any_stride():
    weight = Parameter(torch.ones(5, 1))
    weight.grad = torch.ones(1, 5).t()
    optimizer = fused_step.SGD([weight], lr=0.5)
    assert is_fused(optimizer)
    assert torch.equal(weight, torch.full((5, 1), 0.5))


def test_an_expanded_parameter_is_an_error_as_in_torch():
    base = torch.zeros(1)
    errors = []
    for make in (fused_step.SGD, torch_sgd):
        weight = Parameter(base.expand(5))
        weight.grad = torch.ones(5)
        with pytest.raises(RuntimeError, match="single memory location") as error:
            make([weight], lr=1.0).step()
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert base.item() == 0.0


def test_an_expanded_gradient():
    weight = Parameter(torch.zeros(5))
    weight.grad = torch.ones(1).expand(5)
    optimizer = fused_step.SGD([weight], **MOMENTUM)
    optimizer.step()
    assert torch.equal(weight, torch.full((5,), -0.1))
    optimizer.step(zero_grad=True, set_to_none=True)
    assert weight.grad is None


def test_parameters_that_share_memory_are_updated_one_after_the_other():
    for overlap in (slice(0, 10), slice(5, 15), slice(9, 10)):

        def make_params(overlap=overlap):
            base = torch.arange(20.0)
            return [Parameter(base[:10]), Parameter(base[overlap])]

        n = overlap.stop - overlap.start
        grads = [[torch.arange(10.0), torch.ones(n)] for _ in range(3)]
        trained = both(make_params, grads, lr=0.1, weight_decay=0.3, momentum=0.9)
        assert_same(trained)
        assert not is_fused(trained[0][1])


def test_a_view_beside_the_parameter_it_overlaps():
    def make_params():
        base = torch.arange(20.0)
        return [Parameter(base), Parameter(base[::2])]

    grads = [[torch.arange(20.0), torch.ones(10)] for _ in range(3)]
    assert_same(both(make_params, grads, lr=0.1, weight_decay=0.3))


def test_neighbours_in_one_storage_are_fused():
    def make_params():
        base = torch.arange(40.0)
        return [Parameter(base[:7]), Parameter(base[7:20]), Parameter(base[20:])]

    grads = [[torch.ones(7), torch.ones(13), torch.ones(20)] for _ in range(3)]
    trained = both(make_params, grads, **MOMENTUM)
    assert_same(trained)
    assert is_fused(trained[0][1])


@pytest.mark.parametrize("shift", (0, 1))
def test_a_gradient_that_is_a_parameters_memory(shift):
    def make():
        base = torch.arange(12.0)
        return Parameter(base[:10]), base

    results = []
    for make_optimizer in (fused_step.SGD, torch_sgd):
        weight, base = make()
        other = Parameter(torch.ones(10))
        optimizer = make_optimizer([weight, other], lr=0.5, weight_decay=0.1)
        weight.grad = torch.ones(10)
        other.grad = base[shift : 10 + shift]  # changed by the first update
        optimizer.step()
        results.append((weight.detach(), other.detach()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.cpu_only("memory of NumPy")
def test_memory_under_another_storage_is_found():
    array = torch.arange(10.0).numpy()
    results = []
    for make_optimizer in (fused_step.SGD, torch_sgd):
        mine = array.copy()
        weight, other = Parameter(torch.from_numpy(mine)), Parameter(torch.zeros(10))
        weight.grad, other.grad = torch.ones(10), torch.from_numpy(mine)
        make_optimizer([weight, other], lr=0.5).step()
        results.append(other.detach())
    assert torch.equal(*results)


def test_one_gradient_for_two_parameters():
    grad = torch.ones(5)
    for set_to_none in (True, False):
        params = [Parameter(torch.zeros(5)), Parameter(torch.zeros(5))]
        for p in params:
            p.grad = grad.clone() if p is params[0] else params[0].grad
        fused_step.SGD(params, lr=1.0).step(zero_grad=True, set_to_none=set_to_none)
        for p in params:
            assert torch.equal(p, torch.full((5,), -1.0))


def test_a_parameter_whose_storage_was_freed_is_torchs_error():
    weight = Parameter(torch.ones(100))
    optimizer = fused_step.SGD([weight], lr=1.0)
    weight.grad = torch.ones(100)
    weight.untyped_storage().resize_(0)
    assert not is_fused(optimizer)
    weight.untyped_storage().resize_(400)


def test_gradients_of_another_dtype_are_torchs_error_or_torchs_result():
    weight = Parameter(torch.ones(5, dtype=torch.bfloat16))
    optimizer = fused_step.SGD([weight], lr=0.5)
    with pytest.raises(RuntimeError, match="dtype"):
        weight.grad = torch.ones(5)
    weight.grad_dtype = torch.float32
    weight.grad = torch.ones(5)
    optimizer.step()
    assert torch.equal(weight, torch.full((5,), 0.5, dtype=torch.bfloat16))


def test_sparse_gradients_are_updated_as_torch_does():
    def make_params():
        return [Parameter(torch.arange(10.0).reshape(5, 2)), Parameter(torch.ones(3))]

    sparse = sparse_grad()
    assert_same(both(make_params, [[sparse, torch.ones(3)]] * 3, lr=0.5))


def test_sparse_gradients_with_weight_decay_are_torchs_error():
    errors = []
    for make in (fused_step.SGD, torch_sgd):
        weight = Parameter(torch.ones(5, 2))
        weight.grad = sparse_grad()
        with pytest.raises(RuntimeError) as error:
            make([weight], lr=0.5, weight_decay=0.1).step()
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("dtype", (torch.complex64, torch.complex128), ids=str)
def test_complex_parameters_are_updated_as_torch_does(dtype):
    start = torch.randn(7, dtype=dtype)
    grads = [[torch.randn(7, dtype=dtype)] for _ in range(3)]
    assert_same(both(lambda: [copy_of(start)], grads, **MOMENTUM, weight_decay=0.1))


def test_views_with_a_negative_or_conjugate_bit():
    base = torch.randn(7, dtype=torch.complex64)
    weight = Parameter(torch.zeros(7))
    weight.grad = base.conj().imag
    assert weight.grad.is_neg()
    fused_step.SGD([weight], lr=1.0).step()
    assert torch.equal(weight, base.imag)


def test_meta_parameters():
    weight = Parameter(torch.ones(5, device="meta"))
    weight.grad = torch.ones(5, device="meta")
    fused_step.SGD([weight], **MOMENTUM).step()
    assert weight.is_meta


def test_mixed_groups_are_fused_where_they_may_be():
    plain, complex_one = Parameter(torch.ones(9)), Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = fused_step.SGD([{"params": [plain, complex_one]}, {"params": []}], **MOMENTUM)
    for p in (plain, complex_one):
        p.grad = torch.ones_like(p)
    assert not is_fused(optimizer)
    assert torch.equal(plain, torch.ones(9))
    left = []
    assert optimizer._engine.update(optimizer, left.extend)
    assert [(g, [p is complex_one for p in params]) for g, params in left] == [(0, [True])]
    assert torch.equal(plain, torch.full((9,), 0.9))
    optimizer.step()
    assert momentum_of(optimizer, complex_one) is not None


def test_an_error_of_torchs_loop_leaves_the_fused_parameters_as_they_were():
    """Whatever their order: the plain loop would have updated those before the error."""
    for bad_first in (True, False):
        good, bad = Parameter(torch.ones(9)), Parameter(torch.ones(1).expand(3))
        optimizer = fused_step.SGD([bad, good] if bad_first else [good, bad], **MOMENTUM)
        for p in (good, bad):
            p.grad = torch.ones(p.shape)
        with pytest.raises(RuntimeError, match="single memory location"):
            optimizer.step()
        assert torch.equal(good, torch.ones(9))
        assert torch.equal(bad, torch.ones(3))
        assert momentum_of(optimizer, good) is None


class Wrapped(Tensor):
    """A subclass that does nothing."""


def test_tensor_subclasses():
    weight = Parameter(torch.ones(5).as_subclass(Wrapped))
    assert isinstance(weight, Wrapped)
    optimizer = fused_step.SGD([weight], lr=0.5)
    weight.grad = torch.ones(5)
    assert not is_fused(optimizer)
    optimizer.step()
    assert torch.equal(weight.as_subclass(Tensor), torch.full((5,), 0.5))


def test_a_learning_rate_that_is_part_of_a_parameter_is_read_for_each_parameter():
    trained = []
    for make in (fused_step.SGD, torch_sgd):
        params = [Parameter(torch.tensor([0.5])), Parameter(torch.tensor([1.0]))]
        optimizer = make(params, lr=params[0].detach()[0])
        for p in params:
            p.grad = torch.ones(1)
        optimizer.step()
        trained.append(params)
    for p, q in zip(*trained, strict=True):
        assert torch.equal(p, q)


class Tenfold(Tensor):
    """What is added by its factor is added ten times."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "alpha" in kwargs:
            kwargs["alpha"] *= 10
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("make", [fused_step.SGD, torch_sgd], ids=["ours", "torch's"])
def test_a_gradient_of_a_subclass_is_added_as_the_subclass_says(make):
    weight = Parameter(torch.ones(5))
    optimizer = make([weight], lr=0.5)
    for grad in (torch.ones(5), torch.ones(5).as_subclass(Tenfold), torch.ones(5)):
        weight.grad = grad
        optimizer.step()
    assert torch.equal(weight, torch.full((5,), -5.0))


def test_modes_see_torchs_operators():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    weight = Parameter(torch.ones(5))
    weight.grad = torch.ones(5)
    optimizer = fused_step.SGD([weight], lr=0.5)
    with Log() as log:
        optimizer.step()
    assert any("add_" in name for name in log.seen)
    assert torch.equal(weight, torch.full((5,), 0.5))


@pytest.mark.parametrize(
    "context",
    (
        lambda: DEVICE,
        lambda: torch.inference_mode(),
        lambda: torch.autograd.forward_ad.dual_level(),
        lambda: torch.amp.autocast(DEVICE.type, dtype=torch.bfloat16),
        lambda: torch.autograd.set_detect_anomaly(True),
    ),
    ids=("device", "inference", "forward AD", "autocast", "anomaly"),
)
def test_contexts_around_a_step(context):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anomaly mode announces itself
        entered = context()
    twins = Twins(random_params(9, 33), **MOMENTUM)
    with entered:
        for optimizer in twins.optimizers():
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            optimizer.step()
    twins.check()


def test_an_update_under_vmap_is_torchs():
    def step(w, g):
        weight = w.clone()
        weight.grad = None
        sgd = torch.optim.sgd.sgd
        sgd(
            [weight],
            [g],
            [None],
            lr=0.5,
            momentum=0.0,
            dampening=0.0,
            weight_decay=0.0,
            nesterov=False,
            maximize=False,
        )
        return weight

    weight = Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = fused_step.SGD([weight], lr=0.5)

    def inside(x):
        optimizer.step()
        return x + weight

    result = torch.func.vmap(inside)(torch.zeros(2, 3))
    assert torch.equal(result, torch.full((2, 3), 0.5))


def test_differentiable_steps_have_a_derivative():
    values = []
    for make in (fused_step.SGD, torch_sgd):
        lr = torch.tensor(0.5, requires_grad=True)
        start = torch.tensor([2.0, 3.0], requires_grad=True)
        weight = start.clone()
        weight.grad = torch.ones(2)
        make([weight], lr=lr, differentiable=True).step()
        (derivative,) = torch.autograd.grad(weight.sum(), lr)
        values.append(derivative)
    assert torch.equal(*values)
    assert values[0].item() == -2.0


@pytest.mark.parametrize("name", ("momentum", "weight_decay", "dampening"))
def test_options_that_are_tensors_go_to_torch(name):
    trained = []
    for make in (fused_step.SGD, torch_sgd):
        weight = copy_of(torch.arange(5.0))
        optimizer = make([weight], **MOMENTUM)
        optimizer.param_groups[0][name] = torch.tensor(0.5)
        for _ in range(3):
            weight.grad = torch.ones(5)
            optimizer.step()
        trained.append(weight)
    assert torch.equal(*trained)


def test_a_state_that_is_emptied_while_there_is_no_momentum():
    base = torch.ones(10)
    strided, plain = Parameter(base[::2]), Parameter(torch.ones(7))
    optimizer = fused_step.SGD([strided, plain], **MOMENTUM)
    for momentum in (0.9, 0.9, 0.0, 0.0, 0.9):
        optimizer.param_groups[0]["momentum"] = momentum
        if momentum == 0.0:
            optimizer.state.clear()
        for p in (strided, plain):
            p.grad = torch.ones_like(p)
        optimizer.step()
    # Buffers of 1 and 1.9, two steps without, a new one of 1.
    assert torch.allclose(plain, torch.full((7,), 1 - 0.1 * (1 + 1.9 + 1 + 1 + 1)))
    assert torch.equal(strided, plain[:5])
