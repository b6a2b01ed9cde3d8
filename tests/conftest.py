# SPDX-License-Identifier: MIT
"""Settings shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before fused_step is imported: without the compiled module nearly nothing would be tested, and a
# module that is older than the sources is to be built again, not compiled into the user's cache.
os.environ["FUSED_STEP_REQUIRE_EXT"] = "1"
os.environ["FUSED_STEP_BUILD"] = "never"

import device
import pytest
import torch

try:
    import hypothesis
except ImportError:
    import no_hypothesis

    no_hypothesis.install()
else:
    # No deadline: the first call of a shape may allocate or start threads, and a shared machine
    # stalls. Derandomised: the same examples on every run, so that a red run can be run again.
    hypothesis.settings.register_profile("project", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("project")

# Workers of pytest-xdist share the cores; threads that wait for each other's core spin.
# Tests of threading set the number they need.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device under test: cpu (default) or cuda")
    parser.addoption("--every", type=int, default=1, help="run only every so many-th test")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "cpu_only(reason): not run under --device cuda; the reason is printed"
    )
    name = config.getoption("--device")
    if name == "cpu":
        return
    if torch.device(name).type != "cuda" or not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {name}: torch finds no such device here")
    device.use(name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every = config.getoption("--every")
    if every > 1:
        config.hook.pytest_deselected(items=[t for k, t in enumerate(items) if k % every])
        items[:] = items[::every]
    if device.DEVICE.type == "cpu":
        return
    for item in items:
        if marker := item.get_closest_marker("cpu_only"):
            item.add_marker(pytest.mark.skip(reason=f"CPU only: {marker.args[0]}"))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves the thread count as it was."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
