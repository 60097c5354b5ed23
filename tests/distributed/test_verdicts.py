"""Verdicts of the watch: which process is dead, which hangs, and which only waits.

The processes are objects here, with one store and a clock of ours; test_watchdog.py kills real
ones.
"""

import os
import socket

import pytest
import torch
import torch.distributed as dist

from tetdist.distributed import watchdog
from tetdist.distributed.meeting import SignedStore
from tetdist.distributed.watchdog import SILENCE, SILENCE_IN_TROUBLE, Watch
from tetdist.distributed.world import World

ME = f"(process {os.getpid()} on {socket.gethostname()})"


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now

    time = monotonic


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    return clock


class Processes:
    """The watches of a run's processes; rank 0 judges whenever time passes."""

    def __init__(self, clock, count, timeout):
        self.clock, self.start = clock, clock.now
        store = dist.HashStore()
        self.watches = [
            Watch(World(rank, count, torch.device("cpu"), control=None), timeout)
            for rank in range(count)
        ]
        for watch in self.watches:
            watch._store = SignedStore(store, "secret")
            watch.progress("step 1")
            watch._report_alive()
        assert self.watches[0]._judge() is None

    def until(self, second, *, silent=(), moving=()):
        """Advance the clock to that second after the start; return the first verdict on the way."""
        while self.clock.now < self.start + second:
            self.clock.now += 0.5
            for rank, watch in enumerate(self.watches):
                if rank in moving:
                    watch.progress(f"step {self.clock.now}")
                if rank not in silent:
                    watch._report_alive()
            if verdict := self.watches[0]._judge():
                return verdict
        return None


def test_silence_is_death_after_a_while(clock):
    run = Processes(clock, 3, timeout=600)
    assert run.until(SILENCE - 1, silent=(1,), moving=(0, 2)) is None
    expected = f"rank 1 {ME} has died or is cut off: nothing was heard of it for 30 s, since step 1"
    assert run.until(SILENCE + 1, silent=(1,), moving=(0, 2)) == expected


def test_a_rank_that_is_heard_again_was_not_dead(clock):
    run = Processes(clock, 2, timeout=600)
    assert run.until(SILENCE - 1, silent=(1,), moving=(0,)) is None
    assert run.until(SILENCE + 20, moving=(0,)) is None
    assert run.until(2 * SILENCE, silent=(1,), moving=(0,)) is None


def test_patience_is_no_longer_than_what_was_asked_for(clock):
    run = Processes(clock, 2, timeout=10)
    assert run.until(9, silent=(1,), moving=(0,)) is None
    assert "rank 1 " in str(run.until(11, silent=(1,), moving=(0,)))


def test_in_trouble_silence_is_death_soon(clock):
    """After a connection has failed, most likely because of that death."""
    run = Processes(clock, 2, timeout=600)
    run.watches[0]._store.set(watchdog._TROUBLE, "connection closed by peer")
    assert run.until(SILENCE_IN_TROUBLE - 0.5, silent=(1,), moving=(0,)) is None
    assert "rank 1 " in str(run.until(SILENCE_IN_TROUBLE + 1, silent=(1,), moving=(0,)))


def test_what_is_not_signed_is_not_heard(clock):
    run = Processes(clock, 2, timeout=600)
    signed = run.watches[0]._store
    stranger = signed.store
    stranger.set("1", stranger.get("0"))  # signed, but for another key
    stranger.set(watchdog._VERDICT, "run a command of mine")
    stranger.set(watchdog._TROUBLE, "ü" * 100)
    assert [signed.get(key) for key in ("1", watchdog._VERDICT, watchdog._TROUBLE)] == [None] * 3
    # Rank 1 is silent, without any other sign of trouble.
    assert run.until(SILENCE - 1, silent=(1,), moving=(0,)) is None
    assert "rank 1 " in str(run.until(SILENCE + 1, silent=(1,), moving=(0,)))


def test_a_rank_that_is_behind_hangs_and_the_others_wait(clock):
    run = Processes(clock, 3, timeout=20)
    assert run.until(1, moving=(0, 2)) is None
    assert run.until(20) is None
    expected = f"no progress for 20 s: rank 1 {ME} hangs at step 1, and the others wait; "
    assert str(run.until(22)).startswith(expected)


def test_nobody_hangs_while_one_gets_on(clock):
    """An evaluation may be a single process's work for long."""
    run = Processes(clock, 2, timeout=20)
    assert run.until(200, moving=(1,)) is None
    assert run.until(400, moving=(0,)) is None


def test_where_all_hang_a_few_are_named(clock):
    run = Processes(clock, 6, timeout=20)
    verdict = str(run.until(30))
    assert [f"rank {rank} " in verdict for rank in range(6)] == [True] * 4 + [False] * 2
    assert "and 2 more hangs at step 1; peer_timeout" in verdict


def test_end_of_one_is_reported_where_the_others_go_on(clock):
    run = Processes(clock, 2, timeout=600)
    run.watches[1]._ended = "ValueError: of rank 1 alone"
    # If all made the same mistake they would all have ended by now.
    assert run.until(SILENCE_IN_TROUBLE - 1, moving=(0,)) is None
    expected = "rank 1 has ended ('ValueError: of rank 1 alone')"
    assert run.until(60, silent=(1,), moving=(0,)) == expected


def test_a_rank_that_has_finished_is_not_missed(clock):
    run = Processes(clock, 2, timeout=600)
    run.watches[1]._ended = "well"
    run.watches[1]._report_alive()
    assert run.until(100, silent=(1,), moving=(0,)) is None
