# SPDX-License-Identifier: MIT
"""How a case is timed: check, warm up, then rounds in which every contestant has its turn."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from harness.case import MICROSECOND
from harness.contestant import Contestant, Unavailable
from harness.oracle import STEPS, Check

Say = Callable[[str, int, int], None]  # what goes on, rounds done, rounds wanted
Lost = Callable[[], str | None]  # why the device no longer answers; None: it does

MIN_ROUNDS = 5  # within twice the time of a case; beyond it one is enough
_COLD_STEPS = 3  # of a sample: emptying the caches takes longer than most steps


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The numbers of the protocol; they go into the result file."""

    rounds: int = 40
    batch_seconds: float = 0.02  # a sample is at least that long, or one step
    case_seconds: float = 30.0  # no further round begins after that, once 5 are done
    budget_seconds: float = 600.0  # for all cases together, memory included
    seed: int = 0
    cold: bool = False  # every step finds the caches empty

    def as_json(self) -> dict:
        return dataclasses.asdict(self)


class Budget:
    """Shares what is left of the time equally among the cases that are left."""

    def __init__(self, seconds: float, cases: int, now: Callable[[], float] = time.monotonic):
        self._end = now() + seconds
        self._cases = cases
        self._now = now

    def next_case(self) -> float | None:
        """Seconds for the next case; None if there are none left."""
        left = self._end - self._now()
        share = left / max(1, self._cases)
        self._cases -= 1
        return share if left > 0 else None


@dataclasses.dataclass
class Entry:
    """One contestant in one case."""

    contestant: Contestant
    status: str = "ok"  # ok | wrong | unavailable | error
    reason: str = ""
    check: Check | None = None
    steps_per_sample: int = 1
    seconds: list[float] = dataclasses.field(default_factory=list)  # per step, one a round
    facts: dict[str, str] = dataclasses.field(default_factory=dict)
    memory: dict | None = None

    def out(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason
        self.seconds.clear()


class DeviceLost(Exception):
    """The device answers nobody any more: nothing else can be measured in this process."""


def never_lost() -> None:
    """For contestants that share no device."""


@dataclasses.dataclass
class Measured:
    """A case with its entries; all entries that are `ok` have one sample for each round."""

    case: Any
    entries: list[Entry]
    lost: Lost = never_lost
    rounds: int = 0
    interrupted: bool = False
    lost_to: str = ""  # label of the contestant that took the device with it

    def times(self, key: str) -> np.ndarray | None:
        """Seconds per step of `key` in each round, None if it was not timed."""
        if key == MICROSECOND and self.rounds:
            return np.full(self.rounds, 1e-6)
        for entry in self.entries:
            if entry.contestant.key == key and entry.status == "ok" and self.rounds:
                return np.array(entry.seconds[: self.rounds])
        return None

    def running(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.status == "ok"]

    @contextlib.contextmanager
    def may_end_early(self) -> Iterator[None]:
        """Ctrl-C and the loss of the device end the block; the complete rounds are kept."""
        try:
            yield
        except (KeyboardInterrupt, DeviceLost):
            self.interrupted = True

    @contextlib.contextmanager
    def turn_of(self, entry: Entry) -> Iterator[None]:
        """What fails in the block is the error of `entry`. Raises DeviceLost if the device did."""
        try:
            yield
        except Exception as error:
            entry.out("error", failure(error))
        # After a success, too: a kernel may fail after its call has returned.
        if reason := self.lost():
            entry.out("error", entry.reason or reason)
            self._lose_to(entry.contestant.label)
            raise DeviceLost

    def _lose_to(self, label: str) -> None:
        self.lost_to = label
        if not self.rounds:
            for entry in self.running():
                entry.out("error", f"the device was lost to {label}")


def failure(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def measure(
    case: Any,
    contestants: Sequence[Contestant],
    protocol: Protocol,
    say: Say,
    seconds: float = math.inf,
    lost: Lost = never_lost,
) -> Measured:
    """Times `contestants` on `case`. Ctrl-C, or a contestant that takes the device with it, ends it
    early with the rounds that are complete.

    Args:
        case: what to time.
        contestants: who takes part; released at the end.
        protocol: rounds and limits.
        say: told what goes on.
        seconds: for all of that: no further round begins after it once there are MIN_ROUNDS, nor
            after twice as long once there is one.
        lost: asked after each turn whether the device that they share still answers.
    """
    measured = Measured(case, [Entry(contestant) for contestant in contestants], lost)
    began = time.monotonic()
    try:
        with measured.may_end_early():
            _check_all(measured, protocol, say)
            _warm_up_all(measured, protocol, say)
            _time_rounds(measured, protocol, say, began, seconds)
    finally:
        _release_all(measured)
        gc.unfreeze()
        gc.collect()
    return measured


def _release_all(measured: Measured) -> None:
    for entry in measured.entries:
        if measured.lost():
            return  # it gives nothing back any more
        _release(entry)


def _release(entry: Entry) -> None:
    try:
        entry.contestant.release()
    except Exception as error:
        entry.out("error", failure(error))


def _check_all(measured: Measured, protocol: Protocol, say: Say) -> None:
    """Prepares everybody; who does not compute what the float64 loop does is out."""
    say("data and float64 reference", 0, protocol.rounds)
    data = measured.case.make_data(protocol.seed)
    oracle = measured.case.make_oracle(data)
    for entry in measured.entries:
        say(f"check: {entry.contestant.label}", 0, protocol.rounds)
        with measured.turn_of(entry):
            _prepare_and_check(entry, data, oracle)
        if entry.status != "ok":
            _release(entry)
    del data, oracle
    gc.collect()
    gc.freeze()  # what lives now is not looked at again by a collection between samples


def _prepare_and_check(entry: Entry, data: Any, oracle: Any) -> None:
    contestant = entry.contestant
    try:
        contestant.prepare(data)
        trajectory = contestant.trajectory(STEPS)
        if trajectory is not None:
            entry.check = oracle.check(trajectory, contestant.ours)
            if not entry.check.passed:
                entry.out("wrong", entry.check.failures())
    except Unavailable as error:
        entry.out("unavailable", str(error))
    except AssertionError as error:
        entry.out("wrong", str(error))


def _warm_up_all(measured: Measured, protocol: Protocol, say: Say) -> None:
    for entry in measured.running():
        say(f"warm-up: {entry.contestant.label}", 0, protocol.rounds)
        with measured.turn_of(entry):
            if protocol.cold:
                entry.steps_per_sample = _COLD_STEPS
                _sample(entry, protocol)
            else:
                _warm_up(entry, protocol.batch_seconds)
            entry.facts = entry.contestant.describe()
        time.sleep(entry.contestant.settle_seconds)


def _warm_up(entry: Entry, batch_seconds: float) -> None:
    """Finds how many steps fill a sample, then repeats it until two in a row agree within 10 %."""
    sample = entry.contestant.sample
    steps = 1
    sample(1)
    seconds = sample(1)
    while seconds < batch_seconds:
        # Aim a little above the limit; never more than tenfold, the first samples are slow.
        wanted = 1.2 * batch_seconds * steps / max(seconds, 1e-9)
        steps = max(steps + 1, min(10 * steps, math.ceil(wanted)))
        seconds = sample(steps)
    entry.steps_per_sample = steps
    for _ in range(4):
        previous, seconds = seconds, sample(steps)
        if abs(seconds - previous) <= 0.1 * previous:
            return


def _sample(entry: Entry, protocol: Protocol) -> float:
    """Seconds of one sample."""
    contestant, steps = entry.contestant, entry.steps_per_sample
    return contestant.cold_sample(steps) if protocol.cold else contestant.sample(steps)


def _timed_turn(entry: Entry, protocol: Protocol) -> float:
    """One sample in seconds per step, after an untimed one unless the caches are to be cold.

    That brings back this one's data, and the clock: after other work the processor here does 2.9
    vector FMAs per nanosecond at first, and 5.2 some 20 ms later.
    """
    if not protocol.cold:
        _sample(entry, protocol)
    return _sample(entry, protocol) / entry.steps_per_sample


def _time_rounds(
    measured: Measured, protocol: Protocol, say: Say, began: float, seconds: float
) -> None:
    order = random.Random(protocol.seed)
    enough = min(began + seconds, time.monotonic() + protocol.case_seconds)
    while measured.rounds < protocol.rounds:
        end = enough if measured.rounds >= MIN_ROUNDS else began + 2.0 * seconds
        if measured.rounds and time.monotonic() > end:
            break
        # A new order each round, so that nobody always follows the same neighbour.
        turns = measured.running()
        order.shuffle(turns)
        for entry in turns:
            with measured.turn_of(entry):
                entry.seconds.append(_timed_turn(entry, protocol))
            time.sleep(entry.contestant.settle_seconds)
        measured.rounds += 1
        say("rounds", measured.rounds, protocol.rounds)

    for entry in measured.running():
        with measured.turn_of(entry):
            loss = entry.contestant.last_loss()
            if loss is not None and not math.isfinite(loss):
                entry.out("wrong", f"the loss became {loss} while it was timed")
