# SPDX-License-Identifier: MIT
"""linear_mse_loss among autograd, torch.func and torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from loss_oracle import HEAD, NAMES, NEEDS, REDUCTIONS, LossProblem, fused_loss, torch_loss
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

SHAPES = [(7, 5, 1), (7, 5, 3), (7, 5, 35)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
OPS = torch.ops.fused_step
# What PyTorch itself says when forward mode or its default compiler is used for the first time.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def leaves(problem: LossProblem) -> list[Tensor | None]:
    """Copies that require grad where the problem wants gradients."""
    tensors = {name: getattr(problem, name) for name in NAMES}
    return [
        None if t is None else t.clone().requires_grad_(name in problem.needs)
        for name, t in tensors.items()
    ]


# --- derivatives --------------------------------------------------------------------------------


@each_reduction
@pytest.mark.parametrize("shape", [(3, 2, 1), (3, 2, 2), (2, 2, 34)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_and_gradgradcheck(shape, reduction, bias):
    for needs in NEEDS[1:]:
        if not bias and "bias" in needs:
            continue
        problem = LossProblem.random(
            *shape, dtype=torch.float64, bias=bias, reduction=reduction, needs=needs
        )

        def function(*tensors, reduction=reduction):
            return fused_loss(*tensors, reduction)

        many = shape[2] > 2
        assert torch.autograd.gradcheck(function, leaves(problem), fast_mode=many)
        assert torch.autograd.gradgradcheck(function, leaves(problem), fast_mode=many)


@each_reduction
def test_third_derivative_equals_torch(reduction):
    problem = LossProblem.random(7, 5, 3, dtype=torch.float64, reduction=reduction)

    def third(function):
        x, weight, bias, target = leaves(problem)
        value = function(x, weight, bias, target, reduction).pow(2).sum()
        for _ in range(3):
            value = torch.autograd.grad(value, weight, create_graph=True)[0].pow(2).sum()
        return value

    torch.testing.assert_close(third(fused_loss), third(torch_loss), rtol=1e-12, atol=0)


@each_reduction
@each_shape
def test_second_backward_with_retain_graph_adds_the_same_again(shape, reduction):
    problem = LossProblem.random(*shape, reduction=reduction)
    tensors = leaves(problem)
    loss = fused_loss(*tensors, reduction)
    loss.backward(problem.grad_output, retain_graph=True)
    first = [t.grad.clone() for t in tensors[:3]]
    loss.backward(problem.grad_output)
    for t, gradient in zip(tensors[:3], first, strict=True):
        assert torch.equal(t.grad, 2 * gradient)


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@each_shape
def test_last_backward_needs_no_memory_for_the_gradients(shape):
    """What was made in the forward pass is multiplied in place, once nobody else may want it."""
    problem = LossProblem.random(*shape)
    for retain_graph, expected in ((True, "aten.mul.Tensor"), (False, "aten.mul_.Tensor")):
        loss = fused_loss(*leaves(problem), "mean")
        with Operators() as operators:
            loss.backward(problem.grad_output, retain_graph=retain_graph)
        assert operators.names.count(expected) >= 3, operators.names  # input, weight, bias


def test_what_a_saved_tensor_hook_has_kept_is_left_alone():
    problem = LossProblem.random(7, 5, 3)
    kept, copies = [], []

    def pack(t):
        kept.append(t)
        copies.append(t.clone())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = fused_loss(*leaves(problem), "mean")
    loss.backward(problem.grad_output)
    assert kept
    for t, copy in zip(kept, copies, strict=True):
        assert torch.equal(t, copy)


def test_a_hook_of_the_node_may_go_through_it_again():
    """Before the pass that it belongs to has freed anything."""
    problem = LossProblem.random(7, 5, 3)
    gradients = []
    for function in (fused_loss, torch_loss):
        input, weight, bias, target = leaves(problem)
        loss = function(input, weight, bias, target, "mean")
        nested: list[Tensor] = []

        def again(*_, loss=loss, weight=weight, nested=nested):
            if not nested:
                nested.append(torch.zeros(()))  # the pass below comes by here, too
                of_weight = torch.autograd.grad(
                    loss, weight, problem.grad_output, retain_graph=True
                )
                nested[:] = of_weight

        loss.grad_fn.register_hook(again)
        loss.backward(problem.grad_output)
        assert torch.equal(nested[0], weight.grad)
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


class Keeper(TorchDispatchMode):
    """Keeps all that operators return, and copies of it."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple) else (result,):
            self.kept.append((t, t.detach().clone()))
        return result


def test_what_a_dispatch_mode_has_kept_is_left_alone():
    problem = LossProblem.random(7, 5, 3)
    tensors = leaves(problem)
    with Keeper() as keeper:
        loss = fused_loss(*tensors, "mean")
    loss.backward(problem.grad_output)
    assert len(keeper.kept) > 3
    for t, copy in keeper.kept:
        assert torch.equal(t, copy)


@each_reduction
def test_second_backward_without_retain_graph_raises(reduction):
    problem = LossProblem.random(7, 5, 3, reduction=reduction)
    loss = fused_loss(*leaves(problem), reduction)
    loss.backward(problem.grad_output)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward(problem.grad_output)


@each_shape
def test_gradients_are_made_in_the_forward_pass(shape):
    """What is changed in place afterwards does not matter, as long as it is differentiated once."""
    problem = LossProblem.random(*shape)
    expected = problem.evaluate(fused_loss)
    tensors = leaves(problem)
    loss = fused_loss(*tensors, "mean")
    with torch.no_grad():
        for t in tensors:
            t.add_(1)
    loss.backward(problem.grad_output)
    for name, t in zip(NAMES[:3], tensors, strict=False):
        assert torch.equal(t.grad, expected[name]), name


@pytest.mark.parametrize("changed", range(4), ids=NAMES)
def test_second_derivative_of_what_was_changed_in_place_raises(changed):
    tensors = leaves(LossProblem.random(7, 5, 3))
    loss = fused_loss(*tensors, "mean")
    with torch.no_grad():
        tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, tensors[1], create_graph=True)


def test_plain_backward_unpacks_only_the_gradients():
    unpacked = []

    def unpack(t: Tensor) -> Tensor:
        unpacked.append(tuple(t.shape))
        return t

    problem = LossProblem.random(7, 5, 3)
    tensors = leaves(problem)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        loss = fused_loss(*tensors, "mean")
        loss.backward()
    assert sorted(unpacked) == [(3,), (3, 5), (7, 5)]


def test_gradient_of_one_tensor_only():
    """Others that require grad may not be wanted."""
    problem = LossProblem.random(7, 5, 3, needs=frozenset(NAMES))
    expected = problem.evaluate(fused_loss)
    for position, name in enumerate(NAMES):
        tensors = leaves(problem)
        loss = fused_loss(*tensors, "mean")
        (found,) = torch.autograd.grad(loss, tensors[position], problem.grad_output)
        assert torch.equal(found, expected[name])


def test_gradients_flow_into_a_body():
    problem = LossProblem.random(20, 13, 3)
    found = []
    for function in (fused_loss, torch_loss):
        body = torch.randn(13, 13, generator=torch.Generator().manual_seed(0)).requires_grad_()
        hidden = torch.tanh(problem.input @ body)
        (function(hidden, problem.weight, problem.bias, problem.target, "mean") * 3).backward()
        found.append(body.grad)
    torch.testing.assert_close(*found)


def test_functional_operator_says_that_it_has_no_derivative():
    tensors = leaves(LossProblem.random(7, 5, 3))
    loss = OPS.linear_mse(*tensors, "mean", True, True, True, False)[0]
    with pytest.raises(RuntimeError, match="not implemented"):
        loss.backward()


def test_forward_mode_derivative_equals_torch():
    problem = LossProblem.random(7, 5, 3, dtype=torch.float64)
    tensors = [problem.input, problem.weight, problem.bias, problem.target]
    found = []
    for function in (fused_loss, torch_loss):
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(t, torch.ones_like(t)) for t in tensors]
            found.append(forward_ad.unpack_dual(function(*dual, "mean")).tangent)
    assert torch.equal(*found)


def test_operator_refuses_forward_mode():
    problem = LossProblem.random(7, 5, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(problem.weight, torch.ones_like(problem.weight))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            OPS.linear_mse_loss(problem.input, dual, problem.bias, problem.target)


# --- torch.func ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.grad(f, argnums=(0, 1)),
        lambda f: torch.func.jacrev(f, argnums=1),
        lambda f: torch.func.jacfwd(f, argnums=1),
        lambda f: torch.func.hessian(f, argnums=1),
        lambda f: torch.func.vmap(f, in_dims=(0, None, None, 0)),
        lambda f: torch.func.vmap(torch.func.grad(f, argnums=1), in_dims=(0, None, None, 0)),
    ],
    ids=["grad", "jacrev", "jacfwd", "hessian", "vmap", "gradients of each row"],
)
def test_transforms_equal_torch(transform):
    problem = LossProblem.random(7, 5, 3, dtype=torch.float64)
    tensors = (problem.input, problem.weight, problem.bias, problem.target)
    ours = transform(lambda *t: fused_loss(*t, "mean"))(*tensors)
    theirs = transform(lambda *t: torch_loss(*t, "mean"))(*tensors)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# --- torch.library and torch.compile ------------------------------------------------------------


# opcheck of torch 2.14 itself looks at .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@each_reduction
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, torch.float32) for shape in SHAPES]
    + [(SHAPES[1], torch.bfloat16), (SHAPES[1], torch.float16)],
    ids=str,
)
def test_opcheck(shape, dtype, reduction):
    for needs, bias in ((frozenset(), False), (HEAD, False), (frozenset(NAMES), True)):
        problem = LossProblem.random(
            *shape, dtype=dtype, reduction=reduction, needs=needs, bias=bias
        )
        torch.library.opcheck(OPS.linear_mse_loss.default, (*leaves(problem), reduction))
        flags = [name in needs for name in NAMES]
        plain = [None if t is None else t.detach() for t in leaves(problem)]
        torch.library.opcheck(OPS.linear_mse.default, (*plain, reduction, *flags))


def compiled(dynamic: bool | None):
    """fused_loss as one graph without breaks, and the counter of its compilations."""
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(fused_loss, backend=counter, fullgraph=True, dynamic=dynamic)
    return function, counter


@each_reduction
@each_shape
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_loss_and_gradients_have_the_eager_bits(shape, reduction, dynamic):
    torch._dynamo.reset()
    for needs in (frozenset(), HEAD, frozenset(NAMES)):
        function, _ = compiled(dynamic)
        problem = LossProblem.random(*shape, reduction=reduction, needs=needs)
        ours, eager = problem.evaluate(function), problem.evaluate(fused_loss)
        for name, value in eager.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-7)


def test_compiled_graph_holds_the_operator():
    torch._dynamo.reset()
    function, counter = compiled(None)
    LossProblem.random(7, 5, 3).evaluate(function)
    targets = [node.target for graph in counter.graphs for node in graph.graph.nodes]
    assert OPS.linear_mse_loss.default in targets


@each_reduction
def test_dynamic_batch_is_compiled_once(reduction):
    torch._dynamo.reset()
    function, counter = compiled(True)
    for B in (4, 5, 300, 17):
        problem = LossProblem.random(B, 6, 3, reduction=reduction)
        ours, eager = problem.evaluate(function), problem.evaluate(fused_loss)
        for name, value in eager.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-7)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", NAMES)
def test_inference_tensor_is_refused_where_the_layer_or_the_loss_refuses_it(name):
    def outcome(function) -> str | Tensor:
        tensors = dict(zip(NAMES, leaves(LossProblem.random(5, 4, 3, needs=HEAD)), strict=True))
        with torch.inference_mode():
            tensors[name] = tensors[name].detach().clone()
        try:
            function(*tensors.values(), "mean").backward()
        except RuntimeError as error:
            return str(error)
        return tensors["weight" if name != "weight" else "bias"].grad

    ours, plain = outcome(fused_loss), outcome(torch_loss)
    assert type(ours) is type(plain), (ours, plain)
    if isinstance(ours, Tensor):
        torch.testing.assert_close(ours, plain)
    else:
        assert ours == plain


@each_reduction
def test_compiled_autograd_gives_the_eager_gradients(reduction):
    def by_graph(graph):
        return torch.compile(graph, backend="eager", fullgraph=True)

    for B in (4, 5, 300, 0):
        for needs in (HEAD, frozenset(NAMES)):
            problem = LossProblem.random(B, 6, 3, reduction=reduction, needs=needs)
            eager = problem.evaluate(fused_loss)
            tensors = leaves(problem)
            loss = fused_loss(*tensors, reduction)
            with compiled_autograd._enable(by_graph):
                loss.backward(problem.grad_output)
            for name, t in zip(NAMES, tensors, strict=True):
                if name in needs:
                    torch.testing.assert_close(t.grad, eager[name], rtol=1e-6, atol=1e-7)


def test_compiled_autograd_gives_the_gradient_of_one_tensor_only():
    problem = LossProblem.random(7, 5, 3, needs=frozenset(NAMES))
    expected = problem.evaluate(fused_loss)
    for position, name in enumerate(NAMES):
        tensors = leaves(problem)
        loss = fused_loss(*tensors, "mean")
        with compiled_autograd._enable(lambda graph: graph):
            (found,) = torch.autograd.grad(loss, tensors[position], problem.grad_output)
        assert torch.equal(found, expected[name])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_checkpointed_loss_has_the_gradients_of_any_other(reduction, create_graph):
    """torch.utils.checkpoint lets a saved tensor be unpacked once in a backward pass."""
    problem = LossProblem.random(7, 5, 3, needs=frozenset(NAMES))

    def gradients(loss_of):
        tensors = leaves(problem)
        loss = loss_of(*tensors, reduction).sum()
        return torch.autograd.grad(loss, tensors, create_graph=create_graph)

    def checkpointed(*args):
        return checkpoint(fused_loss, *args, use_reentrant=False)

    for ours, expected in zip(gradients(checkpointed), gradients(fused_loss), strict=True):
        assert torch.equal(ours, expected)


def test_loss_of_a_compiled_model_equals_eager_by_the_default_backend():
    torch._dynamo.reset()
    problem = LossProblem.random(9, 6, 3)

    def model(x, weight, bias, target, reduction):
        return fused_loss(torch.relu(x) * 2, weight, bias, target, reduction) * 3

    ours = problem.evaluate(torch.compile(model, fullgraph=True))
    for name, value in problem.evaluate(model).items():
        torch.testing.assert_close(ours[name], value)
