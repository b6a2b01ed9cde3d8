# SPDX-License-Identifier: MIT
"""What a program may change between two steps of fused_step.SGD, which remembers the last one.

After three steps alike, the fourth finds one thing changed. It must do what torch.optim.SGD does
with the same change, bit for bit, and in 16 bit what a fused_step.SGD does that remembers nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from sgd_oracle import copy_of, momentum_of, random_params, same_bits, torch_sgd
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fused_step
from fused_step._extension import _C

# More than the step looks ahead.
SHAPES = ((4, 6), (4, 6), 33, (3, 1, 2), (4, 6), *((k,) for k in range(1, 8)))
# Twice as many, and those of SHAPES, are looked at by two threads.
MANY = 300
CHANGED = 1  # the index of the parameter that something happens to
FIRST = 0  # where PyTorch raises; later ones would leave those before them updated
Change = Callable[[Optimizer, list[Parameter]], None]


def grads_like(params: list[Parameter], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]


def in_more_memory(t: Tensor) -> Parameter:
    """A parameter with t's values that begins within its storage."""
    memory = torch.zeros(t.numel() + 8, dtype=t.dtype)
    return Parameter(memory[4:-4].view(t.shape).copy_(t.detach()))


def data_replaced(optimizer, params):
    params[CHANGED].data = params[CHANGED].data.clone()


def data_strided(optimizer, params):
    wide = torch.zeros(4, 12, dtype=params[CHANGED].dtype)
    wide[:, ::2] = params[CHANGED].data
    params[CHANGED].data = wide[:, ::2]


def data_in_another_order(optimizer, params):
    params[CHANGED].data = params[CHANGED].data.t().contiguous().t()


def data_of_another_shape(optimizer, params):
    p = params[CHANGED]
    p.data, p.grad = p.data.view(6, 4), p.grad.view(6, 4)
    buf = momentum_of(optimizer, p)
    if buf is not None:
        optimizer.state[p]["momentum_buffer"] = buf.view(6, 4)


def data_of_another_shape_than_the_gradient(optimizer, params):
    """PyTorch raises."""
    params[FIRST].data = params[FIRST].data.view(6, 4)


def data_copies_on_write(optimizer, params):
    """The memory that it was copied from must stay as it is."""
    source = params[CHANGED].data
    params[CHANGED].data = torch._lazy_clone(source)
    params.append(Parameter(source))


def all_data_copies_on_write(optimizer, params):
    """All of one shape from one."""
    sources: dict[torch.Size, Tensor] = {}
    for p in optimizer.param_groups[0]["params"]:
        p.data = torch._lazy_clone(sources.setdefault(p.shape, p.data.clone()))
    params += map(Parameter, sources.values())


def grad_copies_on_write(optimizer, params):
    params[CHANGED].grad = torch._lazy_clone(params[CHANGED].grad)


class Halving(Parameter):
    """Takes half of each step."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is Tensor.add_:
            kwargs["alpha"] = kwargs.get("alpha", 1) * 0.5
        return super().__torch_function__(function, types, args, kwargs)


def class_changed(optimizer, params):
    params[CHANGED].__class__ = Halving


def contents_swapped(optimizer, params):
    p = params[CHANGED]
    other = Parameter(p.detach() * 0.5)
    other.grad = p.grad
    torch.utils.swap_tensors(p, other)


def data_shared(optimizer, params):
    params[CHANGED].data = params[2].data[:24].view(4, 6)


def grad_gone(optimizer, params):
    params[CHANGED].grad = None


def first_grad_gone(optimizer, params):
    params[0].grad = None


def last_grad_gone(optimizer, params):
    params[-1].grad = None


def grad_in_another_order(optimizer, params):
    params[CHANGED].grad = params[CHANGED].grad.t().contiguous().t()


def grad_strided(optimizer, params):
    wide = torch.zeros(4, 12, dtype=params[CHANGED].dtype)
    wide[:, ::2] = params[CHANGED].grad
    params[CHANGED].grad = wide[:, ::2]


def grad_is_another_parameter(optimizer, params):
    params[CHANGED].grad = params[2].data[:24].view(4, 6)


def grad_is_the_parameter(optimizer, params):
    params[CHANGED].grad = params[CHANGED].data


def grad_overlaps_its_parameter(optimizer, params):
    """PyTorch raises."""
    p = params[FIRST]
    p.grad = p.data.as_strided(p.shape, p.stride(), p.storage_offset() - 1)


def grad_sparse(optimizer, params):
    p = params[CHANGED]
    p.data, p.grad = p.data.clone(), p.grad.to_sparse()


def grads_exchanged(optimizer, params):
    """Two of one shape: each at the other's place."""
    a, b = params[0], params[4]
    a.grad, b.grad = b.grad, a.grad


def buffer_gone(optimizer, params):
    optimizer.state.pop(params[CHANGED], None)


def buffer_replaced(optimizer, params):
    p = params[CHANGED]
    if p in optimizer.state:
        optimizer.state[p]["momentum_buffer"] = torch.full_like(p.data, 0.5)


def buffer_is_the_gradient(optimizer, params):
    p = params[CHANGED]
    if p in optimizer.state:
        optimizer.state[p]["momentum_buffer"] = p.grad


def buffer_of_another_type(optimizer, params):
    """At the same place. PyTorch raises."""
    p = params[FIRST]
    if p in optimizer.state:
        buf = optimizer.state[p]["momentum_buffer"]
        types = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        optimizer.state[p]["momentum_buffer"] = buf.view(types[buf.itemsize])


def options_not_fused(optimizer, params):
    optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.1)


def options_changed(optimizer, params):
    optimizer.param_groups[0].update(lr=0.03, weight_decay=0.2, maximize=True)


def momentum_changed(optimizer, params):
    group = optimizer.param_groups[0]
    group["momentum"] = 0.0 if group["momentum"] else 0.5


def parameter_exchanged(optimizer, params):
    new = Parameter(torch.full_like(params[CHANGED].data, 2.0))
    new.grad = params[CHANGED].grad
    in_group = optimizer.param_groups[0]["params"]
    place = next(k for k, p in enumerate(in_group) if p is params[CHANGED])
    in_group[place] = params[CHANGED] = new


def order_exchanged(optimizer, params):
    optimizer.param_groups[0]["params"].reverse()


def group_added(optimizer, params):
    new = Parameter(torch.ones(7, dtype=params[0].dtype))
    new.grad = torch.ones_like(new)
    params.append(new)
    optimizer.add_param_group({"params": [new], "lr": 0.5})


CHANGES: tuple[Change, ...] = (
    data_replaced,
    data_strided,
    data_in_another_order,
    data_of_another_shape,
    data_of_another_shape_than_the_gradient,
    class_changed,
    contents_swapped,
    data_shared,
    data_copies_on_write,
    all_data_copies_on_write,
    grad_copies_on_write,
    grad_gone,
    first_grad_gone,
    last_grad_gone,
    grad_in_another_order,
    grad_strided,
    grad_is_another_parameter,
    grad_is_the_parameter,
    grad_overlaps_its_parameter,
    grad_sparse,
    grads_exchanged,
    buffer_gone,
    buffer_replaced,
    buffer_is_the_gradient,
    buffer_of_another_type,
    options_not_fused,
    options_changed,
    momentum_changed,
    parameter_exchanged,
    order_exchanged,
    group_added,
)


@dataclasses.dataclass
class Left:
    params: list[Parameter]
    bufs: list[Tensor | None]
    error: str | None


def train(optimizer: Optimizer, params: list[Parameter], change: Change, new_grads: bool) -> Left:
    """Five steps with a change before the fourth; an error of PyTorch's ends them."""
    error = None
    for number in range(5):
        if number == 0 or new_grads:
            for p, g in zip(params, grads_like(params, number), strict=True):
                p.grad = g
        if number == 3:
            change(optimizer, params)
        try:
            optimizer.step()
        except RuntimeError as e:
            error = str(e)
            break
    return Left(params, [momentum_of(optimizer, p) for p in params], error)


def assert_same(ours: Left, theirs: Left) -> None:
    assert ours.error == theirs.error
    for k, (p, q) in enumerate(zip(ours.params, theirs.params, strict=True)):
        assert same_bits(p.detach(), q.detach()), f"parameter {k}"
    for k, (a, b) in enumerate(zip(ours.bufs, theirs.bufs, strict=True)):
        assert (a is None) == (b is None), f"buffer {k}"
        if a is not None:
            assert same_bits(a.to_dense(), b.to_dense()), f"buffer {k}"


class Forgetful(fused_step.SGD):
    """Begins each step anew."""

    def step(self, *args, **kwargs):
        self._engine = _C.SgdStep()
        return super().step(*args, **kwargs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("momentum", (0.0, 0.9))
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("new_grads", (False, True), ids=("grads stay", "grads new"))
def test_what_has_changed_since_the_last_step_is_seen(change, momentum, dtype, new_grads):
    start = random_params(*SHAPES, dtype=dtype)
    ours, theirs = [in_more_memory(p) for p in start], [in_more_memory(p) for p in start]
    options = {"lr": 0.1, "momentum": momentum}
    assert_same(
        train(fused_step.SGD(ours, **options), ours, change, new_grads),
        train(torch_sgd(theirs, **options), theirs, change, new_grads),
    )


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("momentum_dtype", (None, torch.float32), ids=str)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("new_grads", (False, True), ids=("grads stay", "grads new"))
def test_what_has_changed_is_seen_in_16_bit(change, momentum_dtype, dtype, new_grads):
    start = random_params(*SHAPES, dtype=dtype)
    ours, anew = [in_more_memory(p) for p in start], [in_more_memory(p) for p in start]
    options = {"lr": 0.1, "momentum": 0.9, "momentum_dtype": momentum_dtype}
    assert_same(
        train(fused_step.SGD(ours, **options), ours, change, new_grads),
        train(Forgetful(anew, **options), anew, change, new_grads),
    )


@pytest.mark.cpu_only("threads of torch")
@pytest.mark.parametrize("momentum", (0.0, 0.9))
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("new_grads", (False, True), ids=("grads stay", "grads new"))
@pytest.mark.parametrize("where", ("first", "last"))
def test_what_has_changed_is_seen_among_many_parameters(where, change, momentum, new_grads):
    torch.set_num_threads(2)
    options = {"lr": 0.1, "momentum": momentum}
    left, others = [], []
    for make in (fused_step.SGD, torch_sgd):
        changed = [in_more_memory(p) for p in random_params(*SHAPES)]
        beside = [Parameter(p) for p in random_params(*([3, 4] * MANY), seed=1)]
        for p, g in zip(beside, grads_like(beside, 7), strict=True):
            p.grad = g
        optimizer = make(changed + beside if where == "first" else beside + changed, **options)
        left.append(train(optimizer, changed, change, new_grads))
        others.append(beside)
    assert_same(*left)
    # PyTorch's loop has updated those before the one that it raises for.
    if left[0].error is None:
        for k, (p, q) in enumerate(zip(*others, strict=True)):
            assert same_bits(p.detach(), q.detach()), f"beside {k}"


def test_gradient_of_two_parameters_is_zeroed_after_both_have_used_it():
    ours, theirs = ([copy_of(p) for p in random_params(8, 8)] for _ in range(2))
    optimizer, reference = fused_step.SGD(ours, lr=0.1), torch_sgd(theirs, lr=0.1)
    for params in (ours, theirs):
        params[0].grad = params[1].grad = torch.ones(8)
    for _ in range(3):
        optimizer.step()
        reference.step()
    optimizer.step(zero_grad=True, set_to_none=False)
    reference.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert not p.grad.any()
