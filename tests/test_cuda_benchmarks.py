# SPDX-License-Identifier: MIT
"""The GPU's benchmarks run there from one end to the other. What they measure is not looked at."""

from __future__ import annotations

import dataclasses
import json

import pytest
from device import DEVICE

if DEVICE.type != "cuda":
    pytest.skip("needs a GPU: run with --device cuda", allow_module_level=True)
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("jsonschema")

import bench_gpu
import bench_gpu_optim
import bench_gpu_plans
from harness import driver

# The compiler takes half a minute a case, and JAX may not be there.
LEFT_OUT = ("compiled", "jax", "jax_scan", "numpy", "sklearn")


def states(benchmark, folder, *arguments: str) -> dict[str, tuple[str, str]]:
    """What became of each contestant in the one case of a short run."""
    keys = [c.key for c in benchmark.contestants() if c.key not in LEFT_OUT]
    chosen = f"--contestants={','.join(keys)}"
    options = ["--quick", "--rounds=2", "--seconds=6", f"--out={folder}", chosen, *arguments]
    driver.run(benchmark, options)
    result = json.loads((folder / f"{benchmark.kind}.json").read_text())
    (case,) = result["cases"]
    return {c["key"]: (c["status"], c["reason"]) for c in case["contestants"] if c["key"] in keys}


@pytest.mark.parametrize("outputs", [1, 48])
def test_every_contestant_of_the_step_is_measured(tmp_path, outputs):
    large = bench_gpu.CASES[1]
    assert large.cold
    small = dataclasses.replace(large, batch=64, inputs=24, outputs=outputs)
    found = states(dataclasses.replace(bench_gpu.BENCHMARK, cases=(small,)), tmp_path)
    assert set(found.values()) == {("ok", "")}, found


def test_every_contestant_of_the_optimizer_is_measured(tmp_path):
    case = dataclasses.replace(bench_gpu_optim.CASES[0], shapes=((64,), (3, 5), (129,)))
    found = states(dataclasses.replace(bench_gpu_optim.BENCHMARK, cases=(case,)), tmp_path)
    assert set(found.values()) == {("ok", "")}, found


@pytest.mark.parametrize(
    ("shape", "dtype", "unserved"),
    [((64, 16, 1), "float32", set()), ((4096, 72, 12), "bfloat16", {"tiny"})],
    ids=str,
)
def test_every_plan_that_serves_a_case_is_measured(tmp_path, shape, dtype, unserved):
    batch, inputs, outputs = shape
    case = dataclasses.replace(
        bench_gpu_plans.CASES[0], batch=batch, inputs=inputs, outputs=outputs, dtype=dtype
    )
    found = states(dataclasses.replace(bench_gpu_plans.BENCHMARK, cases=(case,)), tmp_path)
    assert {key for key, (status, _) in found.items() if status == "unavailable"} == unserved
    assert {status for key, (status, _) in found.items() if key not in unserved} == {"ok"}, found
