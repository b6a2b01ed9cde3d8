# SPDX-License-Identifier: MIT
"""State of fused_step.SGD: what is saved, loaded, copied; and the constructor."""

from __future__ import annotations

import copy
import fractions
import inspect
import io
import pickle

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from oracle import describe
from sgd_oracle import DTYPES, OPTION_SETS, copy_of, momentum_of, random_params, torch_sgd
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import Parameter

import fused_step

MOMENTUM = {"lr": 0.1, "momentum": 0.9}
SHAPES = (5, 33, (2, 3))


def train(params, optimizer, seeds) -> None:
    for seed in seeds:
        grads = random_params(*SHAPES, dtype=params[0].dtype, seed=seed)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.reshape(p.shape)
        optimizer.step()


def saved(optimizer) -> dict:
    """The state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("options", OPTION_SETS, ids=describe)
@pytest.mark.parametrize("first", (fused_step.SGD, torch_sgd), ids=("from ours", "from torch"))
@pytest.mark.parametrize("second", (fused_step.SGD, torch_sgd), ids=("to ours", "to torch"))
def test_training_goes_on_bit_for_bit_under_the_other(first, second, options, dtype):
    start = random_params(*SHAPES, dtype=dtype)
    whole = [copy_of(p) for p in start]
    train(whole, torch_sgd(whole, **options), range(6))

    before = [copy_of(p) for p in start]
    optimizer = first(before, **options)
    train(before, optimizer, range(3))
    after = [copy_of(p) for p in before]
    resumed = second(after, lr=123.0)
    resumed.load_state_dict(saved(optimizer))
    train(after, resumed, range(3, 6))
    for p, q in zip(after, whole, strict=True):
        assert torch.equal(p, q)


def test_a_loaded_state_does_not_turn_the_fused_path_off():
    for options in ({"fused": True}, {"fused": False}, {"foreach": True}, {"foreach": False}):
        theirs = [copy_of(p) for p in random_params(*SHAPES)]
        torch_optimizer = torch.optim.SGD(theirs, **MOMENTUM, **options)
        train(theirs, torch_optimizer, range(2))
        ours = [copy_of(p) for p in theirs]
        optimizer = fused_step.SGD(ours, **MOMENTUM)
        optimizer.load_state_dict(torch_optimizer.state_dict())
        for p in ours:
            p.grad = torch.ones_like(p)
        assert optimizer._engine.step(optimizer, 0) is True


def test_state_dict_is_torchs():
    ours, theirs = ([copy_of(p) for p in random_params(*SHAPES)] for _ in range(2))
    a, b = fused_step.SGD(ours, **MOMENTUM), torch.optim.SGD(theirs, **MOMENTUM)
    train(ours, a, range(2))
    train(theirs, b, range(2))
    mine, torchs = a.state_dict(), b.state_dict()
    assert mine["param_groups"] == torchs["param_groups"]
    assert mine["state"].keys() == torchs["state"].keys()
    for key, entry in mine["state"].items():
        assert torch.equal(entry["momentum_buffer"], torchs["state"][key]["momentum_buffer"])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_float32_buffers_survive_saving_and_loading(dtype):
    start = random_params(*SHAPES, dtype=dtype)
    whole = [copy_of(p) for p in start]
    train(whole, fused_step.SGD(whole, **MOMENTUM, momentum_dtype=torch.float32), range(6))

    before = [copy_of(p) for p in start]
    optimizer = fused_step.SGD(before, **MOMENTUM, momentum_dtype=torch.float32)
    train(before, optimizer, range(3))
    for constructor in ({"momentum_dtype": torch.float32}, {}):
        after = [copy_of(p) for p in before]
        resumed = fused_step.SGD(after, lr=1.0, **constructor)
        resumed.load_state_dict(saved(optimizer))
        assert resumed.param_groups[0]["momentum_dtype"] is torch.float32
        for p, q in zip(after, before, strict=True):
            buf = momentum_of(resumed, p)
            assert buf.dtype == torch.float32
            assert torch.equal(buf, momentum_of(optimizer, q))
        train(after, resumed, range(3, 6))
        for p, q in zip(after, whole, strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_a_float32_buffer_takes_up_torchs_state_and_gives_it_back(dtype):
    theirs = [copy_of(p) for p in random_params(*SHAPES, dtype=dtype)]
    torch_optimizer = torch_sgd(theirs, **MOMENTUM)
    train(theirs, torch_optimizer, range(2))
    ours = [copy_of(p) for p in theirs]
    optimizer = fused_step.SGD(ours, **MOMENTUM, momentum_dtype=torch.float32)
    optimizer.load_state_dict(torch_optimizer.state_dict())
    for p, q in zip(ours, theirs, strict=True):
        assert momentum_of(optimizer, p).dtype == torch.float32
        assert torch.equal(momentum_of(optimizer, p).to(dtype), momentum_of(torch_optimizer, q))
    torch_optimizer.load_state_dict(optimizer.state_dict())
    assert momentum_of(torch_optimizer, theirs[0]).dtype == dtype


def test_a_load_in_the_users_hands_goes_through_all_hooks():
    ours = [copy_of(p) for p in random_params(*SHAPES, dtype=torch.bfloat16)]
    optimizer = fused_step.SGD(ours, **MOMENTUM, momentum_dtype=torch.float32)
    train(ours, optimizer, range(2))
    state = optimizer.state_dict()
    seen = []

    def before(opt, state_dict):
        # A hook finds tensors, and what it changes counts.
        bufs = [entry["momentum_buffer"] for entry in state_dict["state"].values()]
        assert all(buf.dtype == torch.float32 for buf in bufs)
        seen.append("pre")
        return {
            **state_dict,
            "state": {
                k: {"momentum_buffer": torch.zeros_like(e["momentum_buffer"])}
                for k, e in state_dict["state"].items()
            },
        }

    def after(opt):
        assert momentum_of(opt, ours[0]).dtype == torch.float32
        seen.append("post")

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda opt, state_dict: seen.append("saved"))
    optimizer.load_state_dict(state)
    optimizer.state_dict()
    assert seen == ["pre", "post", "save", "saved"]
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1
    assert not momentum_of(optimizer, ours[0]).any()


def test_a_state_that_does_not_fit_is_torchs_error():
    optimizer = fused_step.SGD([torch.ones(3)], **MOMENTUM, momentum_dtype=torch.float32)
    longer = torch.optim.SGD([torch.ones(3), torch.ones(3)], **MOMENTUM)
    with pytest.raises(ValueError, match="match the size"):
        optimizer.load_state_dict(longer.state_dict())
    two = torch.optim.SGD([{"params": [torch.ones(3)]}, {"params": [torch.ones(3)]}])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(two.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    "copied",
    (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), copy.copy),
    ids=("deepcopy", "pickle", "copy"),
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_train_on(copied, dtype):
    params = [copy_of(p) for p in random_params(*SHAPES, dtype=dtype)]
    options = {**MOMENTUM, "momentum_dtype": torch.float32, "max_grad_norm": 0.5}
    optimizer = fused_step.SGD(params, **options)
    train(params, optimizer, range(2))
    other = copied(optimizer)
    assert other.max_grad_norm == 0.5
    mine = other.param_groups[0]["params"]
    train(mine, other, (7,))
    if copied is not copy.copy:
        assert not torch.equal(mine[0], params[0])
        train(params, optimizer, (7,))
    for p, q in zip(mine, params, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(momentum_of(other, p), momentum_of(optimizer, q))


def test_repr_is_torchs():
    ours, theirs = (
        fused_step.SGD([torch.ones(3)], **MOMENTUM),
        torch.optim.SGD([torch.ones(3)], **MOMENTUM),
    )
    assert repr(ours) == repr(theirs)


def test_signature_is_torchs_with_two_more():
    ours = inspect.signature(fused_step.SGD.__init__).parameters
    theirs = inspect.signature(torch.optim.SGD.__init__).parameters
    assert list(ours) == [*theirs, "momentum_dtype", "max_grad_norm"]
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default
        assert ours[name].kind == parameter.kind


def test_is_an_instance_of_torchs():
    optimizer = fused_step.SGD([torch.ones(3)])
    assert isinstance(optimizer, torch.optim.SGD)
    assert isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize(
    "options",
    (
        {"lr": -1.0},
        {"lr": torch.ones(2)},
        {"momentum": -0.5},
        {"weight_decay": -1.0},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        {"fused": True, "foreach": True},
        {"fused": True, "differentiable": True},
    ),
    ids=str,
)
def test_bad_options_are_torchs_errors(options):
    errors = []
    for make in (fused_step.SGD, torch.optim.SGD):
        with pytest.raises((ValueError, RuntimeError)) as error:
            make([torch.ones(3)], **options)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    "params", ([], torch.ones(3), [1.0], [{"params": {torch.ones(1)}}]), ids=str
)
def test_bad_parameters_are_torchs_errors(params):
    errors = []
    for make in (fused_step.SGD, torch.optim.SGD):
        with pytest.raises((ValueError, TypeError)) as error:
            make(params)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"momentum_dtype": torch.float64}, TypeError, "momentum_dtype must be None or"),
        ({"momentum_dtype": "float32"}, TypeError, "momentum_dtype must be None or"),
        ({"max_grad_norm": "1"}, TypeError, "max_grad_norm must be a number or None, got str"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm must be at least 0, got -1.0"),
        ({"max_grad_norm": float("nan")}, ValueError, "max_grad_norm must be at least 0, got nan"),
        ({"max_grad_norm": 1.0, "differentiable": True}, RuntimeError, "differentiable must be"),
        (
            {"momentum_dtype": torch.float32, "differentiable": True},
            RuntimeError,
            "differentiable must be",
        ),
    ),
    ids=str,
)
def test_bad_options_of_our_own(options, error, message):
    with pytest.raises(error, match=message):
        fused_step.SGD([torch.ones(3)], **options)


@pytest.mark.parametrize("option", ("lr", "weight_decay", "dampening"))
def test_option_beyond_the_range_of_the_dtype_is_torchs_error(option):
    errors = []
    for make in (fused_step.SGD, torch_sgd):
        param = Parameter(torch.ones(3))
        optimizer = make([param], **MOMENTUM)
        for _ in range(2):  # the second has a history to dampen
            param.grad = torch.ones(3)
            optimizer.step()
        before = param.detach().clone()
        optimizer.param_groups[0][option] = 1e39
        with pytest.raises(RuntimeError) as error:
            optimizer.step()
        errors.append(str(error.value))
        assert torch.equal(param, before)
    assert errors[0] == errors[1]


def test_max_grad_norm_may_be_any_real_number():
    for number in (1, np.float32(1), np.int64(1), fractions.Fraction(1)):
        assert fused_step.SGD([torch.ones(3)], max_grad_norm=number).max_grad_norm == 1.0


@pytest.mark.filterwarnings("ignore")  # torch's, of a save by one process
def test_checkpoint_of_torchs_loads_by_torch_distributed(tmp_path):
    ours, theirs = (torch.nn.Linear(4, 3) for _ in range(2))
    torchs = torch.optim.SGD(theirs.parameters(), **MOMENTUM)
    for p in theirs.parameters():
        p.grad = torch.ones_like(p)
    torchs.step()
    model, optimizer = get_state_dict(theirs, torchs)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path)
    resumed = fused_step.SGD(ours.parameters(), **MOMENTUM)
    model, optimizer = get_state_dict(ours, resumed)
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path)
    set_state_dict(ours, resumed, model_state_dict=model, optim_state_dict=optimizer)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(momentum_of(resumed, p), momentum_of(torchs, q))


def test_state_that_refuses_an_entry_leaves_the_parameters_as_they_were():
    param = Parameter(torch.ones(3))
    optimizer = fused_step.SGD([param], **MOMENTUM)
    optimizer.state = {}
    param.grad = torch.ones(3)
    with pytest.raises(KeyError):
        optimizer.step()
    assert torch.equal(param, torch.ones(3))


def test_a_groups_own_momentum_dtype():
    params = [Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "momentum_dtype": torch.float32}]
    optimizer = fused_step.SGD(groups, **MOMENTUM)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [momentum_of(optimizer, p).dtype for p in params] == [torch.bfloat16, torch.float32]
    with pytest.raises(TypeError, match="momentum_dtype"):
        optimizer.add_param_group({"params": torch.ones(3), "momentum_dtype": torch.float16})
    assert len(optimizer.param_groups) == 2


def test_named_parameters():
    layer = torch.nn.Linear(2, 1)
    optimizer = fused_step.SGD(layer.named_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
