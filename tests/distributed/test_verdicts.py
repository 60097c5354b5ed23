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
from tetdist.distributed.rendezvous import SignedStore
from tetdist.distributed.watchdog import SILENCE, Watch
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


NAMED = [f"rank {rank} {ME}" for rank in range(4)]
DEAD = f"{NAMED[1]} has died or is cut off: nothing was heard of it for 30 s, since step 1"
HANGS = f"no progress for 20 s: {NAMED[1]} hangs at step 1, and the others wait; peer_timeout="
ALL_HANG = f"no progress for 20 s: {', '.join(NAMED)} and 2 more hangs at step 1; peer_timeout="
ENDED = "rank 1 has ended ('ValueError')"


@pytest.mark.parametrize(
    ("count", "timeout", "change", "stages"),
    [
        # Silence is death after a while.
        (3, 600, None, [(29, (1,), (0, 2), None), (31, (1,), (0, 2), DEAD)]),
        # A rank that is heard again was not dead.
        (2, 600, None, [(29, (1,), (0,), None), (50, (), (0,), None), (60, (1,), (0,), None)]),
        # Patience is no longer than what was asked for.
        (2, 10, None, [(9, (1,), (0,), None), (11, (1,), (0,), NAMED[1])]),
        # After a connection has failed, most likely because of that death, silence is death soon.
        (2, 600, "trouble", [(3.5, (1,), (0,), None), (5, (1,), (0,), NAMED[1])]),
        (3, 20, None, [(1, (), (0, 2), None), (20, (), (), None), (22, (), (), HANGS)]),
        # Nobody hangs while one gets on: an evaluation may be a single process's work for long.
        (2, 20, None, [(200, (), (1,), None), (400, (), (0,), None)]),
        # Where all hang, a few are named.
        (6, 20, None, [(30, (), (), ALL_HANG)]),
        # If all had made the same mistake they would all have ended by now.
        (2, 600, "ValueError", [(3, (), (0,), None), (60, (1,), (0,), ENDED)]),
        # A rank that has finished is not missed.
        (2, 600, "well", [(100, (1,), (0,), None)]),
    ],
)
def test_verdict(count, timeout, change, stages, clock):
    run = Processes(clock, count, timeout)
    if change == "trouble":
        run.watches[0]._store.set(watchdog._TROUBLE, "connection closed by peer")
    elif change:
        run.watches[1]._ended = change
        run.watches[1]._report_alive()
    for second, silent, moving, verdict in stages:
        found = run.until(second, silent=silent, moving=moving)
        assert found is verdict is None or found.startswith(verdict), (second, found)


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
