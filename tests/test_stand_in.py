# SPDX-License-Identifier: MIT
"""Without the compiled module everything works, by PyTorch's own operators.

In a process of its own, over a copy of the package without the module: an operator's name can be
registered once in a process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_step

PACKAGE = Path(fused_step.__file__).parent
OPS = ("linear_mse", "linear_mse_loss", "linear_mse_sgd_")

SCRIPT = r"""
import copy, itertools, json, warnings
import torch
import torch.nn.functional as F
from torch import nn

warnings.simplefilter("ignore", RuntimeWarning)  # that there is no module
import fused_step
from fused_step import autograd

ops = torch.ops.fused_step
close = torch.testing.assert_close
WIDE = (torch.float32, torch.float64)
DTYPES = (*WIDE, torch.bfloat16, torch.float16)


def tensors(dtype, *leading):
    torch.manual_seed(0)
    x, t = torch.randn(*leading, 3, dtype=dtype), torch.randn(*leading, 2, dtype=dtype)
    return x, nn.Linear(3, 2, dtype=dtype), t


def plain(model, loss_function, optimizer, x, t, steps):
    losses = []
    for _ in range(steps):
        loss = loss_function(model(x), t)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


for dtype, reduction, ours in itertools.product(DTYPES, ("mean", "sum"), (False, True)):
    x, model, t = tensors(dtype, 5)
    other = copy.deepcopy(model)
    options = dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1)
    kind = fused_step.SGD if ours else torch.optim.SGD
    optimizer = kind(model.parameters(), **options)
    step = fused_step.TrainStep(model, nn.MSELoss(reduction=reduction), optimizer)
    losses = torch.stack([step(x, t), *step.run(x, t, epochs=2)])
    assert step.plan == "plain", step.plan
    expected = plain(
        other, nn.MSELoss(reduction=reduction), torch.optim.SGD(other.parameters(), **options),
        x, t, 3,
    )
    close(losses, expected)
    close(list(model.parameters()), list(other.parameters()))

for dtype, reduction in itertools.product(DTYPES, ("mean", "sum", "none")):
    x, model, t = tensors(dtype, 2, 5)
    def loss(function):
        model.zero_grad()
        y = function(x, model.weight, t, linear_bias=model.bias, reduction=reduction)
        y.sum().backward()
        return y.detach(), model.weight.grad.clone(), model.bias.grad.clone()
    stock = lambda x, w, t, linear_bias, reduction: F.mse_loss(
        F.linear(x, w, linear_bias), t, reduction=reduction
    )
    by_operator = lambda x, w, t, linear_bias, reduction: ops.linear_mse_loss(
        x, w, linear_bias, t, reduction
    )
    expected = loss(stock)
    close(loss(fused_step.linear_mse_loss), expected)
    close(loss(by_operator), expected)
    torch.compiler.reset()
    compiled = torch.compile(fused_step.linear_mse_loss, backend="eager", fullgraph=True)
    close(loss(compiled), expected)

for dtype in WIDE:  # the derivative in Python, which the operator serves
    x, model, t = tensors(dtype, 5)
    w, b = model.weight.detach(), model.bias.detach()
    function = lambda w: fused_step.linear_mse_loss(x, w, t, linear_bias=b)
    by_function = lambda w: autograd.LinearMSEFunction.apply(
        x, w, b, t, "mean", False, True, False, False
    )[0]
    expected = torch.func.grad(lambda w: F.mse_loss(F.linear(x, w, b), t))(w)
    close(torch.func.grad(function)(w), expected)
    close(torch.func.grad(by_function)(w), expected)

for dtype in DTYPES:  # the whole step as an operator
    x, model, t = tensors(dtype, 5)
    wide = copy.deepcopy(model).double()
    bufs = [torch.full_like(p, torch.nan) for p in model.parameters()]
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.05, momentum=0.9)
    expected = plain(wide, nn.MSELoss(), optimizer, x.double(), t.double(), 2)
    losses = [
        ops.linear_mse_sgd_(
            model.weight.detach(), model.bias.detach(), *bufs, x, t,
            lr=0.05, momentum=0.9, first_step=first,
        )
        for first in (True, False)
    ]
    # PyTorch's operators round in between, those of float16 in torch 2.11 more than later ones.
    near = dict(rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps / 8)
    close(torch.stack(losses), expected.to(dtype), **near)
    for p, exact in zip(model.parameters(), wide.parameters(), strict=True):
        close(p.detach(), exact.detach().to(dtype), **near)
    buf = optimizer.state[wide.weight]["momentum_buffer"].to(dtype)
    close(bufs[0], buf, **near)

for dtype in DTYPES:  # every result of the operator, asked for and not
    x, model, t = tensors(dtype, 5)
    r = (F.linear(x.double(), model.weight.double(), model.bias.double()) - t.double()).detach()
    dy = 2 / t.numel() * r
    expected = (dy @ model.weight.double(), dy.T @ x.double(), dy.sum(0), dy)
    _, *made = ops.linear_mse(x, model.weight, model.bias, t, "mean", True, True, True, True)
    sums = torch.promote_types(dtype, torch.float32)
    kept = torch.float32 if dtype == torch.float16 else dtype
    for m, e, d in zip(made, expected, (kept, sums, sums, kept), strict=True):
        close(m, e.to(d))
    _, *made = ops.linear_mse(x, model.weight, None, t, "none", True, True, True, False)
    assert [m.numel() for m in made] == [0] * 4

print(json.dumps({name: str(getattr(ops, name).default._schema) for name in %r}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a copy of the package lies, without the module."""
    folder = tmp_path_factory.mktemp("site")
    ignored = shutil.ignore_patterns("*.so", "*.json", "__pycache__")
    shutil.copytree(PACKAGE, folder / "fused_step", ignore=ignored)
    return folder


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with that copy, a cache of its own, and these arguments."""
    environment = {
        **os.environ,
        "FUSED_STEP_BUILD": "never",
        "FUSED_STEP_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(folder),
    }
    del environment["FUSED_STEP_REQUIRE_EXT"]
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def outcome(folder):
    return python(folder, "-c", SCRIPT % (OPS,))


def test_every_door_gives_what_pytorch_gives(outcome):
    assert outcome.returncode == 0, outcome.stderr


def test_operators_have_the_schemas_of_the_compiled_ones(outcome):
    compiled = {name: str(getattr(torch.ops.fused_step, name).default._schema) for name in OPS}
    assert json.loads(outcome.stdout) == compiled


@pytest.mark.parametrize(
    "statement",
    [
        "import fused_step",
        "from fused_step.optim import SGD",
        "import importlib; importlib.import_module('fused_step')",
    ],
)
def test_warning_points_at_the_line_that_imports_the_package(folder, statement):
    script = folder / "users.py"
    script.write_text(f"import sys\n{statement}\n")
    done = python(folder, str(script))
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"{script}:2: RuntimeWarning: fused_step runs without")


EXPLAIN = """
import torch, warnings
warnings.simplefilter("ignore", RuntimeWarning)
import fused_step
model = torch.nn.Linear(2, 1)
for kind in (torch.optim.SGD, fused_step.SGD, torch.optim.AdamW):
    step = fused_step.TrainStep(model, torch.nn.MSELoss(), kind(model.parameters(), lr=0.1))
    print(step.explain(torch.ones(3, 2), torch.ones(3, 1)))
"""


def test_explain_gives_the_missing_module_as_the_only_reason(folder):
    done = python(folder, "-c", EXPLAIN)
    assert done.returncode == 0, done.stderr
    plans, reasons = done.stdout.splitlines()[::2], done.stdout.splitlines()[1::2]
    assert plans == ["plan: plain"] * 3
    assert len(set(reasons)) == 1
    assert reasons[0].startswith("not deeper: there is no compiled module: ")
