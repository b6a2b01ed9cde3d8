# SPDX-License-Identifier: MIT
"""A whole run of a benchmark: its files, its limits, and its end by Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmark_fakes import (
    CASE,
    SECOND_CASE,
    WARM_UP,
    Device,
    Interrupted,
    Missing,
    OnDevice,
    Timed,
    Wrong,
)
from harness import driver, places, results
from harness.protocol import Protocol

ROOT = Path(__file__).resolve().parents[1]
FULL = Protocol(rounds=5, batch_seconds=1e-6)


class Here(places.Cpu):
    """Contestants in this process; nothing is built or started."""

    def start(self, threads, contestants):
        return "here"

    def enter(self, contestant):
        return contestant

    def memory(self, contestant, case, seed):
        return {"aten_bytes": 1024, "resident_bytes": None}


class OnOneDevice(Here):
    """All contestants use this one device, for their memory, too."""

    def __init__(self, device, breaks_by_memory_of=""):
        self._device, self._breaks_by_memory_of = device, breaks_by_memory_of

    def lost(self):
        return self._device.lost()

    def memory(self, contestant, case, seed):
        self._device.broken |= contestant.key == self._breaks_by_memory_of
        self._device.use()
        return super().memory(contestant, case, seed)


def benchmark(*contestants, full=FULL, place=None, **changes) -> driver.Benchmark:
    return driver.Benchmark(
        kind="fake",
        description="A benchmark of fakes.",
        cases=(CASE, SECOND_CASE),
        contestants=lambda: contestants,
        subject="ours",
        again="again",
        place=place or Here(),
        full=full,
        **changes,
    )


OURS = (Timed("ours", [1e-3]), Timed("again", [1.01e-3]))


def test_run_writes_a_valid_result_with_its_table_and_pictures(tmp_path):
    others = (Timed("other", [3e-3]), Wrong("wrong", "wrong"), Missing("missing", "missing"))
    driver.run(benchmark(*OURS, *others), ["--out", str(tmp_path)])
    result = results.load(tmp_path / "fake.json")
    assert result["complete"]
    assert result["machine"]["affinity"] == sorted(os.sched_getaffinity(0))
    assert 0.0 <= result["busy_cpus"] <= result["machine"]["logical_cpus"]
    for case in result["cases"]:
        found = {c["key"]: c for c in case["contestants"]}
        assert [found[key]["status"] for key in ("other", "wrong", "missing")] == [
            *("ok", "wrong", "unavailable"),
        ]
        assert found["other"]["ratio"]["median"] == pytest.approx(3.0)
        assert found["other"]["memory"] == {"aten_bytes": 1024, "resident_bytes": None}
        assert found["again"]["memory"] is None
    table = (tmp_path / "fake.md").read_text()
    assert "| wrong | wrong |  |" in table
    assert "- missing: unavailable: it is not installed here" in table
    assert "threads each on CPUs" in table
    assert "busy with other things before" in table
    for name in ("fake.png", "fake-speedup.png", "fake-memory.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_result_that_is_not_what_the_schema_says_is_not_written(tmp_path):
    result = json.loads((ROOT / "benchmarks" / "results" / "optim.json").read_text())
    result["cases"][0]["contestants"][0]["status"] = "fine"
    with pytest.raises(Exception, match="'fine' is not one of"):
        results.save(result, tmp_path / "other.json")
    assert not (tmp_path / "other.json").exists()


def test_partial_runs_leave_the_committed_results_alone():
    for arguments in (["--quick"], ["--cases", CASE.name], ["--rounds", "3"], ["--seconds", "3"]):
        options = driver._parse(benchmark(*OURS), arguments)
        assert options.out == ROOT / "build" / "benchmarks"
    assert driver._parse(benchmark(*OURS), []).out == ROOT / "benchmarks" / "results"


def test_unknown_case_or_contestant_is_refused_with_the_known_ones(capsys):
    for option, known in (("--cases", CASE.name), ("--contestants", "ours")):
        with pytest.raises(SystemExit):
            driver._parse(benchmark(*OURS), [option, "other"])
        assert known in capsys.readouterr().err


def test_case_for_which_no_time_is_left_is_left_out_and_the_run_incomplete(tmp_path, capsys):
    class Slow(Timed):
        def sample(self, steps):
            time.sleep(0.05)
            return super().sample(steps)

    slow = benchmark(*OURS, Slow("slow", [1e-3]), full=Protocol(budget_seconds=0.3, rounds=1000))
    driver.run(slow, ["--out", str(tmp_path)])
    result = results.load(tmp_path / "fake.json")
    assert [case["name"] for case in result["cases"]] == [CASE.name]
    assert not result["complete"]
    assert "left out, no time was left" in capsys.readouterr().out
    used = {c["key"]: c["memory"] for c in result["cases"][0]["contestants"]}
    assert used["slow"] == {"error": "no time was left"}


def test_interrupt_in_a_round_keeps_the_rounds_before_it(tmp_path):
    interrupted = benchmark(*OURS, Interrupted("interrupted", after=9))
    with pytest.raises(SystemExit) as ended:
        driver.run(interrupted, ["--out", str(tmp_path)])
    assert ended.value.code == 130
    result = results.load(tmp_path / "fake.json")
    assert [case["interrupted"] for case in result["cases"]] == [True]
    assert not result["complete"]
    assert "not all cases were run to the end, or" in (tmp_path / "fake.md").read_text()


def run_until_lost(benchmark: driver.Benchmark, folder: Path) -> dict:
    """The result file of a run that must end because its device was lost."""
    with pytest.raises(SystemExit) as ended:
        driver.run(benchmark, ["--out", str(folder)])
    assert ended.value.code == 1
    result = results.load(folder / "fake.json")
    assert not result["complete"]
    return result


def status_and_rounds(case: dict) -> dict[str, tuple[str, int]]:
    return {c["key"]: (c["status"], len(c["samples_us"])) for c in case["contestants"]}


def test_device_lost_in_a_later_case_ends_the_run_and_keeps_what_was_complete(tmp_path, capsys):
    device = Device()
    first_case = WARM_UP + 2 * FULL.rounds
    culprit = OnDevice("culprit", device, breaks_in=first_case + WARM_UP + 2 * 2 + 1)
    others = OnDevice("ours", device), OnDevice("again", device)
    lost = benchmark(*others, culprit, place=OnOneDevice(device), with_memory=False)
    result = run_until_lost(lost, tmp_path)
    assert f"{SECOND_CASE.title}: the device was lost to culprit" in capsys.readouterr().out
    first, second = result["cases"]
    assert set(status_and_rounds(first).values()) == {("ok", FULL.rounds)}
    assert status_and_rounds(second) == {
        "ours": ("ok", 2),
        "again": ("ok", 2),
        "culprit": ("error", 0),
    }
    table = (tmp_path / "fake.md").read_text()
    assert "- culprit: error: RuntimeError: unspecified launch failure" in table


def test_device_lost_in_the_check_leaves_a_row_that_says_to_whom(tmp_path, capsys):
    device = Device()
    culprit = OnDevice("culprit", device, breaks_in="prepare")
    others = OnDevice("ours", device), OnDevice("again", device)
    result = run_until_lost(benchmark(*others, culprit, place=OnOneDevice(device)), tmp_path)
    assert f"{CASE.title}: the device was lost to culprit" in capsys.readouterr().out
    (case,) = result["cases"]
    assert set(status_and_rounds(case).values()) == {("error", 0)}
    table = (tmp_path / "fake.md").read_text()
    assert "- culprit: error: RuntimeError: unspecified launch failure" in table
    assert "- ours: error: the device was lost to culprit" in table


def test_device_lost_while_memory_is_measured_is_the_error_of_whose_it_was(tmp_path):
    device = Device()
    contestants = [OnDevice(key, device) for key in ("ours", "again", "culprit", "other")]
    lost = benchmark(*contestants, place=OnOneDevice(device, breaks_by_memory_of="culprit"))
    (case,) = run_until_lost(lost, tmp_path)["cases"]
    done = ("ok", FULL.rounds)
    states = {"ours": done, "again": done, "culprit": ("error", 0), "other": done}
    assert status_and_rounds(case) == states
    found = {c["key"]: c for c in case["contestants"]}
    assert found["culprit"]["reason"] == "the device is silent"
    assert found["ours"]["memory"]["aten_bytes"] == 1024
    assert found["other"]["memory"] is None


def _ended(group: int) -> bool:
    """Whether no process of the group is left; the server of processes takes a moment to end."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


INTERRUPTED_RUN = """
import signal
import sys
from benchmark_fakes import CASE, SECOND_CASE, SlowInTheSecondCase
from harness import driver
from harness.protocol import Protocol

if __name__ == "__main__":
    # As in a terminal: a shell's background jobs ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    contestants = [SlowInTheSecondCase(key, key) for key in ("ours", "again")]
    full = Protocol(rounds=5, batch_seconds=1e-6)
    benchmark = driver.Benchmark(
        "fake", "Fakes.", (CASE, SECOND_CASE), lambda: contestants, "ours", "again", full=full
    )
    driver.run(benchmark, ["--no-memory", "--out", sys.argv[1]])
"""


def test_ctrl_c_keeps_the_finished_cases_and_leaves_no_process_behind(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(INTERRUPTED_RUN)
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "benchmarks")])
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a process group, as a terminal's Ctrl-C goes to all of it
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "fake.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)  # into the second case
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert "interrupted: what was complete is kept" in output
    result = results.load(tmp_path / "fake.json")
    assert [case["name"] for case in result["cases"]] == [CASE.name]
    assert result["cases"][0]["rounds"] == 5
    assert (tmp_path / "fake.md").is_file()
    assert _ended(process.pid)
