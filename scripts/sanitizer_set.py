# SPDX-License-Identifier: MIT
"""A small set of steps through every kernel, for compute-sanitizer; each is checked in float64.

Usage: compute-sanitizer python scripts/sanitizer_set.py [--device cuda]
Sizes are odd ones, so that every kernel has a ragged end, and a few that vectors fit; batches are
cut from larger tensors whose other elements are NaN, so that one read too many shows in the result.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_step

# Of each plan, on CUDA: one block, a few blocks, many of them, a row wider than a warp takes, more
# outputs than one-pass serves. Then rows of whole vectors; in 16 bits, on the matrix units, by a
# warp for each row and by two, with up to 8, 16 and 32 outputs.
SHAPES = (
    (1, 1, 1),
    (37, 13, 1),
    (129, 33, 7),
    (4_099, 61, 3),
    (20_011, 37, 8),
    (257, 1_543, 1),
    (131, 67, 131),
    (4_099, 64, 1),
    (257, 2_048, 2),
    (4_099, 72, 6),
    (1_003, 520, 5),
    (1_501, 264, 13),
    (1_501, 136, 29),
)
OPTIONS = ({}, {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True})
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def guarded(rows: int, columns: int, dtype: torch.dtype, device: str, aligned: bool) -> Tensor:
    """[rows, columns] of random numbers in a sea of NaN, with a stride of its own.

    Args:
        rows: how many.
        columns: likewise.
        dtype: of the elements.
        device: where they lie.
        aligned: whether each row begins at a multiple of 8 elements.
    """
    before, after = (8, 16 - columns % 8) if aligned else (1, 2)
    sea = torch.full((rows + 2, before + columns + after), float("nan"), dtype=dtype, device=device)
    sea[1:-1, before:-after] = torch.randn(rows, columns, device=device).to(dtype)
    return sea[1:-1, before:-after]


def is_close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    """Loose: sums of some thousand terms, three steps. Tolerances are the test suite's subject."""
    size = float(exact.abs().max()) if exact.numel() else 0.0
    error = float((ours.double() - exact).abs().max()) if exact.numel() else 0.0
    return error <= 64 * torch.finfo(dtype).eps * max(size, 1.0)


def train(
    model: nn.Linear, x: Tensor, t: Tensor, options: dict, fused: bool
) -> tuple[str | None, list[Tensor]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, foreach=False, fused=False, **options)
    step = fused_step.TrainStep(model, nn.MSELoss(), optimizer)

    def five_lines(x: Tensor, t: Tensor) -> Tensor:
        loss = F.mse_loss(model(x), t)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    one = step if fused else five_lines
    losses = [one(x, t) for _ in range(3)]
    return step.plan, [*losses, *(p.detach() for p in model.parameters())]


def check_step(
    B: int, I: int, O: int, dtype: torch.dtype, options: dict, device: str, aligned: bool
) -> tuple[str | None, bool]:
    x, t = guarded(B, I, dtype, device, aligned), guarded(B, O, dtype, device, aligned)
    model = nn.Linear(I, O, device=device, dtype=dtype)
    exact_model = nn.Linear(I, O, device=device, dtype=torch.float64)
    with torch.no_grad():
        for p, q in zip(exact_model.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    plan, ours = train(model, x, t, options, fused=True)
    _, exact = train(exact_model, x.double(), t.double(), options, fused=False)
    return plan, all(is_close(a, b, dtype) for a, b in zip(ours, exact, strict=True))


def check_loss(
    B: int, I: int, O: int, dtype: torch.dtype, device: str, aligned: bool, needs_dx: bool
) -> bool:
    x, t = guarded(B, I, dtype, device, aligned), guarded(B, O, dtype, device, aligned)
    W, b = torch.randn(O, I, device=device).to(dtype), torch.randn(O, device=device).to(dtype)

    def evaluate(kind: torch.dtype, loss) -> list[Tensor]:
        tensors = [a.detach().to(kind).requires_grad_() for a in (x, W, b)]
        value = loss(*tensors, t.to(kind))
        return [value.detach(), *torch.autograd.grad(value, tensors[0 if needs_dx else 1 :])]

    ours = evaluate(dtype, lambda x, W, b, t: fused_step.linear_mse_loss(x, W, t, linear_bias=b))
    exact = evaluate(torch.float64, lambda x, W, b, t: F.mse_loss(F.linear(x, W, b), t))
    return all(is_close(a, e, dtype) for a, e in zip(ours, exact, strict=True))


def train_all(params: list[Tensor], make, options: dict) -> list[Tensor]:
    """Three steps over many tensors."""
    optimizer = make(params, lr=0.01, **options)
    for number in range(3):
        for k, p in enumerate(params):
            p.grad = torch.full_like(p, 0.5 + 0.25 * number + 0.125 * (k % 3))
        optimizer.step()
    return [p.detach() for p in params]


def check_optimizer(dtype: torch.dtype, options: dict, device: str) -> bool:
    """Tensors of many sizes, each in a sea of NaN, every other one an element off."""
    own = {"momentum_dtype": torch.float32} if dtype.itemsize == 2 else {}
    params = []
    for k, n in enumerate((*range(1, 20), 1_000, 4_095, 4_097, 20_011)):
        sea = torch.full((n + 9,), float("nan"), dtype=dtype, device=device)
        sea[k % 2 : k % 2 + n] = torch.randn(n, device=device).to(dtype)
        params.append(nn.Parameter(sea[k % 2 : k % 2 + n]))
    copies = [nn.Parameter(p.detach().double()) for p in params]
    ours = train_all(params, fused_step.SGD, {**options, **own})
    exact = train_all(copies, torch.optim.SGD, {**options, "foreach": False})
    good = all(is_close(a, b, dtype) for a, b in zip(ours, exact, strict=True))
    clipping = fused_step.SGD(params, lr=0.0, max_grad_norm=1.0)
    clipping.step(zero_grad=True, set_to_none=False)
    return good and not any(p.grad.any() for p in params) and bool(clipping.grad_norm > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    wrong, plans = [], set()
    for shape in SHAPES:
        for dtype in DTYPES:
            aligned = shape[1] % 8 == 0
            for options in OPTIONS:
                plan, good = check_step(*shape, dtype, options, device, aligned)
                plans.add(str(plan))
                if not good:
                    wrong.append(f"step {shape} {dtype} {options} {plan}")
            for needs_dx in (True, False):
                if not check_loss(*shape, dtype, device, aligned, needs_dx):
                    wrong.append(f"loss {shape} {dtype} needs_dx={needs_dx}")
        print(f"{shape}: done", flush=True)
    for dtype in DTYPES:
        for options in OPTIONS:
            if not check_optimizer(dtype, options, device):
                wrong.append(f"optimizer {dtype} {options}")
    print("plans:", ", ".join(sorted(plans)))
    if wrong:
        raise SystemExit("wrong results:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
