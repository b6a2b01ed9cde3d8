# SPDX-License-Identifier: MIT
"""What of the GPU's benchmark needs no GPU: its clock, cold copies and memory, on fakes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import bench_gpu
import pytest
from harness import driver, gpu_memory, places
from harness.contestant import Unavailable
from harness.gpu_case import GpuCase, Span, copies_beyond
from harness.gpu_steps import GpuContestant
from harness.protocol import Protocol, measure

CASE = GpuCase(16, 4, 2, device="cpu")
MIB = 1 << 20


class Events:
    """A stream whose clock is this list's: recording and waiting are told in their order."""

    def __init__(self, milliseconds: float):
        self.told = []
        self._milliseconds = milliseconds

    def make(self):
        number = sum(what == "made" for what, _ in self.told)
        self.told.append(("made", number))
        return SimpleNamespace(
            record=lambda: self.told.append(("recorded", number)),
            synchronize=lambda: self.told.append(("waited for", number)),
            elapsed_time=lambda end: self._milliseconds,
        )


def test_span_is_the_devices_time_between_two_events_waited_for_at_the_end():
    events = Events(milliseconds=2.5)
    span = Span("cuda", make_event=events.make)
    with span.measured():
        events.told.append(("steps", None))
    assert span.seconds == 2.5e-3
    assert events.told[2:] == [
        ("recorded", 0),
        ("steps", None),
        ("recorded", 1),
        ("waited for", 1),
    ]


@pytest.mark.parametrize(
    ("l2_mib", "input_mib", "copies"), [(50, 4, 50), (50, 4096, 1), (50, 200, 1), (50, 199, 2)]
)
def test_cold_copies_are_together_four_times_the_cache(l2_mib, input_mib, copies):
    assert copies_beyond(l2_mib * MIB, input_mib * MIB) == copies
    assert copies * input_mib >= 4 * l2_mib


def test_number_of_cold_copies_is_bounded():
    assert copies_beyond(50 * MIB, 1) == 128


class FakeAllocator:
    """A GPU's memory that test contestants allocate from."""

    def __init__(self):
        self.now = self.most = 0

    def allocate(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)

    def free(self, size: int) -> None:
        self.now -= size

    def held(self) -> int:
        return self.now

    def reset_peak(self) -> None:
        self.most = self.now

    def peak(self) -> int:
        return self.most


class Allocates(GpuContestant):
    """Parameters, something at its preparation that it frees, and so much in a step."""

    def __init__(self, allocator, case, captured=0, in_a_step=0):
        super().__init__("a", "a")
        self._allocator, self._captured, self._in_a_step = allocator, captured, in_a_step
        self._parameters = case.weight_bytes + case.element_bytes * case.outputs

    def prepare(self, data):
        self._allocator.allocate(self._parameters)
        self._allocator.allocate(self._captured)
        self._allocator.free(self._captured)

    def sample(self, steps):
        for _ in range(steps):
            self._allocator.allocate(self._in_a_step)
            self._allocator.free(self._in_a_step)
        return 1e-3 * steps

    def release(self):
        self._allocator.free(self._parameters)


@pytest.mark.parametrize(("captured", "in_a_step"), [(0, 4096), (4096, 0), (512, 4096)])
def test_memory_is_the_peak_beyond_data_and_parameters_captures_included(captured, in_a_step):
    allocator = FakeAllocator()
    allocator.allocate(MIB)
    allocator.most = 7 * MIB  # of what was there before
    used = gpu_memory.used(Allocates(allocator, CASE, captured, in_a_step), CASE, 0, allocator)
    assert used == {"aten_bytes": 4096, "resident_bytes": None}
    assert allocator.held() == MIB


def test_memory_of_another_allocator_is_what_it_says_itself():
    allocator = FakeAllocator()
    contestant = Allocates(allocator, CASE, in_a_step=4096)
    contestant.own_peak = lambda: 99
    assert gpu_memory.used(contestant, CASE, 0, allocator)["aten_bytes"] == 99


@pytest.mark.parametrize(("step_bytes", "reached"), [(900, True), (901, False)])
def test_step_may_use_what_eager_does_less_the_gradient_of_the_weight(step_bytes, reached):
    case = dataclasses.replace(CASE, peak_memory=True)
    memories = {"eager": 900 + case.weight_bytes, "step": step_bytes}
    entries = {
        key: SimpleNamespace(
            memory={"aten_bytes": used, "resident_bytes": None}, facts={"plan": "gemm"}
        )
        for key, used in memories.items()
    }
    assert gpu_memory.judge(case, entries)["reached"] is reached
    assert gpu_memory.judge(CASE, entries) is None


def test_without_a_gpu_nothing_is_measured_and_said_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        driver.run(bench_gpu.BENCHMARK, [])
    assert ended.value.code == 2
    assert "no GPU" in capsys.readouterr().err


def test_gpu_is_lost_when_waiting_for_it_fails_and_a_rehearsal_has_none_to_lose(monkeypatch):
    def fails():
        raise RuntimeError("CUDA error: unspecified launch failure\nsecond line")

    monkeypatch.setattr("torch.cuda.synchronize", fails)
    assert places.Gpu().lost() == "RuntimeError: CUDA error: unspecified launch failure"
    assert places.Rehearsal().lost() is None
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    assert places.Gpu().lost() is None


def test_every_contestant_is_rehearsed_or_says_what_it_needs():
    case = bench_gpu._rehearsal(bench_gpu.CASES[0])
    protocol = Protocol(rounds=2, batch_seconds=1e-4, case_seconds=1.0)
    measured = measure(case, bench_gpu.contestants(), protocol, lambda *_: None)
    absent = {e.contestant.key: e.reason for e in measured.entries if e.status == "unavailable"}
    absent.pop("jax", None)  # where it is not installed
    absent.pop("jax_scan", None)
    assert sorted(absent) == [
        *("compiled", "eager_graph", "floor_replay", "hand_graph", "numpy", "sklearn"),
        "step_graph",
    ]
    assert all("GPU" in reason for reason in absent.values())
    others = [e for e in measured.entries if e.status != "unavailable"]
    assert {e.status for e in others} == {"ok"}, [(e.contestant.key, e.reason) for e in others]
    assert all(len(entry.seconds) == 2 for entry in others)


def test_scan_on_copies_is_refused_rather_than_left_warm():
    from harness.gpu_steps import JaxScan

    data = SimpleNamespace(batches=[None, None])
    with pytest.raises(Unavailable, match="one batch"):
        JaxScan("jax_scan", "").prepare(data)
