"""Trackers, such as MLflow: each gets the lines of metrics.jsonl in a thread.

A tracker is a class that is made with a `TrackedRun`, takes lines, and is closed; see the example
in docs/extending.md. Its exceptions are logged once and never end training: lines are retried, and
lines left at the run's end are sent when the run is opened again. So after a kill an identical line
may come twice. A tracker that can query what it has already, as those of this folder do, gets the
whole file at each start instead.
"""

import importlib.util
import itertools
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from tetdist.errors import UserError, sentence, without_passwords
from tetdist.plugins import Registry
from tetdist.storage.files import replacing
from tetdist.tracking.metrics_file import lines_of

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED", "RUNNING"]

SEND_EVERY = 2.0  # seconds; a call to MLflow costs about the same for one point as for a hundred
LINES = 1000  # largest number of lines per call of a tracker


@dataclass(frozen=True)
class TrackedRun:
    """The run that trackers record.

    Attributes:
        folder: The run's existing folder.
        params: The resolved configuration, flattened to dotted keys.
        resume_step: Step at which the run resumes; None: it is new. Later steps are computed and
            sent again.
        note: A description in Markdown.
        finished: True if nothing is left to do, except to send what a tracker lacks.
    """

    folder: Path
    name: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    resume_step: int | None
    note: str | None = None
    finished: bool = False


class OwnTracker(Protocol):
    """The interface of a tracker, which is made with a `TrackedRun`.

    It may have three more attributes:

    * ``check``: class attribute, called without arguments before the run begins; raises a
      `UserError` if the tracker cannot work, for example without its package.
    * ``from_first_line = True``: class attribute; at each start, and after each error, the tracker
      is made anew and gets the file from its first line on.
    * ``show``: method, called without arguments after each reading of the file before the end.
    """

    def log(self, lines: list[dict[str, Any]]) -> None:
        """Take lines of metrics.jsonl, in order; non-finite values are floats."""

    def close(self, status: Status) -> None:
        """End with ``FINISHED``, ``FAILED``, ``KILLED``, or ``RUNNING`` if it continues later."""


MakesTracker = Callable[[TrackedRun], OwnTracker]
TRACKERS: Registry[MakesTracker] = Registry("tracker", "tracking.trackers")


def check_names(names: Iterable[str]) -> None:
    """Check that trackers of these names exist, even if they cannot be used here."""
    for name in names:
        if name == "mlflow":
            raise UserError("tracking.trackers: leave out mlflow, which tracking.mlflow turns on")
        TRACKERS[name]


def check_tracker(name: str) -> None:
    """Check that a tracker exists and can be used here."""
    check = getattr(TRACKERS[name], "check", None)
    if check is not None:
        check()


def require_package(tracker: str, package: str) -> None:
    """Check that a tracker's package is installed, without importing it."""
    if importlib.util.find_spec(package) is None:
        missing = sentence(ModuleNotFoundError(name=package))
        raise UserError(f"tracking.trackers: {tracker}: {missing}, or leave {tracker} out")


class TrackerThread:
    """A thread that sends a tracker the lines of metrics.jsonl, and retries after an error.

    Args:
        file: metrics.jsonl, of this run up to ``run.resume_step``.
        run: The run, as the tracker gets it.
    """

    def __init__(self, name: str, make: MakesTracker, file: Path, run: TrackedRun) -> None:
        self.name, self._make, self._file, self._run = name, make, file, run
        self._from_first_line: bool = getattr(make, "from_first_line", False)
        # Holds the position of an earlier start, in bytes of the file.
        self._mark = run.folder / "trackers" / f"{name}.json"
        self._tracker: OwnTracker | None = None
        self._offset = 0
        goes_on = run.resume_step is not None and not self._from_first_line
        if goes_on and self._mark.is_file():
            self._offset = min(json.loads(self._mark.read_text())["bytes"], file.stat().st_size)
        self.sent = self._offset  # the furthest position so far
        self.trouble, self._remedy = "", "when the tracker answers"
        self._is_complete = False
        self.begun, self._closing = threading.Event(), threading.Event()
        self._status: Status = "RUNNING"
        self._thread = threading.Thread(target=self._run_loop, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def _run_loop(self) -> None:
        self.begun.wait()  # the tracker may import a large package, such as MLflow
        failures = 0
        while True:
            # Read before sending, so that lines logged before close() are sent before closing.
            closing = self._closing.is_set()
            try:
                tracker = self._send()
                if closing:
                    tracker.close(self._status)
                elif (show := getattr(tracker, "show", None)) is not None:
                    show()
            except Exception as error:
                failures += 1
                self.trouble = f"{type(error).__name__}: {first_line(error)}"
                if isinstance(error, ImportError):
                    self._remedy = "after an upgrade of its package"
                # A single failure is often temporary: two jobs opened the same database.
                if failures == 2:
                    logger.warning(
                        "tracker %s failed: %s. Training continues; %s has everything, and the "
                        "tracker gets it %s",
                        self.name,
                        self.trouble,
                        self._file,
                        self._remedy,
                    )
                if self._from_first_line:
                    self._tracker, self._offset = None, 0
                if closing and failures >= 3:
                    return
            else:
                if failures >= 2:
                    logger.info("tracker %s answers again and has everything", self.name)
                failures, self.trouble = 0, ""
                if closing:
                    self._is_complete = True
                    return
            if closing:
                time.sleep(0.3)
            else:
                self._closing.wait(SEND_EVERY * 2 ** min(failures, 5))  # at most about a minute

    def _send(self) -> OwnTracker:
        """Send the tracker all new lines of the file."""
        if self._tracker is None:
            self._tracker = self._make(self._run)
        lines = lines_of(self._file, self._offset)
        while some := list(itertools.islice(lines, LINES)):
            self._tracker.log([line for _, line in some])
            self._offset = some[-1][0]
            self.sent = max(self.sent, self._offset)
            if not self._from_first_line:
                self._mark.parent.mkdir(exist_ok=True)
                with replacing(self._mark, sync=False) as stream:
                    stream.write(json.dumps({"bytes": self._offset}).encode())
        return self._tracker

    def close(self, status: Status, timeout: float) -> bool:
        """Send the remaining lines to the tracker, and close it.

        Returns:
            True if it has everything.
        """
        self._status = status
        self._closing.set()
        self.begun.set()
        self._thread.join(timeout)
        if not self._is_complete:
            data = self._file.read_bytes()
            logger.warning(
                "tracker %s lacks up to %d of the %d lines in %s (%s). To send them, start this "
                "run again %s",
                self.name,
                data.count(b"\n", self.sent),
                data.count(b"\n"),
                self._file,
                self.trouble or f"no answer within {timeout:g} s",
                self._remedy,
            )
        return self._is_complete


def first_line(error: Exception) -> str:
    """Return the first line of an exception's text, without passwords."""
    text = str(error).strip() or type(error).__name__
    # The reason of a refused connection is at the end of a long line.
    reason = re.search(r"Caused by \w+\((.*?)\)*$", text.splitlines()[0])
    return without_passwords((reason[1] if reason else text.splitlines()[0]).strip("\"'"))[:300]
