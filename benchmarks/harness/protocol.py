# SPDX-License-Identifier: MIT
"""How a case is timed: check, warm up, then rounds in which every contestant has its turn."""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import time
from collections.abc import Callable, Sequence

import numpy as np

from harness.case import Case, Data
from harness.contestant import Contestant, Unavailable
from harness.oracle import STEPS, Check, Oracle

# OpenMP's threads spin for a few ms after their last region, OpenBLAS's for about 30 ms; a thread
# that spins in one process would take a core from the contestant in the other.
_SETTLE_BEFORE_ISOLATED = 0.010
_SETTLE_AFTER_ISOLATED = 0.050
_MIN_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The numbers of the protocol; they go into the result file."""

    rounds: int = 40
    batch_seconds: float = 0.02  # a sample is at least that long, or one step
    case_seconds: float = 30.0  # no further round begins after that, once 5 are done
    seed: int = 0

    def as_json(self) -> dict:
        return dataclasses.asdict(self)


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

    def out(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason
        self.seconds.clear()


@dataclasses.dataclass
class Measured:
    """A case with its entries; all entries that are `ok` have one sample for each round."""

    case: Case
    entries: list[Entry]
    rounds: int = 0
    interrupted: bool = False

    def times(self, key: str) -> np.ndarray | None:
        """Seconds per step of `key` in each round, None if it was not timed."""
        for entry in self.entries:
            if entry.contestant.key == key and entry.status == "ok" and self.rounds:
                return np.array(entry.seconds[: self.rounds])
        return None


def _failure(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _prepare_and_check(entry: Entry, data: Data, oracle: Oracle) -> None:
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
    except Exception as error:
        entry.out("error", _failure(error))


def _settle(before: Contestant | None, after: Contestant) -> None:
    if before is not None and before.isolated:
        time.sleep(_SETTLE_AFTER_ISOLATED)
    elif after.isolated:
        time.sleep(_SETTLE_BEFORE_ISOLATED)


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


def _timed_turn(entry: Entry) -> float:
    """One sample in seconds per step, after an untimed one.

    That brings back this one's data, and the clock: after other work the processor here does 2.9
    vector FMAs per nanosecond at first, and 5.2 some 20 ms later.
    """
    steps = entry.steps_per_sample
    entry.contestant.sample(steps)
    return entry.contestant.sample(steps) / steps


def measure(
    case: Case,
    contestants: Sequence[Contestant],
    protocol: Protocol,
    say: Callable[[str, int, int], None],
) -> Measured:
    """Times `contestants` on `case`. Ctrl-C ends it early with the rounds that are complete.

    Args:
        case: what to time.
        contestants: who takes part; released at the end.
        protocol: rounds and limits.
        say: called with (what goes on, rounds done, rounds wanted).
    """
    measured = Measured(case, [Entry(contestant) for contestant in contestants])
    try:
        _measure(measured, protocol, say)
    except KeyboardInterrupt:
        measured.interrupted = True
    finally:
        for entry in measured.entries:
            entry.contestant.release()
        gc.unfreeze()
        gc.collect()
    return measured


def _running(measured: Measured) -> list[Entry]:
    return [entry for entry in measured.entries if entry.status == "ok"]


def _measure(measured: Measured, protocol: Protocol, say: Callable[[str, int, int], None]) -> None:
    say("data and float64 reference", 0, protocol.rounds)
    data = measured.case.make_data(protocol.seed)
    oracle = measured.case.make_oracle(data)
    for entry in measured.entries:
        say(f"check: {entry.contestant.label}", 0, protocol.rounds)
        _prepare_and_check(entry, data, oracle)
    gc.collect()
    gc.freeze()  # what lives now is not looked at again by a collection between samples

    previous: Contestant | None = None
    for entry in _running(measured):
        say(f"warm-up: {entry.contestant.label}", 0, protocol.rounds)
        _settle(previous, entry.contestant)
        try:
            _warm_up(entry, protocol.batch_seconds)
            entry.facts = entry.contestant.describe()
        except Exception as error:
            entry.out("error", _failure(error))
        previous = entry.contestant

    order = random.Random(protocol.seed)
    deadline = time.monotonic() + protocol.case_seconds
    while measured.rounds < protocol.rounds:
        if measured.rounds >= _MIN_ROUNDS and time.monotonic() > deadline:
            break
        # A new order each round, so that nobody always follows the same neighbour.
        turns = _running(measured)
        order.shuffle(turns)
        for entry in turns:
            _settle(previous, entry.contestant)
            try:
                entry.seconds.append(_timed_turn(entry))
            except Exception as error:
                entry.out("error", _failure(error))
            previous = entry.contestant
        measured.rounds += 1
        say("rounds", measured.rounds, protocol.rounds)

    for entry in _running(measured):
        loss = entry.contestant.last_loss()
        if loss is not None and not math.isfinite(loss):
            entry.out("wrong", f"the loss became {loss} while it was timed")
