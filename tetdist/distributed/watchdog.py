"""A watch over the other processes of the run: are they alive and making progress?

A process that dies or hangs leaves the others waiting for it in a collective, on a GPU for ever. So
each process has a thread that reports once a second, to a store on rank 0, that it is alive and how
far it has got. Rank 0 judges the others, and they watch rank 0. When one process is missing, all
end within a bounded time, with a message that names it.
"""

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tetdist.distributed import evidence, rendezvous
from tetdist.distributed.rendezvous import CONNECTION
from tetdist.distributed.world import World
from tetdist.errors import PEER_FAILED, FailedElsewhere, Stopped, UserError
from tetdist.wording import and_more

logger = logging.getLogger(__name__)

BEAT = 1.0  # seconds between two signs of life
# Seconds of silence after which a process counts as dead: normally, and after a collective has
# failed, which usually means that a process died.
SILENCE, SILENCE_IN_TROUBLE = 30.0, 4.0

# End of a message of a run that has a checkpoint.
CONTINUES = "once the cause is gone, the same command continues from the last checkpoint"

_VERDICT, _HANGS, _TROUBLE = "verdict", "hangs", "trouble"  # keys of the store


class Watch:
    """A watch that ends this process with status `PEER_FAILED` when another dies or hangs.

    Attributes:
        where: The point that this process has reached.
        before_end: Called one after another before that with the message, to close what a killed
            process would leave open.

    Args:
        world: All processes; a run of one process is not watched.
        timeout: Seconds without progress after which a process counts as hanging.
        shows_errors: True to print errors of this process alone before the others end.
        after: End of the message: what has been saved, or how to continue.
        folder: Folder for the evidence that each process leaves of a hang.
    """

    def __init__(
        self,
        world: World,
        timeout: float,
        *,
        shows_errors: bool = True,
        after: str = "once the cause is gone, start the same command again",
        folder: Path | None = None,
    ) -> None:
        self.world, self.timeout = world, timeout
        self.shows_errors, self.after, self.folder = shows_errors, after, folder
        self.before_end: list[Callable[[str], None]] = []
        self._count, self.where, self._ended = 0, "the start", ""
        self._failed = False  # through its own error, which it prints itself
        self._closing = threading.Event()
        self._ending = threading.Event()  # a verdict has been reached; this process ends with it
        self._threads: list[threading.Thread] = []
        self._answered = time.monotonic()  # when rank 0's store last answered
        # Rank 0 keeps, per process, the last message, its arrival and the last change of its count.
        self._seen: dict[int, tuple[dict[str, Any], float, float]] = {}

    def progress(self, where: str) -> None:
        """Report progress of this process; ``where`` describes the point reached."""
        self._count += 1
        self.where = where

    def __enter__(self) -> "Watch":
        world = self.world
        if world.world_size == 1:
            return self
        # The watch has its own store, so that it never waits behind a collective that uses the
        # other one. Rank 0 makes it once all processes have joined.
        with rendezvous.limited(self.timeout, "a process is lost before the training began"):
            self._store = world.make_store()
            self._report_alive()
            dist.barrier(group=world.control)
        # Two threads, because a call to the store of a stopped process never returns.
        for target in (self._talk, self._guard):
            self._threads.append(threading.Thread(target=target, name="watch", daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if not self._threads:
            return
        alone = error is not None and not isinstance(error, Stopped | UserError | SystemExit)
        alone = alone and self.shows_errors
        if error is not None and alone:
            self._report(error)
        self._closing.set()
        for thread in self._threads:
            thread.join(5 * BEAT)
        if error is None or isinstance(error, Stopped | FailedElsewhere):
            self._ended = "well"
        else:
            self._ended = " ".join(str(error).split())[:300] or type(error).__name__
        with contextlib.suppress(dist.DistError, RuntimeError):
            self._report_alive()
            if self.world.rank == 0 and not alone and self._ended != "well":
                self._store.set(_VERDICT, f"rank 0 has ended ({self._ended!r})")
                self._wait_for_the_others()
        if alone:
            raise SystemExit(1)  # the traceback has been printed

    def _report(self, error: BaseException) -> None:
        """Report an error of this process to the others, or learn that one of theirs caused it."""
        self.await_verdict(error)
        text = _in_one_line(error)
        # Print this error before the others' messages.
        traceback.print_exception(error)
        self._failed = True
        with contextlib.suppress(dist.DistError, RuntimeError):
            self._store.set(_VERDICT, f"rank {self.world.rank} has failed ({text!r})")
            # Give the others time to read it: the store may end with this process.
            self._closing.wait(3 * BEAT)

    def _wait_for_the_others(self) -> None:
        """Give the others time to read a verdict, since the store ends with this process."""
        end, others = time.monotonic() + 3 * BEAT, range(1, self.world.world_size)
        while time.monotonic() < end:
            if all(json.loads(self._store.get(str(rank)) or "{}").get("ended") for rank in others):
                return
            time.sleep(0.1)

    def await_verdict(self, error: BaseException) -> None:
        """Wait briefly for the watch to name the lost process, if that may have caused ``error``.

        A collective's own error names only a connection. With a verdict this process ends, and the
        call does not return.
        """
        text = _in_one_line(error)
        if not self._threads or isinstance(error, UserError) or not CONNECTION.search(text):
            return
        with contextlib.suppress(dist.DistError, RuntimeError):
            self._store.set(_TROUBLE, text)
        # A silent rank 0 leads to a verdict, too; its store may be gone, which makes the line above
        # fail.
        if self._ending.wait(SILENCE_IN_TROUBLE + 6 * BEAT):
            # The thread with the verdict ends the process, perhaps after waiting for the launcher.
            threading.Event().wait()

    # --- in the threads -----------------------------------------------------------------------

    def _talk(self) -> None:
        while not self._closing.wait(BEAT):
            try:
                self._report_alive()
                if self.world.rank == 0 and (verdict := self._judge()):
                    self._store.set(_VERDICT, verdict)
                if (verdict := self._store.get(_VERDICT)) and not self._failed:
                    self._end(verdict, shown_by_rank_0=True, hangs=bool(self._store.get(_HANGS)))
                self._answered = time.monotonic()
            except (dist.DistError, RuntimeError) as error:
                # The store ended with rank 0; if rank 0 ended normally, this process soon will.
                if not self._closing.wait(5 * BEAT):
                    logger.debug("the store of rank 0: %s", error)
                    self._end("rank 0 has died or cannot be reached")

    def _guard(self) -> None:
        while not self._closing.wait(BEAT):
            silent = time.monotonic() - self._answered
            if silent > min(SILENCE, self.timeout):
                self._end(f"rank 0 has stopped or cannot be reached: no answer for {silent:.0f} s")

    def _report_alive(self) -> None:
        message = {
            "count": self._count,
            "where": self.where,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
            "ended": self._ended,
        }
        self._store.set(str(self.world.rank), json.dumps(message))

    def _judge(self) -> str | None:
        """Check all processes; return what is wrong, or None."""
        now = time.monotonic()
        for rank in range(self.world.world_size):
            if (text := self._store.get(str(rank))) is None:
                continue  # written by a program without the secret
            message = json.loads(text)
            old, heard, moved = self._seen.get(rank, (None, now, now))
            if old is None or message["time"] != old["time"]:
                heard = now
            if old is None or message["count"] != old["count"]:
                moved = now
            self._seen[rank] = message, heard, moved
        silence = SILENCE_IN_TROUBLE if self._store.get(_TROUBLE) else SILENCE
        silence = min(silence, self.timeout)
        present = {rank: seen for rank, seen in self._seen.items() if not seen[0]["ended"]}
        for rank, (message, heard, _) in self._seen.items():
            # A mistake made by all ends all of them at once and need not be reported.
            late = present and now - heard > SILENCE_IN_TROUBLE
            if message["ended"] not in ("", "well") and late:
                return f"rank {rank} has ended ({message['ended']!r})"
        for rank, (message, heard, _) in present.items():
            if now - heard > silence:
                return (
                    f"rank {rank} (process {message['pid']} on {message['host']}) has died or is "
                    f"cut off: nothing was heard of it for {now - heard:.0f} s, since "
                    f"{message['where']}"
                )
        if all(now - moved > self.timeout for _, _, moved in present.values()):
            least = min(message["count"] for message, _, _ in present.values())
            behind = [rank for rank, seen in present.items() if seen[0]["count"] == least]
            names = ", ".join(
                f"rank {rank} (process {present[rank][0]['pid']} on {present[rank][0]['host']})"
                for rank in behind[:4]
            )
            others = ", and the others wait" if len(behind) < len(present) else ""
            left = f"; {self.folder} shows where each process is" if self.folder else ""
            self._store.set(_HANGS, "all processes live")
            return (
                f"no progress for {self.timeout:.0f} s: {names}{and_more(behind, 4)} hangs at "
                f"{present[behind[0]][0]['where']}{others}; peer_timeout=SECONDS allows for more"
                f"{left}"
            )
        return None

    def _end(self, verdict: str, *, shown_by_rank_0: bool = False, hangs: bool = False) -> None:
        if self._ending.is_set():
            return  # the other thread is ending the process
        self._ending.set()
        try:
            if self.world.rank == 0 or not shown_by_rank_0:
                prefix = "" if self.world.rank == 0 else f"rank {self.world.rank}: "
                print(
                    f"{prefix}error: {verdict}. All processes end; {self.after}",
                    file=sys.stderr,
                    flush=True,
                )
            if hangs and self.folder:
                evidence.leave(self.folder, self.world.rank)
            if hangs or self.world.rank == 0:
                # Give the others time to read it, since the store ends with rank 0, and to leave
                # evidence, since a launcher ends all when it sees that one has ended.
                time.sleep(3 * BEAT)
            for action in self.before_end:
                with contextlib.suppress(Exception):
                    action(verdict)
            sys.stdout.flush()
        finally:
            # The main thread waits in a collective, or for this thread, and cannot be interrupted.
            os._exit(PEER_FAILED)


def _in_one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
