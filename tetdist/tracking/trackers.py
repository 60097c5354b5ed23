"""Trackers, MLflow among them: they follow metrics.jsonl, each in a thread.

A tracker is a class that is made with a `TrackedRun`, takes lines, and is closed; docs/extending.md
has one. What it raises is said once and ends no training: the lines are tried again, and those that
are left when the run ends are given to it when the run is opened again. So a line may come twice
after a kill, and is then the same to the bit. A tracker that knows better what it has already, as
those of this folder do, is given the whole file at each start instead.
"""

import importlib.util
import itertools
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
LINES = 1000  # the most that a tracker is given at once


@dataclass(frozen=True)
class Dataset:
    """A split of the data, as MLflow's pages show it.

    Attributes:
        name: Of the split and the data.
        digest: Tells its content, in at most 36 characters.
        source: Where it is.
        context: "training" or "validation".
        profile: Sizes, by name.
    """

    name: str
    digest: str
    source: str
    context: str
    profile: Mapping[str, int]


@dataclass(frozen=True)
class TrackedRun:
    """The run that is followed.

    Attributes:
        folder: Its folder, which exists.
        name: Its name.
        params: The resolved configuration, flattened to dotted keys.
        tags: What else is known of it, such as the commit.
        resume_step: The step from which it goes on; None: it is new. Lines of later steps that were
            given before are computed and given again.
        phases: The configuration of each phase, flattened, with its `timesteps`. If there are
            several, MLflow shows each as a run below the run.
        datasets: What the run is trained and evaluated on.
        note: A description in Markdown.
    """

    folder: Path
    name: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    resume_step: int | None
    phases: Sequence[Mapping[str, Any]] = ()
    datasets: Sequence[Dataset] = ()
    note: str | None = None


class OwnTracker(Protocol):
    """The interface of a tracker, which is made with a `TrackedRun`.

    What is registered may have three attributes more:

    * ``check``: called with nothing before the run begins; raises a `UserError` where the tracker
      could not do its work, as without its package.
    * ``from_first_line = True``: at each start, and after each error, it is made anew and given the
      file from its first line on.
    * ``show``, of the tracker that is made: called with nothing after each look at the file.
    """

    def log(self, lines: list[dict[str, Any]]) -> None:
        """Take lines of metrics.jsonl, in order; values that are not finite are floats."""

    def close(self, status: Status) -> None:
        """End with ``FINISHED``, ``FAILED``, ``KILLED``, or ``RUNNING``: it goes on elsewhere."""


MakesTracker = Callable[[TrackedRun], OwnTracker]
TRACKERS: Registry[MakesTracker] = Registry("tracker", "tracking.trackers")


def check_names(names: Iterable[str]) -> None:
    """See that there are trackers of these names, whether or not they can be used here.

    Raises:
        UserError: There is none of one of them.
    """
    for name in names:
        if name == "mlflow" and name not in TRACKERS:
            raise UserError(
                "tracking.trackers: MLflow is none of these but tracking.mlflow, which is true "
                "unless it is set to false; leave mlflow out"
            )
        TRACKERS.find(name, "tracking.trackers")


def check_tracker(name: str) -> None:
    """See that there is a tracker of a name, and that it can be used here.

    Raises:
        UserError: There is none, or it cannot.
    """
    check = getattr(TRACKERS[name], "check", None)
    if check is not None:
        check()


def require_package(tracker: str, package: str) -> None:
    """See that a tracker's package is installed; it is not imported.

    Raises:
        UserError: It is not; the text says how to install it.
    """
    if importlib.util.find_spec(package) is None:
        missing = sentence(ModuleNotFoundError(name=package))
        raise UserError(f"tracking.trackers: {tracker}: {missing}, or leave {tracker} out")


class Following:
    """A thread that keeps a tracker level with metrics.jsonl, and tries again after an error.

    Args:
        name: The tracker's name in messages, and of its mark.
        make: What makes the tracker.
        file: metrics.jsonl, of this run up to ``run.resume_step``.
        run: What the tracker is told of it.
    """

    def __init__(self, name: str, make: MakesTracker, file: Path, run: TrackedRun) -> None:
        self.name, self._make, self._file, self._run = name, make, file, run
        self._from_first_line: bool = getattr(make, "from_first_line", False)
        # How far another one got in an earlier start, in bytes of the file.
        self._mark = run.folder / "trackers" / f"{name}.json"
        self._tracker: OwnTracker | None = None
        self._offset = 0
        goes_on = run.resume_step is not None and not self._from_first_line
        if goes_on and self._mark.is_file():
            self._offset = _line_start(file, json.loads(self._mark.read_text())["bytes"])
        self.sent = self._offset  # the furthest that it ever was
        self.trouble = ""
        self._is_complete = False
        self._closing = threading.Event()
        self._status: Status = "RUNNING"
        self._thread = threading.Thread(target=self._follow, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        failures = 0
        while True:
            # It is asked before sending, so that what was logged before close() is surely sent
            # before the tracker is closed.
            closing = self._closing.is_set()
            try:
                self._send()
                if closing and self._tracker is not None:
                    self._tracker.close(self._status)
            except Exception as error:
                failures += 1
                self.trouble = f"{type(error).__name__}: {first_line(error)}"
                # One failure is often two jobs that open the same database; it passes.
                if failures == 2:
                    logger.warning(
                        "tracker %s: %s. Training goes on, %s has everything, and the tracker is "
                        "sent it as soon as it answers again",
                        self.name,
                        self.trouble,
                        self._file,
                    )
                if self._from_first_line:
                    self._tracker, self._offset = None, 0
                if closing and failures >= 3:
                    return
            else:
                if failures >= 2:
                    logger.info("tracker %s is back and has everything", self.name)
                failures, self.trouble = 0, ""
                if closing:
                    self._is_complete = True
                    return
            if closing:
                time.sleep(0.3)
            else:
                self._closing.wait(SEND_EVERY * 2 ** min(failures, 5))  # at most about a minute

    def _send(self) -> None:
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
        if (show := getattr(self._tracker, "show", None)) is not None:
            show()

    def close(self, status: Status, timeout: float) -> bool:
        """Let the tracker take what is left, and end it.

        Args:
            status: The run's state from now on.
            timeout: Seconds after which it is left behind.

        Returns:
            Whether it has everything.
        """
        self._status = status
        self._closing.set()
        self._thread.join(timeout)
        if not self._is_complete:
            data = self._file.read_bytes()
            logger.warning(
                "tracker %s has not taken everything (%s): it lacks up to %d of the %d points in "
                "%s. It gets them when this run is started again and it answers",
                self.name,
                self.trouble or f"no answer within {timeout:g} s",
                data.count(b"\n", self.sent),
                data.count(b"\n"),
                self._file,
            )
        return self._is_complete


def first_line(error: Exception) -> str:
    """The first line of what was raised, without passwords."""
    text = str(error).strip() or type(error).__name__
    # The reason of a refused connection is at the end of a long line, the request at its start.
    reason = re.search(r"Caused by \w+\((.*?)\)*$", text.splitlines()[0])
    return without_passwords((reason[1] if reason else text.splitlines()[0]).strip("\"'"))[:300]


def _line_start(file: Path, offset: int) -> int:
    """Return the offset at which to continue in a file that was read up to ``offset``; 0 if the
    file was changed, so that a line is given twice rather than torn."""
    offset = min(offset, file.stat().st_size)
    with file.open("rb") as stream:
        stream.seek(max(offset - 1, 0))
        return offset if stream.read(1) == b"\n" else 0
