# SPDX-License-Identifier: MIT
"""A contestant's own process: its threads, its memory, its end; and the emptying of caches."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from benchmark_fakes import CASE, QUICK, SaysWhere, Takes, Timed, Wrong, quiet
from harness import cold, isolated, memory
from harness.protocol import measure

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")

THREADS = 2
MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def _server():
    # As in a terminal: a shell's background jobs ignore it, and so would all that they start.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    isolated.start_server(THREADS, ["torch._dynamo"])
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def enter():
    """Enters contestants in processes of their own, which end with the test."""
    entered = []

    def make(contestant):
        entered.append(isolated.Isolated(contestant))
        entered[-1].prepare(CASE.make_data(seed=3))
        return entered[-1]

    yield make
    for contestant in entered:
        contestant.release()


def test_each_contestant_has_a_process_and_a_thread_pool_of_its_own(enter):
    first, second = (enter(SaysWhere(key, key)).trajectory(1) for key in "ab")
    assert len({first["pid"], second["pid"], os.getpid()}) == 3
    assert first["threads"] == second["threads"] == THREADS
    assert first["seed"] == 3
    assert first["ignores_interrupts"]


def test_facts_name_threads_and_cpus(enter):
    facts = enter(Timed("a", [1e-3])).describe()
    assert facts["threads"] == str(THREADS)
    assert facts["cpus"] == ",".join(map(str, sorted(os.sched_getaffinity(0))))


def test_process_that_ends_is_an_error_of_that_contestant(enter):
    contestant = enter(SaysWhere("a", "a"))
    with pytest.raises(RuntimeError, match="a: its process ended, exit 7"):
        contestant.sample(1)


def test_rounds_of_isolated_contestants_are_complete_and_a_wrong_one_is_out():
    contestants = [isolated.Isolated(Timed(key, [1e-3])) for key in "ab"]
    contestants.append(isolated.Isolated(Wrong("wrong", "wrong")))
    measured = measure(CASE, contestants, QUICK, quiet)
    assert [entry.status for entry in measured.entries] == ["ok", "ok", "wrong"]
    assert len(measured.times("a")) == len(measured.times("b")) == QUICK.rounds


@pytest.mark.parametrize(("of_torch", "of_numpy"), [(8 * MIB, 0), (0, 8 * MIB), (4 * MIB, 2 * MIB)])
def test_memory_is_what_a_step_takes(of_torch, of_numpy):
    used = isolated.Isolated(Takes("a", of_torch, of_numpy)).memory(CASE, seed=0)
    assert 0 <= used["aten_bytes"] - of_torch <= memory.ATEN_SLACK
    # torch.ones is gone before numpy's is made.
    assert abs(used["resident_bytes"] - max(of_torch, of_numpy)) <= memory.RESIDENT_SLACK


def test_eviction_writes_twice_the_last_cache_shared_among_its_users(tmp_path):
    for cpu in range(4):
        for index, (size, sharing) in enumerate([("32K", f"{cpu}"), ("8M", "0-2")]):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            (folder / "size").write_text(size + "\n")
            (folder / "shared_cpu_list").write_text(sharing + "\n")
    assert cold.bytes_to_write(0, [0], tmp_path) == 16 * MIB
    assert cold.bytes_to_write(0, [0, 2, 3], tmp_path) == 8 * MIB
    assert cold.bytes_to_write(9, [9], tmp_path) == 64 * MIB  # nothing is known of it


def test_cold_sample_empties_the_caches_before_each_step(monkeypatch):
    evicted = []
    monkeypatch.setattr(cold, "Evict", lambda: lambda: evicted.append(contestant.turns))
    contestant = Timed("a", [1e-3])
    served = isolated._Served(contestant)
    served.prepare(CASE, 0)
    assert served.cold_sample(3) == pytest.approx(3e-3)
    assert evicted == [0, 1, 2]


def test_eviction_leaves_the_process_on_the_cpus_it_had():
    before = os.sched_getaffinity(0)
    evict = cold.Evict()
    evict()
    evict()
    assert os.sched_getaffinity(0) == before
    assert all((buffer == 2.0).all() for _, buffer in evict._work)
