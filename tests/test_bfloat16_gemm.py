# SPDX-License-Identifier: MIT
"""The gemm plan with GEMMs in bfloat16, which processors take that multiply bfloat16 themselves.

Here every processor takes them, at any size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from device import DEVICE
from loss_oracle import (
    HEAD,
    REDUCTIONS,
    TRAINING,
    LossProblem,
    assert_loss_like_torch,
    fused_loss,
)
from oracle import Problem, assert_trains_like_plain, same_bits

from fused_step._extension import _C

if DEVICE.type != "cpu":
    pytest.skip("CPU only: GEMMs of the processor", allow_module_level=True)

# More outputs than one-pass serves; the last in panels of rows.
SHAPES = [(1, 1, 33), (5, 3, 40), (37, 13, 131), (300, 1, 130), (515, 131, 131), (3000, 7, 1100)]
OPTIONS = (
    {},
    {"momentum": 0.9, "weight_decay": 0.01},
    {"momentum": 0.5, "dampening": 0.25, "maximize": True},
    {"momentum": 0.9, "nesterov": True},
)


@pytest.fixture(autouse=True)
def _in_bfloat16() -> Iterator[None]:
    _C.use_bfloat16_gemm(True)
    yield
    _C.use_bfloat16_gemm(None)


def gradient(problem: LossProblem, always: bool | None):
    _C.use_bfloat16_gemm(always)
    return problem.evaluate(fused_loss)["weight"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_equal_torchs(shape, reduction):
    for needs, bias in itertools.product(
        (HEAD, TRAINING, frozenset({"input"}), frozenset({"target"})), (True, False)
    ):
        problem = LossProblem.random(
            *shape, dtype=torch.bfloat16, bias=bias, reduction=reduction, needs=needs
        )
        assert_loss_like_torch(problem)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_equal_the_plain_loops(shape, options):
    for bias in (True, False):
        problem = Problem.random(*shape, dtype=torch.bfloat16, bias=bias, options=options)
        assert_trains_like_plain(problem, plans=("gemm",))


def test_equal_rows_may_be_one():
    problem = LossProblem.random(1, 10, 40, dtype=torch.bfloat16, needs=HEAD)
    assert_loss_like_torch(
        problem.with_layout(input=problem.input.expand(7, 10), target=problem.target.expand(7, 40))
    )


@pytest.mark.parametrize("B", (0, 1, 6))
def test_rows_may_lie_apart(B):
    problem = LossProblem.random(B, 10, 40, dtype=torch.bfloat16, needs=HEAD)
    wide_x, wide_t = (
        torch.full((2, max(B, 1), 17), torch.nan).bfloat16(),
        torch.full((max(B, 1), 91), torch.nan),
    )
    x, t = wide_x[0, :B, 3:13], wide_t.bfloat16()[:B, 5:45]
    x.copy_(problem.input)
    t.copy_(problem.target)
    assert_loss_like_torch(problem.with_layout(input=x, target=t))


def test_many_weights_of_few_outputs_take_it_instead_of_one_pass():
    problem = Problem.random(64, 256, 8, dtype=torch.bfloat16)
    assert_trains_like_plain(problem, plans=("gemm",))
    assert_loss_like_torch(LossProblem.random(64, 256, 8, dtype=torch.bfloat16, needs=HEAD))
    _C.use_bfloat16_gemm(False)
    assert_trains_like_plain(problem, plans=("one-pass",))


def test_a_step_of_the_gemm_plan_takes_it():
    problem = Problem.random(300, 70, 130, dtype=torch.bfloat16, options={"momentum": 0.9})
    buffers = []
    for always in (True, False):
        _C.use_bfloat16_gemm(always)
        buffers.append(assert_trains_like_plain(problem, plans=("gemm",)).weight_buffer)
    assert not same_bits(*buffers)


def test_by_default_it_is_left_to_the_processor_and_the_size():
    cpuinfo = Path("/proc/cpuinfo").read_text()
    large, small = (
        LossProblem.random(B, 256, 33, dtype=torch.bfloat16, needs=HEAD) for B in (512, 16)
    )
    for problem in (large, small):
        assert not same_bits(gradient(problem, True), gradient(problem, False))
    has_instructions = "avx512_bf16" in cpuinfo and torch.backends.mkldnn.is_available()
    assert same_bits(gradient(large, None), gradient(large, has_instructions))
    assert same_bits(gradient(small, None), gradient(small, False))
    torch._C._set_mkldnn_enabled(False)  # by torch.backends.mkldnn.flags it warns of TF32
    try:
        assert same_bits(gradient(large, None), gradient(large, False))
    finally:
        torch._C._set_mkldnn_enabled(True)
