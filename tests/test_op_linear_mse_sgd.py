# SPDX-License-Identifier: MIT
"""torch.ops.fused_step.linear_mse_sgd_: the step of a linear layer as an operator of PyTorch."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from oracle import (
    DTYPES,
    OPTION_SETS,
    Problem,
    Trained,
    assert_within_rule,
    describe,
    same_bits,
    scales,
    thinned,
    train_fused,
    train_plain,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_step  # noqa: F401  registers the op

OP = torch.ops.fused_step.linear_mse_sgd_
SHAPES = [(37, 13, 1), (41, 21, 6), (45, 19, 131), (1, 1, 1), (3, 2, 1)]


def arguments_of(problem: Problem) -> tuple[list[torch.Tensor | None], dict[str, Any]]:
    """Fresh positional tensors and keywords of a first step."""
    options = dict(problem.options)
    weight = problem.weight.clone()
    bias = None if problem.bias is None else problem.bias.clone()
    buffers: list[torch.Tensor | None] = [None, None]
    if options.get("momentum"):
        # Poisoned: a first step sets the buffer, whatever was in it.
        buffers = [None if a is None else torch.full_like(a, float("nan")) for a in (weight, bias)]
    tensors = [weight, bias, *buffers, problem.input, problem.target]
    return tensors, {**options, "reduction": problem.reduction, "first_step": True}


def train(problem: Problem, steps: int) -> Trained:
    """Trains by the op alone."""
    tensors, keywords = arguments_of(problem)
    trained = Trained()
    for _ in range(steps):
        trained.losses.append(OP(*tensors, **keywords))
        keywords["first_step"] = False
    trained.weight, trained.bias, trained.weight_buffer, trained.bias_buffer = tensors[:4]
    return trained


# --- result -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTION_SETS, ids=describe)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_op_equals_plain_loop(shape, options, dtype):
    for bias, reduction in itertools.product((True, False), ("mean", "sum")):
        if thinned(dtype, 2 * bias, reduction == "sum"):
            continue
        problem = Problem.random(
            *shape, dtype=dtype, bias=bias, reduction=reduction, options=options
        )
        ours = train(problem, 3)
        same_dtype = train_plain(problem, 3)
        exact = train_plain(problem, 3, torch.float64)
        scale = scales(problem, 3)
        for (name, a), (_, b), (_, c) in zip(
            ours.tensors(), same_dtype.tensors(), exact.tensors(), strict=True
        ):
            assert (a is None) == (b is None), name
            if a is not None:
                assert_within_rule(f"{problem}: {name}", a, b, c, scale[name])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_op_and_train_step_have_the_same_bits(shape):
    problem = Problem.random(*shape, options={"momentum": 0.9, "weight_decay": 0.1})
    ours, door = train(problem, 3), train_fused(problem, 3)
    for (name, a), (_, b) in zip(ours.tensors(), door.tensors(), strict=True):
        assert same_bits(a, b), name


def test_defaults_are_a_bare_mean_step():
    problem = Problem.random(37, 13, 3)
    expected = train(problem, 1)
    weight, bias = problem.weight.clone(), problem.bias.clone()
    loss = OP(weight, bias, None, None, problem.input, problem.target, lr=problem.options["lr"])
    assert torch.equal(loss, expected.losses[0])
    assert torch.equal(weight, expected.weight)
    assert torch.equal(bias, expected.bias)


def test_a_buffer_given_without_momentum_is_left_alone():
    problem = Problem.random(37, 13, 3)
    tensors, keywords = arguments_of(problem)
    buffers = [torch.full_like(tensors[0], 7.0), torch.full_like(tensors[1], 7.0)]
    tensors[2:4] = buffers
    OP(*tensors, **keywords)
    assert all((buffer == 7.0).all() for buffer in buffers)


def test_leading_dimensions_and_strides_are_taken():
    problem = Problem.random(24, 13, 3)
    expected = train(problem, 1)
    table = torch.full((24, 20), float("nan"))
    table[:, 2:15] = problem.input
    strided = dataclasses.replace(
        problem,
        input=table[:, 2:15].unflatten(0, (2, 3, 4)),
        target=problem.target.unflatten(0, (2, 3, 4)),
    )
    assert torch.equal(train(strided, 1).weight, expected.weight)


# --- as an operator -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (0, 3, 2), (5, 0, 2)], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_opcheck(shape, momentum):
    """The numbers among the options do not change what an operator is; its tensors do."""
    options = {"momentum": momentum, "weight_decay": 0.1, "nesterov": momentum > 0}
    for bias in (True, False):
        # The mean over no rows is NaN, which opcheck does not take for equal to itself.
        reduction = "sum" if shape[0] == 0 else "mean"
        problem = Problem.random(*shape, bias=bias, reduction=reduction, options=options)
        tensors, keywords = arguments_of(problem)
        for index in (2, 3):  # opcheck compares what is left in them
            if tensors[index] is not None:
                tensors[index].zero_()
        for first_step in (True, False):
            torch.library.opcheck(OP, tuple(tensors), {**keywords, "first_step": first_step})


def test_schema_says_what_is_written():
    schema = OP.default._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == ["weight", "bias", "weight_momentum_buffer", "bias_momentum_buffer"]
    assert [a.name for a in schema.arguments if a.kwarg_only] == [
        "lr",
        "momentum",
        "dampening",
        "weight_decay",
        "nesterov",
        "maximize",
        "reduction",
        "first_step",
    ]


@pytest.mark.parametrize("B", (3000, 100_000))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_equal_rows_are_not_rounded_one_way(dtype, B):
    """Of sums of short sums. One row added after the other is off by a share of B units in the last
    place, since all roundings go one way."""
    x = torch.full((B, 17), 0.1, dtype=dtype)
    target = torch.full((B, 1), 0.3, dtype=dtype)
    weight = torch.full((1, 17), 0.7, dtype=dtype)
    residual = (x[0].double() @ weight[0].double()).item() - target[0].double().item()
    gradient = 2 * residual * x[0, 0].double().item()
    before = weight.double().clone()
    OP(weight, None, None, None, x, target, lr=1.0)
    off = ((before - weight.double()) / gradient - 1).abs().max().item()
    assert off <= 16 * torch.finfo(dtype).eps


def test_version_counters_of_all_written_tensors_are_bumped():
    problem = Problem.random(37, 13, 3, options={"momentum": 0.9})
    tensors, keywords = arguments_of(problem)
    before = [t._version for t in tensors]
    loss = OP(*tensors, **keywords)
    assert [t._version > v for t, v in zip(tensors, before, strict=True)] == [True] * 4 + [
        False
    ] * 2
    assert loss._version == 0


@pytest.mark.parametrize("O", [3, 130])
def test_stale_backward_raises_after_the_op(O):
    problem = Problem.random(37, 13, O)
    tensors, keywords = arguments_of(problem)
    weight = tensors[0].requires_grad_()
    stale = (problem.input.clone().requires_grad_() @ weight.T).sum()
    with torch.no_grad():
        OP(*tensors, **keywords)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_leaf_that_requires_grad_is_refused_outside_of_no_grad():
    tensors, keywords = arguments_of(Problem.random(37, 13, 3))
    kept = tensors[0].clone()
    tensors[0].requires_grad_()
    with pytest.raises(RuntimeError, match="leaf"):
        OP(*tensors, **keywords)
    assert torch.equal(tensors[0], kept)


def test_backward_through_the_op_says_that_it_is_not_implemented():
    tensors, keywords = arguments_of(Problem.random(37, 13, 3))
    tensors[4] = tensors[4].clone().requires_grad_()
    loss = OP(*tensors, **keywords)
    assert loss.requires_grad
    with pytest.raises(RuntimeError, match="not implemented"):
        loss.backward()


def test_inference_mode_works():
    problem = Problem.random(37, 13, 3)
    expected = train(problem, 2)
    with torch.inference_mode():
        ours = train(problem, 2)
    assert torch.equal(ours.weight, expected.weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_tensors_give_a_loss_without_values(dtype):
    problem = Problem.random(37, 13, 3, dtype=dtype, options={"momentum": 0.9})
    tensors, keywords = arguments_of(problem)
    with FakeTensorMode() as mode:
        loss = OP(*(mode.from_tensor(t) for t in tensors), **keywords)
    assert isinstance(loss, torch._subclasses.FakeTensor)
    assert loss.shape == ()
    assert loss.dtype == dtype
    assert not loss.requires_grad
    assert torch.equal(tensors[0], problem.weight)


def test_meta_tensors_give_a_loss_on_meta():
    tensors, keywords = arguments_of(Problem.random(37, 13, 3))
    loss = OP(*(None if t is None else t.to("meta") for t in tensors), **keywords)
    assert loss.device.type == "meta"
    assert loss.shape == ()


def test_op_is_traced_into_one_node():
    """As torch.compile would: the op in the graph, with its writes made visible."""
    problem = Problem.random(37, 13, 3, options={"momentum": 0.9})
    tensors, keywords = arguments_of(problem)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(*tensors):
        return OP(*tensors, **keywords) * 2

    expected = train(problem, 1)
    loss = compiled(*tensors)
    assert torch.equal(loss, expected.losses[0] * 2)
    assert torch.equal(tensors[0], expected.weight)
    assert torch.equal(tensors[2], expected.weight_buffer)


# --- errors -------------------------------------------------------------------------------------

# What is wrong, where it is put (position or keyword), the error and what it says.
WRONG = [
    (
        "target",
        (3, 4),
        ValueError,
        r"target must have the shape of the output \[4, 3\], got \[3, 4\]",
    ),
    ("target", (4,), ValueError, r"target must have the shape of the output \[4, 3\], got \[4\]"),
    ("target", (4, 1), ValueError, r"target must have the shape of the output \[4, 3\], got"),
    ("input", (4, 6), ValueError, r"input must have .*got \[4, 6\]"),
    ("input", (), ValueError, r"input must have .*got \[\]"),
    ("weight", (3, 5, 1), ValueError, r"weight must have .*got \[3, 5, 1\]"),
    ("weight", (15,), ValueError, r"weight must have .*got \[15\]"),
    ("bias", (4,), ValueError, r"bias must have the shape \[3\], got \[4\]"),
    ("bias", (1, 3), ValueError, r"bias must have the shape \[3\], got \[1, 3\]"),
    ("weight_momentum_buffer", (5, 3), ValueError, r"weight_momentum_buffer must .*got \[5, 3\]"),
    ("bias_momentum_buffer", (5,), ValueError, r"bias_momentum_buffer must .*got \[5\]"),
    ("weight_momentum_buffer", None, ValueError, r".*weight_momentum_buffer \[3, 5\], got None"),
    ("bias_momentum_buffer", None, ValueError, r".*bias_momentum_buffer \[3\], got None"),
    ("target", torch.float64, TypeError, r"target must .*got Double"),
    ("input", torch.float64, TypeError, r"input must .*got Double"),
    ("bias", torch.float64, TypeError, r"bias must .*got Double"),
    (
        "weight_momentum_buffer",
        torch.float64,
        TypeError,
        r"weight_momentum_buffer must .*got Double",
    ),
    (
        "bias_momentum_buffer",
        torch.bfloat16,
        TypeError,
        r"bias_momentum_buffer must .*got BFloat16",
    ),
    ("weight", torch.int64, TypeError, r"weight must be .*got Long"),
    ("weight", torch.complex64, TypeError, r"weight must be .*got ComplexFloat"),
    ("weight", None, TypeError, "weight must be a torch.Tensor, got None"),
    ("input", None, TypeError, "input must be a torch.Tensor, got None"),
    ("target", None, TypeError, "target must be a torch.Tensor, got None"),
    ("reduction", "none", ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
    ("reduction", "", ValueError, "reduction must be 'mean' or 'sum', got ''"),
]
NAMES = ("weight", "bias", "weight_momentum_buffer", "bias_momentum_buffer", "input", "target")


def raises_and_leaves_all_alone(tensors: dict[str, Any], keywords, error, message) -> None:
    kept = {k: None if t is None else t.clone() for k, t in tensors.items()}
    versions = {k: None if t is None else t._version for k, t in tensors.items()}
    with pytest.raises(error, match=f"^fused_step::linear_mse_sgd_: {message}"):
        OP(*tensors.values(), **keywords)
    for name, tensor in tensors.items():
        if tensor is not None:
            assert same_bits(tensor, kept[name])
            assert tensor._version == versions[name]


def valid() -> tuple[dict[str, Any], dict[str, Any]]:
    tensors, keywords = arguments_of(Problem.random(4, 5, 3, options={"momentum": 0.9}))
    for index in (2, 3):
        tensors[index].zero_()
    return dict(zip(NAMES, tensors, strict=True)), keywords


@pytest.mark.parametrize(("name", "wrong", "error", "message"), WRONG, ids=lambda w: str(w)[:40])
def test_wrong_argument_names_op_argument_expectation_and_what_was_got(name, wrong, error, message):
    tensors, keywords = valid()
    if name == "reduction":
        keywords["reduction"] = wrong
    elif wrong is None:
        tensors[name] = None
    elif isinstance(wrong, torch.dtype):
        tensors[name] = tensors[name].to(wrong)
    else:
        tensors[name] = torch.zeros(wrong)
    raises_and_leaves_all_alone(tensors, keywords, error, message)


@pytest.mark.parametrize("name", NAMES[:4])
def test_written_tensor_that_is_not_contiguous_is_refused(name):
    tensors, keywords = valid()
    tensors[name] = torch.stack([tensors[name]] * 2, dim=-1)[..., 0]
    raises_and_leaves_all_alone(tensors, keywords, ValueError, f"{name} must be contiguous")


@pytest.mark.parametrize("name", NAMES)
def test_tensor_whose_storage_was_freed_is_refused(name):
    """Reading its elements would end the process."""
    tensors, keywords = valid()
    kept = {k: t.clone() for k, t in tensors.items()}
    tensors[name] = kept.pop(name)
    tensors[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"sgd_: {name} must have memory .*got a storage of 0"):
        OP(*tensors.values(), **keywords)
    assert all(torch.equal(tensors[k], t) for k, t in kept.items())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("weight", "input"),
        ("weight", "target"),
        ("bias", "target"),
        ("weight_momentum_buffer", "input"),
        ("weight", "weight_momentum_buffer"),
        ("bias", "bias_momentum_buffer"),
    ],
)
def test_memory_shared_with_what_is_written_is_refused(first, second):
    tensors, keywords = valid()
    size = max(tensors[first].numel(), tensors[second].numel()) + 1
    memory = torch.zeros(size)
    for offset, name in enumerate((first, second)):
        shape = tensors[name].shape
        tensors[name] = memory[offset : offset + tensors[name].numel()].view(shape)
    raises_and_leaves_all_alone(tensors, keywords, ValueError, ".*share memory")


def test_all_errors_of_shape_are_also_raised_under_empty_batches():
    tensors, keywords = valid()
    tensors["input"], tensors["target"] = torch.zeros(0, 5), torch.zeros(0, 4)
    raises_and_leaves_all_alone(tensors, keywords, ValueError, r"target must have the shape")


@pytest.mark.parametrize("which", ["weight", "bias", "weight_momentum_buffer"])
def test_inference_tensor_is_refused_outside_of_inference_mode_and_left_alone(which):
    tensors = {
        "weight": torch.ones(2, 3),
        "bias": torch.ones(2),
        "weight_momentum_buffer": torch.ones(2, 3),
        "bias_momentum_buffer": torch.ones(2),
    }
    with torch.inference_mode():
        tensors[which] = tensors[which].clone()
    x, t = torch.randn(5, 3), torch.randn(5, 2)
    with pytest.raises(RuntimeError, match=f"{which} must not be an inference tensor"):
        OP(**tensors, input=x, target=t, lr=0.1, momentum=0.9)
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in tensors.values())
