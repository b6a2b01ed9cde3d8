# SPDX-License-Identifier: MIT
"""What linear_mse_loss refuses, and what it leaves to PyTorch's own operators."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
import torch.nn.functional as F
from loss_oracle import LossProblem, fused_loss, torch_loss
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fused_step
from fused_step._extension import _C

OP = torch.ops.fused_step.linear_mse_loss

# What is wrong, where it is put, the error and what it says.
WRONG = [
    ("target", (3, 4), ValueError, r"target must have the shape of the output [4, 3], got [3, 4]"),
    ("target", (4,), ValueError, "target must have the shape of the output [4, 3], got [4]"),
    ("target", (3,), ValueError, "target must have the shape of the output [4, 3], got [3]"),
    ("target", (4, 1), ValueError, "target must have the shape of the output [4, 3], got [4, 1]"),
    ("target", (), ValueError, "target must have the shape of the output [4, 3], got []"),
    (
        "input",
        (4, 6),
        ValueError,
        "input must have the shape [*, 5] for linear_weight [3, 5], got [4, 6]",
    ),
    ("input", (), ValueError, "input must have the shape [*, 5] for linear_weight [3, 5], got []"),
    ("weight", (15,), ValueError, "linear_weight must have the shape [O, I], got [15]"),
    ("weight", (3, 5, 1), ValueError, "linear_weight must have the shape [O, I], got [3, 5, 1]"),
    ("bias", (4,), ValueError, "linear_bias must have the shape [3], got [4]"),
    ("bias", (1, 3), ValueError, "linear_bias must have the shape [3], got [1, 3]"),
    (
        "reduction",
        "average",
        ValueError,
        "reduction must be 'mean', 'sum' or 'none', got 'average'",
    ),
]


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    problem = LossProblem.random(4, 5, 3, dtype=dtype)
    return {
        "input": problem.input,
        "weight": problem.weight,
        "bias": problem.bias,
        "target": problem.target,
        "reduction": "mean",
    }


def raises(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^fused_step::linear_mse: " + re.escape(message)):
        fused_loss(**given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "wrong", "error", "message"), WRONG, ids=lambda w: str(w)[:40])
def test_wrong_argument_names_op_argument_expectation_and_what_was_got(
    name, wrong, error, message, dtype
):
    given = arguments(dtype)
    given[name] = torch.zeros(wrong, dtype=dtype) if isinstance(wrong, tuple) else wrong
    raises(given, error, message)


@pytest.mark.parametrize(("name", "wrong", "error", "message"), WRONG, ids=lambda w: str(w)[:40])
def test_operator_raises_the_same_on_meta(name, wrong, error, message):
    given = arguments()
    given[name] = torch.zeros(wrong) if isinstance(wrong, tuple) else wrong
    given = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in given.items()}
    with pytest.raises(error, match="^fused_step::linear_mse: " + re.escape(message)):
        OP(*given.values())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("input", torch.float64),
        ("target", torch.float64),
        ("bias", torch.float64),
        ("target", torch.bfloat16),
        ("target", torch.int64),
    ],
    ids=str,
)
def test_mixed_dtypes_raise(name, dtype):
    given = arguments()
    given[name] = given[name].to(dtype)
    shown = f"{'linear_' if name == 'bias' else ''}{name} must have the dtype of linear_weight"
    raises(given, TypeError, shown)
    with pytest.raises(TypeError, match=shown):
        OP(*given.values())


@pytest.mark.parametrize("name", ["input", "bias", "target"])
def test_another_device_raises(name):
    given = arguments()
    given[name] = given[name].to("meta")
    shown = f"{'linear_' if name == 'bias' else ''}{name}"
    where = given["weight"].device
    raises(given, ValueError, f"{shown} must be on the device of linear_weight {where}, got meta")


def test_what_is_no_tensor_raises():
    given = arguments()
    given["target"] = [1.0, 2.0]
    raises(given, TypeError, "target must be a torch.Tensor, got list")


@pytest.mark.parametrize("name", ["input", "linear_weight", "linear_bias", "target"])
def test_tensor_whose_storage_was_freed_raises(name):
    """Reading its elements would end the process."""
    tensors = {
        "input": torch.randn(64, 9),
        "linear_weight": torch.randn(3, 9),
        "linear_bias": torch.randn(3),
        "target": torch.randn(64, 3),
    }
    tensors[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"^fused_step::linear_mse: {name} must have memory"):
        fused_step.linear_mse_loss(**tensors)


@pytest.mark.parametrize(
    ("position", "name"), list(enumerate(("input", "linear_weight", "target")))
)
def test_operator_names_a_tensor_that_is_none(position, name):
    tensors = [torch.ones(4, 5), torch.ones(3, 5), torch.ones(4, 3)]
    tensors[position] = None
    with pytest.raises(TypeError, match=f"^fused_step::linear_mse: {name} must be a torch.Tensor"):
        torch.ops.fused_step.linear_mse_loss(tensors[0], tensors[1], None, tensors[2], "mean")


def test_operator_names_the_dtypes_that_it_takes():
    given = {k: v.cfloat() if isinstance(v, Tensor) else v for k, v in arguments().items()}
    message = "linear_weight must be float32, float64, bfloat16 or float16, got ComplexFloat"
    with pytest.raises(TypeError, match=message):
        OP(*given.values())


def test_wrong_shape_raises_under_compile():
    torch._dynamo.reset()
    given = arguments()
    given["target"] = torch.zeros(4, 1)
    with pytest.raises(Exception, match="target must have the shape of the output"):
        torch.compile(fused_loss, backend="aot_eager", fullgraph=True)(**given)


@pytest.fixture
def mesh():
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.cpu_only("a mesh of CPUs")
def test_sharded_weight_raises_and_replicated_does_not(mesh):
    given = arguments()
    expected = torch_loss(**given)
    for name in ("input", "weight", "bias", "target"):
        given[name] = distribute_tensor(given[name], mesh, [Replicate()])
    torch.testing.assert_close(fused_loss(**given).full_tensor(), expected)
    given["weight"] = distribute_tensor(given["weight"].full_tensor(), mesh, [Shard(0)])
    raises(given, ValueError, "linear_weight must not be sharded, got placements (Shard(dim=0),)")


# --- left to PyTorch ----------------------------------------------------------------------------


def assert_composed(problem: LossProblem) -> None:
    """Bit for bit PyTorch's, which the operator's result is not in general."""
    ours, theirs = problem.evaluate(fused_loss), problem.evaluate(torch_loss)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value), name


def test_other_dtypes_are_composed():
    for reduction in ("mean", "sum", "none"):
        given = arguments(torch.float64) | {"reduction": reduction}
        given = {k: v.to(torch.complex64) if isinstance(v, Tensor) else v for k, v in given.items()}
        errors = []
        for function in (fused_loss, torch_loss):
            with pytest.raises(RuntimeError) as raised:
                function(**given)
            errors.append(str(raised.value))
        assert errors[0] == errors[1]


def test_tensor_subclass_is_composed():
    class Logging(Tensor):
        seen: list[str] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs or {})

    given = arguments()
    given["weight"] = given["weight"].as_subclass(Logging)
    loss = fused_loss(**given)
    assert {"linear", "mse_loss"} <= set(Logging.seen)
    assert torch.equal(loss.as_subclass(Tensor), torch_loss(**arguments()))


def test_meta_tensors_give_a_loss_on_meta():
    given = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments().items()}
    assert fused_loss(**given).device.type == "meta"
    assert OP(*given.values()).shape == ()


def test_inference_tensor_raises_what_torch_raises():
    with torch.inference_mode():
        x = torch.randn(4, 5)
    weight, target = torch.randn(3, 5, requires_grad=True), torch.randn(4, 3)
    for function in (fused_step.linear_mse_loss, lambda x, w, t: F.mse_loss(F.linear(x, w), t)):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            function(x, weight, target)


# --- the built-in function of eager calls -------------------------------------------------------


def built_in(given: dict[str, Any]) -> Tensor | None:
    return _C.linear_mse_loss(*given.values())


def test_ordinary_call_is_served_by_the_built_in_function():
    given = arguments()
    given["weight"] = torch.nn.Parameter(given["weight"])
    given["input"] = torch.randn(5, 4).T[:, :]
    with torch.no_grad():
        expected = OP(*given.values())
    assert torch.equal(built_in(given), expected)
    assert built_in(given).grad_fn.name() == "LinearMseBackward"


@pytest.mark.parametrize(
    "world",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        torch.inference_mode,
        lambda: torch.device("meta"),
        TorchDispatchMode,
        BaseTorchFunctionMode,
    ],
    ids=["autocast", "inference", "device", "dispatch mode", "function mode"],
)
def test_built_in_function_leaves_alone_what_modes_change(world):
    given = arguments()
    with world():
        assert built_in(given) is None


# What PyTorch itself says when forward mode is used for the first time.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_built_in_function_leaves_alone_what_is_no_ordinary_tensor():
    class Subclass(Tensor):
        pass

    given = arguments()
    strange = {
        "subclass": torch.randn(3, 5).as_subclass(Subclass),
        "meta": torch.randn(3, 5, device="meta"),
        "sparse": torch.randn(3, 5).to_sparse(),
        "conjugate": torch.randn(3, 5, dtype=torch.complex64).conj(),
        "integer": torch.ones(3, 5, dtype=torch.int64),
        "array": torch.randn(3, 5).cpu().numpy(),
    }
    for name, weight in strange.items():
        assert built_in(given | {"weight": weight}) is None, name
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(given["weight"], torch.ones(3, 5))
        assert built_in(given | {"weight": dual}) is None

    def under_grad(weight: Tensor) -> Tensor:
        assert built_in(given | {"weight": weight}) is None
        return weight.sum()

    torch.func.grad(under_grad)(given["weight"])
