# SPDX-License-Identifier: MIT
"""What reports make of result files: the roofline, devices side by side, ratios that were lost."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import ratios
from harness import readme, report, results, roofline, side_by_side, tables

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


@pytest.fixture
def cpu() -> dict:
    return results.load(RESULTS / "cpu.json")


def contestant(case: dict, key: str) -> dict:
    return next(c for c in case["contestants"] if c["key"] == key)


def case_of(result: dict, name: str) -> dict:
    return next(case for case in result["cases"] if case["name"] == name)


def set_median(case: dict, key: str, microseconds: float) -> None:
    contestant(case, key)["microseconds"]["median"] = microseconds


def as_gpu(result: dict) -> dict:
    """The same figures as of a GPU."""
    made = copy.deepcopy(result)
    made["kind"] = "gpu"
    made["machine"]["gpu"] = {
        "name": "A GPU", "capability": "9.0", "multiprocessors": 132, "l2_mib": 50.0,
        "memory_gib": 80.0, "driver": "1",
    }  # fmt: skip
    return made


def test_older_result_without_memory_loads_as_not_measured(tmp_path):
    older = json.loads((RESULTS / "cpu.json").read_text())
    older["protocol"].pop("cold", None)
    for case in older["cases"]:
        for one in case["contestants"]:
            one.pop("memory", None)
    (tmp_path / "older.json").write_text(json.dumps(older))
    loaded = results.load(tmp_path / "older.json")
    assert loaded["protocol"]["cold"] is False
    assert {one["memory"] for case in loaded["cases"] for one in case["contestants"]} == {None}
    assert "–" in tables.markdown(loaded)


def test_roofline_is_the_largest_of_call_bytes_and_flops(cpu):
    large, square = case_of(cpu, "65536x1024x1"), case_of(cpu, "1024x1024x1024")
    set_median(large, "floor_read", 10_000.0)  # 256 MiB: 26.8 GB/s
    set_median(square, "floor_gemm", 4.0 * 1024**3 / 200_000)  # 200 GFLOP/s
    roof = roofline.of(cpu, large)
    assert roof.gb_per_s == pytest.approx(4 * 65536 * 1024 / 10_000 * 1e-3)
    assert roof.bytes == pytest.approx(10_000 * large["minimal_bytes"] / (4 * 65536 * 1024))
    assert roof.flops == pytest.approx(large["flops"] / 200_000)
    assert [part.key for part in roof.parts()] == ["bytes", "flops", "call"]
    assert roofline.of(cpu, square).parts()[0].key == "flops"
    tiny = roofline.of(cpu, case_of(cpu, "3x2x1")).parts()[0]
    assert tiny.time == contestant(case_of(cpu, "3x2x1"), "floor_call")["microseconds"]["median"]


def test_bandwidth_is_never_that_of_a_smaller_read(cpu):
    large, cached = case_of(cpu, "65536x1024x1"), case_of(cpu, "4096x1024x1")
    set_median(large, "floor_read", 10_000.0)
    set_median(cached, "floor_read", 1.0)  # as if 16 MiB came at once
    assert roofline.of(cpu, large).bytes == pytest.approx(10_000, rel=1e-2)
    assert roofline.of(cpu, cached).bytes == pytest.approx(1.0, rel=1e-2)


def test_roofline_of_a_gpu_counts_a_copy_twice_and_a_launch_as_a_call(cpu):
    gpu = as_gpu(cpu)
    names = {"floor_read": "floor_copy", "floor_call": "floor_launch"}
    for case in gpu["cases"]:
        for one in case["contestants"]:
            one["key"] = names.get(one["key"], one["key"])
    large = case_of(gpu, "65536x1024x1")
    of_cpu = roofline.of(cpu, case_of(cpu, "65536x1024x1"))
    assert roofline.of(gpu, large).gb_per_s == pytest.approx(2 * of_cpu.gb_per_s)
    assert roofline.of(gpu, large).call == of_cpu.call


def test_roofline_says_nothing_without_its_floors(cpu):
    for case in cpu["cases"]:
        case["contestants"] = [c for c in case["contestants"] if c["role"] != "floor"]
    assert roofline.of(cpu, cpu["cases"][0]).parts() == []
    assert "No roofline" in tables.roofline_words(cpu, cpu["cases"][0])


def test_devices_stand_side_by_side_only_where_there_are_several(cpu, tmp_path):
    cpu["cases"] = cpu["cases"][:2]
    assert side_by_side.write([cpu, cpu], tmp_path) == []
    written = side_by_side.write([as_gpu(cpu), cpu], tmp_path)
    assert [path.name for path in written] == ["side-by-side.md", "side-by-side.png"]
    rows = written[0].read_text().splitlines()[4:]
    assert len(rows) == 2 * len(cpu["cases"])
    assert rows[0].startswith(f"| {cpu['machine']['cpu']} |")
    assert rows[-1].startswith("| A GPU |")
    assert written[1].read_bytes().startswith(b"\x89PNG")


def test_pictures_are_made_of_what_was_measured(cpu, tmp_path):
    cpu["cases"] = cpu["cases"][:1]
    for one in cpu["cases"][0]["contestants"]:
        one["memory"] = None
    names = [path.name for path in report.write_pictures(cpu, tmp_path, "cpu")]
    assert names == ["cpu.png", "cpu-speedup.png"]
    contestant(cpu["cases"][0], "step")["memory"] = {"aten_bytes": 0, "resident_bytes": 4096}
    names = [path.name for path in report.write_pictures(cpu, tmp_path, "cpu")]
    assert names == ["cpu.png", "cpu-speedup.png", "cpu-memory.png"]


def with_ratio(result: dict, factor: float, noise: float) -> dict:
    """The same run with every contestant's ratio so many times as large, and that noise."""
    made = copy.deepcopy(result)
    for case in made["cases"]:
        case["aa"]["noise"] = noise
        for one in case["contestants"]:
            if one["ratio"]:
                one["ratio"]["median"] *= factor
    return made


@pytest.mark.parametrize(
    ("factor", "noise", "status"),
    [(1.0, 0.0, 0), (0.81, 0.0, 0), (0.79, 0.0, 1), (0.79, 0.03, 0), (0.7, 0.03, 1), (2.0, 0.0, 0)],
)
def test_ratio_is_lost_beyond_a_fifth_and_the_noise(cpu, factor, noise, status, capsys):
    before, now = with_ratio(cpu, 1.0, noise), with_ratio(cpu, factor, 0.0)
    assert ratios.report({"cpu": before}, {"cpu": now}) == status
    assert ("LOST" in capsys.readouterr().out) == bool(status)


def test_ratios_of_another_machine_are_not_compared(cpu, capsys):
    other = copy.deepcopy(cpu)
    other["machine"]["cpu"] = "another"
    assert ratios.report({"cpu": cpu}, {"cpu": other}) == 2
    assert ratios.report({}, {"cpu": cpu}) == 2
    assert capsys.readouterr().out.count("not compared") == 2


def test_readme_shows_losing_rows_and_missed_targets(cpu):
    case = case_of(cpu, "3x2x1")
    numpy = contestant(case, "numpy")
    numpy["verdict"], numpy["ratio"] = "faster", {"median": 0.5, "p20": 0.4, "p80": 0.6}
    case["targets"][0] |= {"reached": False, "within_noise": False}
    section = readme.section({"cpu": cpu})
    assert "- 3×2→1: NumPy takes 0.500× (0.400–0.600) fused_step step()'s time." in section
    assert "; the target: fused_step step(): ≥ 100× as fast as eager." in section


def test_readme_without_its_marks_is_refused():
    with pytest.raises(ValueError, match="expected the marks"):
        readme.put_into("no marks", {})
