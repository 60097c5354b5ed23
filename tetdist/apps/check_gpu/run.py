"""Runs the checks one after the other on all processes, and waits for none of them for ever.

On each process the checks run in a thread of their own, and the main thread watches it: nothing
can interrupt a collective that waits for a process which has failed. What is found goes through a
store, not a collective, so that it is told also then. Rank 0 says when all are done with a check
and the next one may begin, or that one hangs; then all end, after rank 0 has told what was found.
"""

import collections
import contextlib
import dataclasses
import gc
import itertools
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tetdist.apps.benchmarks.bench import machine
from tetdist.apps.check_gpu import remedies
from tetdist.apps.check_gpu.check import Check, Finding, Machine, Report, Result, compared
from tetdist.distributed.meeting import SignedStore
from tetdist.distributed.world import World
from tetdist.errors import PeerFailed, sentence

BUDGET = 600.0  # seconds of all checks together
# Seconds that a process may stand at one place after another has failed: it waits for that one.
STANDSTILL = 20.0
SILENCE = 60.0  # seconds after which a process of which nothing is heard is taken for dead
_POLL = 0.05
_BEAT = 0.5  # seconds between two signs of life
_GOODBYE = 10.0  # seconds that the others have to read what rank 0 has said last


def run_checks(
    checks: dict[str, Check],
    here: Machine,
    show: Callable[[str], None] = lambda _: None,
    keep: Callable[[Report], None] = lambda _: None,
) -> Report:
    """Run checks one after the other on all processes.

    Args:
        checks: By name, in an order in which the first that fails explains those after it.
        here: What they run on.
        show: Given each result's line, on rank 0.
        keep: Given the report after each check, on rank 0.

    Returns:
        What was found. If a check ``hangs``, its thread is still there, and the process can only be
        ended by `os._exit`.

    Raises:
        PeerFailed: Rank 0 has gone, on other ranks.
    """
    report = Report(
        machine(here.device.type),
        here.device.type,
        here.world.world_size,
        here.small,
        list(checks),
    )
    end = time.monotonic() + (2 * BUDGET if here.small else BUDGET)
    with _exchange(here.world) as store:
        worker = _Worker(here)
        for name, check in checks.items():
            started = time.monotonic()
            worker.begin(check)
            one = _Round(name, store, here.world, worker)
            one.limit, one.last = min((here.limit, False), (end - started, True))
            findings, hangs = one.findings()
            findings = findings if here.small else compared(findings)
            result = Result(name, findings, time.monotonic() - started)
            report.results.append(result)
            report.not_reached.remove(name)
            report.hangs = hangs
            if here.world.rank == 0:
                show(result.line())
                keep(report)
            # Rank 0 alone knows how late it is.
            store.say(f"after {name}", time.monotonic() < end and not hangs)
            if not store.ask(f"after {name}"):
                break
        if not report.hangs:
            worker.end()
    return report


# --- the check, in a thread -----------------------------------------------------------------------


class _Worker:
    """A thread that makes one check after the other.

    Attributes:
        finding: That of the last check; None: it is not there yet.
        idle: Whether the thread, and what it had the GPU do, is done.
    """

    def __init__(self, here: Machine) -> None:
        self._here = here
        self._wanted: queue.SimpleQueue[Check | None] = queue.SimpleQueue()
        self.finding: Finding | None = None
        self.idle = True
        self._stack: object = None
        self._moved = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="checks", daemon=True)
        self._thread.start()

    def begin(self, check: Check) -> None:
        self.finding, self.idle = None, False
        self._moved = time.monotonic()
        self._wanted.put(check)

    def end(self) -> None:
        """End the thread, which must be idle."""
        self._wanted.put(None)
        self._thread.join()

    def _work(self) -> None:
        if self._here.on_gpu:
            torch.cuda.set_device(self._here.device)  # which each thread has of its own
        while (check := self._wanted.get()) is not None:
            self.finding = _finding_of(check, self._here)
            # What a failed check has begun must not go on into the next: a collective, say, that
            # the GPU waits in.
            with contextlib.suppress(RuntimeError):
                self._here.world.wait_for_device()
            if self._here.on_gpu:
                # What it has left in the GPU's memory would be missing in the next.
                gc.collect()
                torch.cuda.empty_cache()
            self.idle = True

    def place(self) -> tuple[str, float]:
        """Return the thread's place in tetdist, and the seconds since it last moved."""
        frames = [
            frame
            for frame, _ in traceback.walk_stack(sys._current_frames().get(self._thread.ident or 0))
        ]
        stack = [(frame.f_code, frame.f_lasti) for frame in frames]
        if stack != self._stack:
            self._stack, self._moved = stack, time.monotonic()
        own = str(Path(__file__).parents[2])
        for frame in frames:
            file = frame.f_code.co_filename
            if file.startswith(own) and file != __file__:
                short = Path(file).relative_to(own)
                return f"{short}, line {frame.f_lineno}", time.monotonic() - self._moved
        return "no check", time.monotonic() - self._moved


def _finding_of(check: Check, here: Machine) -> Finding:
    try:
        return check(here)
    # Some of what a check calls ends the program of which it was made.
    except (Exception, SystemExit) as error:
        lines = sentence(error).strip().splitlines() if isinstance(error, Exception) else []
        text = f"{type(error).__name__}: {lines[0] if lines else error}"
        numbers = {"traceback": traceback.format_exc()}
        return Finding("bad", text[:300], remedies.of(error), numbers)


# --- what the processes tell each other -----------------------------------------------------------


class _Exchange:
    """A store in which each process says what the others may ask for."""

    def __init__(self, store: SignedStore, rank: int) -> None:
        self._store, self._rank = store, rank

    def put(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value, default=str))

    def get(self, key: str) -> Any:
        """Return the value of a key; None: there is none."""
        text = self._store.get(key)
        return None if text is None else json.loads(text)

    def say(self, key: str, value: Any) -> None:
        """Say something to all, as rank 0; of the others nothing is heard."""
        if self._rank == 0:
            self.put(key, [value])

    def ask(self, key: str) -> Any:
        """Wait for rank 0's value of a key and return it.

        Raises:
            PeerFailed: It says nothing.
        """
        end = time.monotonic() + SILENCE
        while (said := self.get(key)) is None:
            if time.monotonic() > end:
                raise PeerFailed(f"rank 0 has said nothing for {SILENCE:.0f} s")
            time.sleep(_POLL)
        return said[0]


@contextlib.contextmanager
def _exchange(world: World) -> Iterator[_Exchange]:
    """A store of these processes, which rank 0 keeps until all have read what is in it.

    Raises:
        PeerFailed: Rank 0 has gone.
    """
    if world.world_size == 1:
        yield _Exchange(SignedStore(dist.HashStore(), ""), 0)
        return
    exchange = _Exchange(world.make_store(), world.rank)
    try:
        yield exchange
        exchange.put(f"bye {world.rank}", True)
        end = time.monotonic() + _GOODBYE
        keys = [f"bye {rank}" for rank in range(world.world_size)]
        while world.rank == 0 and None in map(exchange.get, keys) and time.monotonic() < end:
            time.sleep(_POLL)
    except dist.DistError as error:
        raise PeerFailed("rank 0 has gone, and with it what was found") from error


class _Round:
    """One check on all processes, as this one sees it.

    Attributes:
        limit: Seconds that it may take.
        last: Whether that is because the time of all checks is over then.
    """

    limit: float
    last: bool

    def __init__(self, name: str, exchange: _Exchange, world: World, worker: _Worker) -> None:
        self.name, self.exchange, self.world, self.worker = name, exchange, world, worker
        self.started = time.monotonic()
        self._beats = itertools.count()
        self._told: tuple[bool, bool] | None = None
        self._next_beat = 0.0
        # Rank 0's: the last state of each process, and when it came.
        self._heard: dict[int, tuple[dict[str, Any], float]] = {
            rank: ({}, self.started) for rank in range(world.world_size)
        }

    def findings(self) -> tuple[list[Finding], bool]:
        """The findings of all by rank, and whether the check hangs.

        Raises:
            PeerFailed: Rank 0 says nothing.
        """
        end = self.started + self.limit + SILENCE
        while True:
            self._tell()
            if self.world.rank == 0 and (verdict := self._judge()):
                findings, hangs = verdict
                made = [dataclasses.asdict(found) for found in findings]
                self.exchange.put(f"verdict {self.name}", [made, hangs])
            if (said := self.exchange.get(f"verdict {self.name}")) is not None:
                made, hangs = said
                return [Finding(**values) for values in made], hangs
            if time.monotonic() > end:
                raise PeerFailed("rank 0 does not say what was found")
            time.sleep(_POLL)

    def _tell(self) -> None:
        """Tell how far this process is: at once when that changes, and now and then."""
        where, still = self.worker.place()
        finding, idle = self.worker.finding, self.worker.idle
        state = (finding is not None, idle)
        if state == self._told and time.monotonic() < self._next_beat:
            return
        self._told, self._next_beat = state, time.monotonic() + _BEAT
        values = {
            "beat": next(self._beats),
            "finding": None if finding is None else dataclasses.asdict(finding),
            "idle": idle,
            "where": where,
            "still": still,
            "pid": os.getpid(),
        }
        self.exchange.put(f"{self.name} {self.world.rank}", values)

    def _judge(self) -> tuple[list[Finding], bool] | None:
        """Decide on rank 0 whether the check has ended, well or not; None: not yet."""
        now = time.monotonic()
        for rank, (state, _) in self._heard.items():
            new = self.exchange.get(f"{self.name} {rank}") or {}
            if new.get("beat") != state.get("beat"):
                self._heard[rank] = new, now
        states = [state for state, _ in self._heard.values()]
        found = {
            rank: Finding(**state["finding"])
            for rank, state in enumerate(states)
            if state.get("finding")
        }
        busy = [rank for rank, state in enumerate(states) if not state.get("idle")]
        if not busy:
            return list(found.values()), False
        failed = [rank for rank, one in found.items() if one.status == "bad"]
        silent = [rank for rank in busy if now - self._heard[rank][1] > SILENCE]
        stand = all(states[rank].get("still", 0) > STANDSTILL for rank in busy)
        if not silent and not (failed and stand) and now < self.started + self.limit:
            return None
        places = collections.Counter(states[rank].get("where", "") for rank in busy)
        findings = []
        for rank, state in enumerate(states):
            if rank in silent:
                text = f"nothing was heard of process {state.get('pid', '?')} for {SILENCE:.0f} s"
                findings.append(Finding("bad", text, remedies.DEAD))
            elif rank in found and (rank not in busy or rank in failed):
                findings.append(found[rank])
            elif failed or silent:
                text = f"waits for rank {(failed or silent)[0]} at {state.get('where')}"
                findings.append(Finding("left out", text))
            else:
                where = state.get("where")
                # Where most are, they wait for the one that is elsewhere.
                alone = len(places) > 1 and places[where] == min(places.values())
                text = f"not done after {now - self.started:.0f} s: it is at {where}"
                remedy = remedies.hangs(self.name)
                if self.last:
                    text = f"{text}, and the time of all checks is over"
                    remedy = f"the same command with --only {self.name}, which has more time alone"
                waits = len(places) > 1 and not alone
                findings.append(Finding("left out" if waits else "bad", text, remedy))
        return findings, True
