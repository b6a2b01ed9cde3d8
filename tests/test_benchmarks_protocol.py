# SPDX-License-Identifier: MIT
"""How the benchmarks time: who is timed, in which order, and what comes of the numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from benchmark_fakes import (
    CASE,
    QUICK,
    WARM_UP,
    Breaks,
    BreaksUnseen,
    Device,
    Diverges,
    Interrupted,
    Missing,
    OnDevice,
    Timed,
    Wrong,
    quiet,
)
from harness import results
from harness.contestant import Absent
from harness.protocol import MIN_ROUNDS, Budget, Entry, Measured, Protocol, measure


def run(*contestants, protocol: Protocol = QUICK, seconds: float = 60.0, **device) -> Measured:
    return measure(CASE, contestants, protocol, quiet, seconds, **device)


def entry(measured: Measured, key: str) -> Entry:
    return next(e for e in measured.entries if e.contestant.key == key)


def row(case: dict, key: str) -> dict:
    return next(c for c in case["contestants"] if c["key"] == key)


def test_wrong_contestant_is_shown_with_its_error_and_never_timed():
    measured = run(Timed("right", [1e-3]), Wrong("wrong", "wrong"))
    assert (entry(measured, "right").status, measured.rounds) == ("ok", QUICK.rounds)
    wrong = row(results.case_result(measured, "right", "right", None), "wrong")
    assert wrong["status"] == "wrong"
    assert wrong["reason"].startswith("bias: error 0.001")
    assert wrong["check"]["bias"]["error"] > wrong["check"]["bias"]["allowed"]
    assert (wrong["samples_us"], wrong["microseconds"], wrong["ratio"]) == ([], None, None)


def test_absent_contestants_are_listed_with_their_reason():
    absent = Absent("graph", "graph", "there is no GPU")
    measured = run(Timed("right", [1e-3]), Missing("missing", "missing"), absent)
    reasons = [(e.status, e.reason) for e in measured.entries[1:]]
    assert reasons == [
        ("unavailable", "it is not installed here"),
        ("unavailable", "there is no GPU"),
    ]
    assert measured.rounds == QUICK.rounds


def test_contestant_that_breaks_amid_its_rounds_leaves_the_others_theirs():
    measured = run(Timed("right", [1e-3]), Breaks("breaks", [1e-3]))
    breaks = entry(measured, "breaks")
    assert (breaks.status, breaks.reason) == ("error", "RuntimeError: its device was lost")
    assert breaks.seconds == []
    assert len(measured.times("right")) == QUICK.rounds


def test_contestant_whose_loss_is_not_finite_in_the_end_is_wrong():
    measured = run(Timed("right", [1e-3]), Diverges("diverges", [1e-3]))
    diverges = entry(measured, "diverges")
    assert (diverges.status, diverges.seconds) == ("wrong", [])


def test_every_round_gives_each_contestant_one_turn_in_an_order_of_its_own(monkeypatch):
    order = []

    class Recorded(Timed):
        def sample(self, steps: int) -> float:
            order.append(self.key)
            return super().sample(steps)

    contestants = [Recorded(key, [1e-3]) for key in "abcd"]
    measured = run(*contestants)
    turns = order[-2 * 4 * QUICK.rounds :][::2]  # an untimed sample before each timed one
    rounds = [turns[i : i + 4] for i in range(0, len(turns), 4)]
    assert all(sorted(turn) == list("abcd") for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1
    assert all(len(measured.times(key)) == QUICK.rounds for key in "abcd")


def test_interrupt_keeps_the_complete_rounds():
    measured = run(Timed("right", [1e-3]), Interrupted("interrupted", after=11))
    assert measured.interrupted
    assert 0 < measured.rounds < QUICK.rounds
    assert len(measured.times("right")) == measured.rounds
    case = results.case_result(measured, "right", "right", None)
    assert case["interrupted"]
    assert len(row(case, "right")["samples_us"]) == measured.rounds


LOST = ("error", "RuntimeError: unspecified launch failure")


def states(measured: Measured) -> list[tuple[str, str]]:
    return [(e.status, e.reason) for e in measured.entries]


def test_contestant_that_breaks_the_device_in_a_round_leaves_the_others_those_before():
    device = Device()
    culprit = OnDevice("culprit", device, breaks_in=WARM_UP + 2 * 2 + 1)
    others = [OnDevice(key, device) for key in "abc"]
    measured = run(*others, culprit, lost=device.lost)
    assert states(measured) == [("ok", "")] * 3 + [LOST]
    assert (measured.lost_to, measured.rounds, measured.interrupted) == ("culprit", 2, True)
    assert [len(measured.times(key)) for key in "abc"] == [2, 2, 2]
    assert measured.times("culprit") is None


@pytest.mark.parametrize("breaks_in", ["prepare", WARM_UP, WARM_UP + 1])
def test_device_broken_before_a_round_is_complete_is_the_error_of_one_alone(breaks_in):
    device = Device()
    culprit = OnDevice("culprit", device, breaks_in)
    measured = run(OnDevice("a", device), culprit, OnDevice("b", device), lost=device.lost)
    others = ("error", "the device was lost to culprit")
    assert states(measured) == [others, LOST, others]
    assert (measured.lost_to, measured.rounds, measured.interrupted) == ("culprit", 0, True)


def test_device_broken_by_the_last_loss_leaves_the_others_all_rounds():
    device = Device()
    culprit = OnDevice("culprit", device, "last_loss")
    measured = run(culprit, OnDevice("other", device), lost=device.lost)
    assert states(measured) == [LOST, ("ok", "")]
    assert len(measured.times("other")) == QUICK.rounds


def test_device_found_broken_after_a_turn_without_an_error_was_broken_in_it():
    device = Device()
    contestants = BreaksUnseen("unseen", device), OnDevice("next", device)
    measured = run(*contestants, lost=device.lost)
    assert states(measured) == [
        ("error", "the device is silent"),
        ("error", "the device was lost to unseen"),
    ]


def test_release_that_raises_is_the_error_of_its_contestant_alone():
    released = []

    class Clings(Timed):
        def release(self) -> None:
            raise RuntimeError("cannot let go")

    class LetsGo(Timed):
        def release(self) -> None:
            released.append(self.key)

    measured = run(Clings("clings", [1e-3]), LetsGo("lets go", [1e-3]))
    assert states(measured) == [("error", "RuntimeError: cannot let go"), ("ok", "")]
    assert released == ["lets go"]


def test_interrupt_on_a_device_that_is_lost_blames_nobody():
    device = Device()

    class InterruptedAsItBreaks(OnDevice):
        def last_loss(self) -> float:
            self._device.broken = True
            raise KeyboardInterrupt

    measured = run(InterruptedAsItBreaks("a", device), OnDevice("b", device), lost=device.lost)
    assert states(measured) == [("ok", "")] * 2
    assert measured.interrupted


def test_ratio_is_the_median_of_the_rounds_ratios_not_the_ratio_of_medians():
    ours, other = [1.0, 2.0, 9.0], [3.0, 2.0, 18.0]
    entries = [Entry(Timed("ours", []), seconds=ours), Entry(Timed("other", []), seconds=other)]
    case = results.case_result(Measured(CASE, entries, rounds=3), "ours", "again", None)
    assert row(case, "other")["ratio"]["median"] == 2.0  # of 3, 1 and 2; the medians give 1.5
    assert np.median(other) / np.median(ours) == 1.5


@pytest.mark.parametrize(
    ("slowdown", "verdict"), [(1.04, "equal"), (1.2, "slower"), (0.8, "faster")]
)
def test_difference_below_the_noise_is_equal(slowdown, verdict):
    ours = [1.0, 1.0, 1.0, 1.0, 1.0]
    again = [0.9, 0.95, 1.0, 1.05, 1.1]
    seconds = {"ours": ours, "again": again, "other": [slowdown * t for t in ours]}
    entries = [Entry(Timed(key, []), seconds=times) for key, times in seconds.items()]
    case = results.case_result(Measured(CASE, entries, rounds=5), "ours", "again", None)
    assert 0.04 < case["aa"]["noise"] < 0.1
    assert row(case, "other")["verdict"] == verdict


@pytest.mark.parametrize("ratio", [0.8, 0.87, 1.15, 1.25])
def test_the_second_entry_of_the_subject_is_always_equal_to_it(ratio):
    seconds = {"ours": [1.0] * 5, "again": [ratio] * 5}
    entries = [Entry(Timed(key, []), seconds=times) for key, times in seconds.items()]
    case = results.case_result(Measured(CASE, entries, rounds=5), "ours", "again", None)
    assert row(case, "again")["verdict"] == "equal"


def test_cold_rounds_take_cold_samples_alone():
    contestant = Timed("right", [1e-3])
    measured = run(contestant, protocol=dataclasses.replace(QUICK, cold=True))
    assert contestant.turns == 0
    assert contestant.cold_turns == QUICK.rounds + 1  # the first warms up
    assert measured.times("right").tolist() == [1.0] * QUICK.rounds


def test_rounds_end_with_the_time_of_a_case_once_there_are_five():
    many = Protocol(rounds=1000, batch_seconds=1e-6, case_seconds=0.0)
    assert run(Timed("right", [1e-3]), protocol=many).rounds == MIN_ROUNDS


def test_no_round_begins_after_twice_the_time_of_a_case_but_there_is_one():
    assert run(Timed("right", [1e-3]), seconds=0.0).rounds == 1


def test_budget_gives_each_case_an_equal_share_of_what_is_left():
    clock = iter([0.0, 0.0, 10.0, 90.0, 101.0])
    budget = Budget(100.0, 4, now=lambda: next(clock))
    assert [budget.next_case() for _ in range(4)] == [25.0, 30.0, 5.0, None]
