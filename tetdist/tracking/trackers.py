"""Trackers beside MLflow: they follow metrics.jsonl as MLflow's does, each in a thread.

A tracker is a class that is made with a `TrackedRun`, takes lines, and is closed; docs/extending.md
has one. What it raises is said once and ends no training: the lines are tried again, and those that
are left when the run ends are given to it when the run is opened again. So a line may come twice
after a kill, and is then the same to the bit. A tracker that knows better what it has already, as
TensorBoard's and W&B's do, is given the whole file at each start instead.
"""

import importlib.util
import json
import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tetdist.errors import UserError, sentence
from tetdist.plugins import Registry
from tetdist.storage.files import replacing
from tetdist.tracking.metrics_file import read_from

logger = logging.getLogger(__name__)

LOOK_EVERY = 2.0  # seconds


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
    """

    folder: Path
    name: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    resume_step: int | None


class OwnTracker(Protocol):
    """The interface of a tracker, which is made with a `TrackedRun`.

    What is registered may have two attributes more:

    * ``check``: called with nothing before the run begins; raises a `UserError` where the tracker
      could not do its work, as without its package.
    * ``from_first_line = True``: at each start, and after each error, it is made anew and given the
      file from its first line on.
    """

    def log(self, lines: list[dict[str, Any]]) -> None:
        """Take lines of metrics.jsonl, in order; values that are not finite are floats."""

    def close(self, status: str) -> None:
        """End with ``FINISHED``, ``FAILED``, ``KILLED``, or ``RUNNING``: it goes on elsewhere."""


class MakesTracker(Protocol):
    def __call__(self, run: TrackedRun) -> OwnTracker: ...


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


def _line_start(file: Path, offset: int) -> int:
    """Return the offset at which to continue in a file that was read up to ``offset``; 0 if the
    file was changed, so that a line is given twice rather than torn."""
    data = file.read_bytes()
    offset = min(offset, len(data))
    return offset if data[:offset].endswith(b"\n") else 0


class Following:
    """One tracker and its thread.

    Args:
        name: In `TRACKERS`.
        file: metrics.jsonl, of this run up to ``run.resume_step``.
        run: What the tracker is told of it.

    Raises:
        UserError: There is no tracker of that name.
    """

    def __init__(self, name: str, file: Path, run: TrackedRun) -> None:
        self.name, self._file, self._run = name, file, run
        self._make = TRACKERS[name]
        self._from_first_line: bool = getattr(self._make, "from_first_line", False)
        # How far another one got in an earlier start, in bytes of the file.
        self._mark = run.folder / "trackers" / f"{name}.json"
        self._tracker: OwnTracker | None = None
        self._trouble = ""
        self._closing = threading.Event()
        self._status = ""
        self._offset = 0
        goes_on = run.resume_step is not None and not self._from_first_line
        if goes_on and self._mark.is_file():
            self._offset = _line_start(file, json.loads(self._mark.read_text())["bytes"])
        self._thread = threading.Thread(target=self._follow, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while True:
            closing = self._closing.is_set()
            try:
                self._send()
                if closing and self._tracker is not None:
                    self._tracker.close(self._status)
                self._trouble = ""
            except Exception as error:
                if not self._trouble:
                    logger.warning(
                        "tracker %s: %s: %s. Training goes on, and %s has everything",
                        self.name,
                        type(error).__name__,
                        error,
                        self._file,
                    )
                self._trouble = str(error) or type(error).__name__
                if self._from_first_line:
                    self._tracker, self._offset = None, 0
            if closing:
                return
            self._closing.wait(LOOK_EVERY)

    def _send(self) -> None:
        if self._tracker is None:
            self._tracker = self._make(self._run)
        lines, offset = read_from(self._file, self._offset)
        if not lines:
            return
        self._tracker.log(lines)
        self._offset = offset
        if self._from_first_line:
            return
        self._mark.parent.mkdir(exist_ok=True)
        with replacing(self._mark, sync=False) as stream:
            stream.write(json.dumps({"bytes": offset}).encode())

    def close(self, status: str, timeout: float) -> None:
        """Let the tracker take what is left, and end it; ``timeout`` in seconds."""
        self._status = status
        self._closing.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.warning("tracker %s did not end in %g s and is left behind", self.name, timeout)
