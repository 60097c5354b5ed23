"""Run the checks in order on all processes, as long as each makes progress.

On each process a check runs in a thread that the main thread watches, because a collective that
waits for a failed process cannot be interrupted. Findings go through a store, not a collective, so
they are reported even then. Rank 0 decides that all have finished a check and the next one starts,
or that one hangs; then rank 0 reports the findings and all exit. A check hangs if its thread stays
at one place: on a busy machine it is slow, but moves. When a process dies, the `Watch` of every
command ends the others.
"""

import collections
import contextlib
import dataclasses
import gc
import json
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tetdist.apps.benchmarks.bench import machine
from tetdist.apps.check_gpu import remedies
from tetdist.apps.check_gpu.check import Check, Finding, Machine, Report, Result, Status, compared
from tetdist.distributed.meeting import SignedStore
from tetdist.distributed.watchdog import Watch
from tetdist.errors import sentence

BUDGET = 600.0  # seconds of all checks together
# Seconds without progress, after another process failed, that mean waiting for that process.
STANDSTILL = 20.0
_POLL = 0.1
_GOODBYE = 10.0  # seconds for the others to read the last verdict


def run_checks(
    checks: dict[str, Check],
    here: Machine,
    show: Callable[[Report], None] = lambda _: None,
) -> Report:
    """Run checks in order on all processes.

    When a process dies, the others end with status `PEER_FAILED`, after rank 0 has shown and kept
    this as a finding.

    Args:
        checks: Checks by name, ordered so that the first failure explains later ones.
        show: Called with the report after each check, on rank 0.

    Returns:
        The findings. If a check ``hangs``, its thread still runs, and only `os._exit` can end the
        process.
    """
    world, device = here.world, here.device.type
    report = Report(machine(device), device, world.world_size, here.small, list(checks))
    end = time.monotonic() + (2 * BUDGET if here.small else BUDGET)

    def add(name: str, findings: list[Finding], seconds: float = 0.0) -> None:
        report.results.append(Result(name, findings, seconds))
        report.not_reached.remove(name)
        if world.rank == 0:
            show(report)

    def add_death(what: str) -> None:
        # The watch exits the process, so `on` cannot clean up; a check may still be writing.
        shutil.rmtree(here.folder, ignore_errors=True)
        add(report.not_reached[0], [Finding("bad", what, remedies.DEAD)])

    after = "the findings so far are kept"
    # The command itself shows an error that only this process raises.
    with Watch(world, here.limit, shows_errors=False, after=after) as watch:
        watch.before_end.append(add_death)
        alone = world.world_size == 1
        store = SignedStore(dist.HashStore(), "") if alone else world.make_store()
        try:
            for name, check in checks.items():
                started = time.monotonic()
                one = _Round(name, check, here, store, end)
                while (verdict := store.get(f"verdict {name}")) is None:
                    watch.progress(f"the check {name}")
                    one.take_turn()
                    time.sleep(_POLL)
                made, report.hangs, goes_on = json.loads(verdict)
                findings = [Finding(**values) for values in made]
                findings = findings if here.small else compared(findings)
                add(name, findings, time.monotonic() - started)
                if not goes_on:
                    break
            store.set(f"bye {world.rank}", "")
            # Rank 0 keeps the store until all have read the last verdict.
            byes = [f"bye {rank}" for rank in range(world.world_size)]
            closing = time.monotonic() + (_GOODBYE if world.rank == 0 else 0.0)
            while time.monotonic() < closing and None in map(store.get, byes):
                time.sleep(_POLL)
        except RuntimeError as error:
            watch.await_verdict(error)  # does not return if rank 0 and its store are gone
            raise
    return report


class _Task(threading.Thread):
    """Check in a thread.

    Attributes:
        finding: Its finding, once it has one. The thread may still run then, because operations of
            a failed check, such as a collective, must not continue into the next check.
    """

    def __init__(self, check: Check, here: Machine) -> None:
        super().__init__(name="check", daemon=True)
        self._check, self._here = check, here
        self.finding: Finding | None = None
        self._stack: object = None
        self._moved = time.monotonic()

    def run(self) -> None:
        if self._here.on_gpu:
            torch.cuda.set_device(self._here.device)  # each thread has its own setting
        self.finding = _finding_of(self._check, self._here)
        with contextlib.suppress(RuntimeError):
            self._here.world.wait_for_device()
        if self._here.on_gpu:
            # Free the GPU's memory for the next check.
            gc.collect()
            torch.cuda.empty_cache()

    def state(self) -> dict[str, Any]:
        """Return, for JSON, the finding, whether the thread is busy, and where it stands."""
        # Read in this order: a thread that has ended has its finding.
        busy, finding = self.is_alive(), self.finding
        where, still = self._place()
        made = None if finding is None else dataclasses.asdict(finding)
        return {"busy": busy, "finding": made, "where": where, "still": still}

    def _place(self) -> tuple[str, float]:
        """Return the thread's place in tetdist, and the seconds since it last moved."""
        own = sys._current_frames().get(self.ident or 0)
        frames = [frame for frame, _ in traceback.walk_stack(own)]
        stack = [(frame.f_code, frame.f_lasti) for frame in frames]
        if stack != self._stack:
            self._stack, self._moved = stack, time.monotonic()
        package = Path(__file__).parents[2]
        for frame in frames:
            file = Path(frame.f_code.co_filename)
            if file.is_relative_to(package) and file != Path(__file__):
                place = f"{file.relative_to(package)}, line {frame.f_lineno}"
                return place, time.monotonic() - self._moved
        return "no check", time.monotonic() - self._moved


def _finding_of(check: Check, here: Machine) -> Finding:
    try:
        return check(here)
    # Some functions that checks call exit the program.
    except (Exception, SystemExit) as error:
        lines = sentence(error).strip().splitlines() if isinstance(error, Exception) else []
        text = f"{type(error).__name__}: {lines[0] if lines else error}"
        numbers = {"traceback": traceback.format_exc()}
        return Finding("bad", text[:300], remedies.of(error), numbers)


class _Round:
    """Check on all processes, as this process sees it."""

    def __init__(
        self, name: str, check: Check, here: Machine, store: SignedStore, end: float
    ) -> None:
        self.name, self.world, self.store, self.end = name, here.world, store, end
        self.limit, self.started = here.limit, time.monotonic()
        self.task = _Task(check, here)
        self.task.start()

    def take_turn(self) -> None:
        """Publish this process's state and, on rank 0, the verdict once the check has ended."""
        state = json.dumps(self.task.state(), default=str)
        self.store.set(f"{self.name} {self.world.rank}", state)
        if self.world.rank == 0 and (verdict := self._judge()) is not None:
            findings, hangs = verdict
            goes_on = not hangs and time.monotonic() < self.end
            made = [dataclasses.asdict(found) for found in findings]
            verdict_text = json.dumps([made, hangs, goes_on], default=str)
            self.store.set(f"verdict {self.name}", verdict_text)

    def _judge(self) -> tuple[list[Finding], bool] | None:
        """Decide whether the check has ended, with findings by rank, or hangs; None: not yet."""
        texts = [self.store.get(f"{self.name} {rank}") for rank in range(self.world.world_size)]
        states: list[dict[str, Any]]
        states = [json.loads(text) if text else {"busy": True} for text in texts]
        found = {
            rank: Finding(**state["finding"])
            for rank, state in enumerate(states)
            if state.get("finding")
        }
        busy = [rank for rank, state in enumerate(states) if state["busy"]]
        if not busy:
            return list(found.values()), False
        failed = [rank for rank, one in found.items() if one.status == "bad"]
        still = min(states[rank].get("still", 0) for rank in busy)
        if still < (STANDSTILL if failed else self.limit) and time.monotonic() < self.end:
            return None
        places = collections.Counter(states[rank].get("where", "") for rank in busy)
        findings = []
        for rank, state in enumerate(states):
            where = state.get("where", "")
            if rank in found and (rank not in busy or rank in failed):
                findings.append(found[rank])
            elif failed:
                findings.append(Finding("left out", f"waits for rank {failed[0]} at {where}"))
            else:
                # The processes at the most common place wait for the others.
                waits = places[where] > min(places.values())
                findings.append(self._late("left out" if waits else "bad", where, still))
        return findings, True

    def _late(self, status: Status, where: str, still: float) -> Finding:
        seconds = time.monotonic() - self.started
        if still < self.limit:
            text = f"not finished after {seconds:.0f} s, the time for all checks: it is at {where}"
            return Finding(status, text, remedies.slow(self.name))
        text = f"stands still since {still:.0f} s at {where}"
        return Finding(status, text, remedies.hangs(self.name, self.world.world_size))
