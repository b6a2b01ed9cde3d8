# SPDX-License-Identifier: MIT
"""Steps on tensors that end where their memory ends: the next byte belongs to nobody.

A program of its own, since what reads or writes that byte ends the process. Prints how many steps
it made; each gave what the same step gives in ordinary memory.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap

import torch
from torch import Tensor, nn

import fused_step

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Past two vectors of 16 lanes, the longest.
SIZES = range(1, 34)

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
PROT_NONE = 0


def at_end(values: Tensor) -> Tensor:
    """A copy of `values` [...], contiguous, whose last byte is the last one of its memory."""
    pages = -(-values.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    end = pages * mmap.PAGESIZE
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if libc.mprotect(address + end, mmap.PAGESIZE, PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    start = end - values.nbytes
    flat = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=start)
    return flat.view(values.shape).copy_(values)


def sgd_step(n: int, dtype: torch.dtype, momentum: float, place) -> list[Tensor]:
    """Parameter and buffer [n] after a step of fused_step.SGD."""
    param = nn.Parameter(place(torch.linspace(-1, 1, n, dtype=dtype)))
    param.grad = place(torch.linspace(1, 2, n, dtype=dtype))
    optimizer = fused_step.SGD([param], lr=0.1, momentum=momentum)
    buf = place(torch.linspace(2, 3, n, dtype=dtype))
    if momentum:
        optimizer.state[param]["momentum_buffer"] = buf
    optimizer.step(zero_grad=True)
    return [param.detach(), buf]


def train_step(B: int, I: int, O: int, dtype: torch.dtype, momentum: float, place) -> list[Tensor]:
    """Parameters, buffers and losses of a linear model, after a fused step and three in run()."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return place(torch.randn(shape, generator=generator, dtype=dtype))

    model = nn.Linear(I, O, dtype=dtype)
    for param in model.parameters():
        param.data = random(*param.shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=momentum)
    buffers = []
    if momentum:
        buffers = [random(*param.shape) for param in model.parameters()]
        for param, buf in zip(model.parameters(), buffers, strict=True):
            optimizer.state[param]["momentum_buffer"] = buf
    step = fused_step.TrainStep(model, nn.MSELoss(), optimizer)
    inputs, targets = random(B, I), random(B, O)
    loss = step(inputs, targets)
    losses = step.run(inputs, targets, epochs=1, batch_size=-(-B // 3))
    assert step.plan == "one-pass", step.explain(inputs, targets)
    return [*(param.detach() for param in model.parameters()), *buffers, loss, losses]


def main() -> None:
    steps = 0
    for dtype, n, momentum in itertools.product(DTYPES, SIZES, (0.0, 0.9)):
        cases = [(sgd_step, (n, dtype, momentum))]
        cases += [(train_step, (B, n, O, dtype, momentum)) for B, O in ((1, 1), (18, 1), (7, 3))]
        for make, case in cases:
            here, ordinary = make(*case, at_end), make(*case, torch.clone)
            same = [torch.equal(a, b) for a, b in zip(here, ordinary, strict=True)]
            assert all(same), (make.__name__, case, same)
            steps += 1
    print(steps, "steps")


if __name__ == "__main__":
    main()
