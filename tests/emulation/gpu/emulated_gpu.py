# SPDX-License-Identifier: MIT
"""A plugin of pytest that gives torch two emulated GPUs: `-p emulated_gpu --device=cuda`.

torch's CPU build knows the device "cuda" in C++; what its Python part lacks of it is here, as far
as the tests use it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

assert "torch" not in sys.modules, "torch asks only once whether there is CUDA: it is too late"
_gpu = ctypes.CDLL(
    str(next(Path(__file__).parents[3].glob("fused_step/_C.*.so"))), ctypes.RTLD_GLOBAL
)
for _name in ("launches", "allocated", "most_allocated"):
    getattr(_gpu, f"gpu_{_name}").restype = ctypes.c_int64
_gpu.gpu_end_capture.restype = ctypes.c_void_p

import pytest  # noqa: E402
import torch  # noqa: E402

DEVICES = 2
# Part of a test's name, and why it is left out.
LEFT_OUT = {
    "sparse": "emulated GPUs have no sparse tensors",
    "no_ordinary_tensor": "emulated GPUs have no sparse tensors",
    "default_backend": "torch's compiler makes no kernels for emulated GPUs",
    "test_compiled_autograd_takes": "torch's compiler makes no kernels for emulated GPUs",
    "tf32": "emulated GPUs have no TF32",
    "beside_other_work": "minutes, and there is nothing beside it",
    "test_ctrl_c_ends_a_run": "looks at the time",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what cannot be, with its reason."""
    for item in items:
        for part, reason in LEFT_OUT.items():
            if re.search(re.escape(part), item.name):
                item.add_marker(pytest.mark.skip(reason=f"emulated: {reason}"))


def launches_of(call: Callable[[], object]) -> list[str]:
    """What the device does for a call; all have one name here."""
    before = _gpu.gpu_launches()
    call()
    return ["launch"] * (_gpu.gpu_launches() - before)


# --- streams and graphs ---------------------------------------------------------------------------


class Graph:
    """torch.cuda.CUDAGraph."""

    _kept: int | None = None

    def capture_begin(self) -> None:
        _gpu.gpu_begin_capture()

    def capture_end(self) -> None:
        self._kept = _gpu.gpu_end_capture()

    def replay(self) -> None:
        _gpu.gpu_replay(ctypes.c_void_p(self._kept))

    def pool(self) -> None:
        """There is none: memory that is freed during a capture stays the graph's own."""

    def __del__(self) -> None:
        if self._kept is not None:
            _gpu.gpu_forget(ctypes.c_void_p(self._kept))


@contextlib.contextmanager
def _captured(
    graph: Graph, pool: None = None, stream: torch.Stream | None = None
) -> Iterator[None]:
    with stream or _capture_stream():
        graph.capture_begin()
        try:
            yield
        finally:
            graph.capture_end()


@functools.cache
def _capture_stream() -> torch.Stream:
    return torch.Stream("cuda")  # one for all captures that name none, as torch has it


class Event:
    """torch.cuda.Event, by the host's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._time = 0.0

    def record(self, stream: torch.Stream | None = None) -> None:
        self._time = time.perf_counter()

    def synchronize(self) -> None:
        torch.accelerator.synchronize()

    def elapsed_time(self, end: Event) -> float:
        return (end._time - self._time) * 1e3


def _exchange_device(device: int) -> int:
    before: int = _gpu.gpu_current_device()
    if device >= 0:
        _gpu.gpu_set_device(device)
    return before


def _maybe_exchange_device(device: int) -> int:
    return _exchange_device(device)


# --- storages, which torch's Python handles by functions of its CUDA build ------------------------


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
    if storage.device.type != "cuda":
        return _resize_on_cpu(storage, size)
    _gpu.gpu_resize(ctypes.c_void_p(storage._cdata), ctypes.c_size_t(size))
    return storage


def _copy(
    to: torch.UntypedStorage, source: torch.UntypedStorage, non_blocking: bool = False
) -> torch.UntypedStorage:
    _bytes(to).copy_(_bytes(source))
    return to


def _clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    return _bytes(storage).clone().untyped_storage()


def _to(
    storage: torch.UntypedStorage, *, device: torch.device | str, non_blocking: bool = False
) -> torch.UntypedStorage:
    return _bytes(storage).to(device).untyped_storage()


_resize_on_cpu = torch.UntypedStorage.resize_
_PROPERTIES = SimpleNamespace(
    name="emulated",
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=1 << 20,
    total_memory=1 << 34,
)
_PATCHES = {
    torch.UntypedStorage: {"resize_": _resize, "copy_": _copy, "clone": _clone, "to": _to},
    torch._C: {"_cuda_getDevice": lambda: _exchange_device(-1)},
    torch.cuda: {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: DEVICES,
        "current_device": lambda: _exchange_device(-1),
        "_exchange_device": _exchange_device,
        "_maybe_exchange_device": _maybe_exchange_device,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: _PROPERTIES,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed_all": lambda seed: None,
        "synchronize": lambda device=None: torch.accelerator.synchronize(),
        "Stream": lambda device="cuda": torch.Stream(device),
        "stream": lambda stream: stream,
        "current_stream": lambda device=None: torch.accelerator.current_stream(device),
        "_sleep": lambda cycles: _gpu.gpu_sleep(),
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": _captured,
        "set_sync_debug_mode": lambda mode: _gpu.gpu_forbid_waiting(int(mode == "error")),
        "memory_allocated": lambda device=None: _gpu.gpu_allocated(),
        "memory_reserved": lambda device=None: _gpu.gpu_allocated(),
        "max_memory_allocated": lambda device=None: _gpu.gpu_most_allocated(),
        "reset_peak_memory_stats": lambda device=None: _gpu.gpu_reset_most_allocated(),
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (1 << 30, 1 << 34),
    },
}
for _owner, _patches in _PATCHES.items():
    for _name, _patch in _patches.items():
        setattr(_owner, _name, _patch)
