"""The record of a run: its metrics file, and the trackers that read the file.

`metrics.jsonl` in the run folder is the source of truth; the training loop only appends lines.
MLflow and other trackers get the file's lines, each in a thread. A tracker that is slow, down or
new gets the missing lines whenever it answers, in this process or a later one.
"""

import importlib.util
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tetdist.errors import UserError, pip_install, way_out, without_passwords
from tetdist.tracking.metrics_file import keep_until, strict
from tetdist.tracking.mlflow_logger import Destination, MLflow
from tetdist.tracking.trackers import TRACKERS, Status, TrackedRun, TrackerThread


class Tracker:
    """The record of what a run measures; one per run, on rank 0."""

    def __init__(
        self, run: TrackedRun, destination: Destination | None, trackers: Sequence[str] = ()
    ) -> None:
        """Open the run's file; `begin`, a line or the end starts its trackers.

        Args:
            run: The run. MLflow does not let parameters of an earlier start change, only tags.
                Metrics after ``resume_step`` are removed, because those steps are computed again.
            trackers: Names in `TRACKERS` of trackers besides MLflow.
        """
        self.path = run.folder / "metrics.jsonl"
        self._resume_step = run.resume_step
        self.is_complete = False  # True if all trackers had everything at the end
        self._last: dict[str, int] = {}
        if run.resume_step is not None:
            self._last = keep_until(self.path, run.resume_step)
        elif self.path.exists():
            raise UserError(
                f"{self.path} belongs to an earlier run; resume that run, or give this one another "
                "name=..."
            )
        if destination is not None and importlib.util.find_spec("mlflow") is None:
            raise UserError(
                f"MLflow is not installed; {pip_install('train,cuda130')}, or train without it: "
                "tracking.mlflow=false"
            )
        # Unbuffered: when log() returns, the operating system has the line, which survives a kill.
        self._file = self.path.open("xb" if run.resume_step is None else "ab", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)
        self._mlflow = None if destination is None else MLflow(destination, run)
        self._threads: list[TrackerThread] = []
        if self._mlflow is not None:
            name = f"MLflow at {without_passwords(self._mlflow.destination.uri)}"
            self._threads.append(TrackerThread(name, self._mlflow, self.path, run))
        self._threads += [TrackerThread(name, TRACKERS[name], self.path, run) for name in trackers]

    def begin(self) -> None:
        """Start the trackers: after the first step, which their imports would slow down."""
        for thread in self._threads:
            thread.begun.set()

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line, without waiting for trackers.

        A line that the file already holds from before a resume is not written again: a run killed
        between its checkpoint and its last line of that step computes the same line anew.

        Args:
            kind: "train", "val", ...; each kind's steps must increase.
            step: The optimiser step.
            values: Numbers, text, None, lists of numbers and dicts of numbers, by name.

        Raises:
            UserError: The line cannot be written (disk full); the file keeps whole lines.
        """
        assert not self._file.closed, "log() after close()"
        assert kind.isidentifier(), kind
        assert not values.keys() & {"kind", "step", "time"}, values.keys()
        last = self._last.get(kind, -1)
        if step == last == self._resume_step:
            return
        assert step > last, f"{kind}: step {step} after step {last}"
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        raw = json.dumps(strict(line), allow_nan=False).encode() + b"\n"
        try:
            written = 0
            while written < len(raw):
                written += self._file.write(raw[written:])
        except OSError as error:
            with suppress(OSError):  # it may have become read-only
                os.ftruncate(self._file.fileno(), self._size)
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; {way_out(error)}"
            ) from error
        self._size += len(raw)
        self.begin()
        self._last[kind] = step

    def sync(self) -> None:
        """Force the file to the disk.

        Call it before writing a checkpoint, so that after a power cut the checkpoint does not have
        more steps than the file.
        """
        os.fsync(self._file.fileno())

    def artifact(self, path: Path) -> None:
        """Copy a file to MLflow, under its path relative to the run folder.

        The file is read later, when it is sent, so replace it only by renaming. Call this again
        after a change.
        """
        if self._mlflow is not None:
            artifacts = self._mlflow.artifacts
            artifacts[path] = artifacts.get(path, 0) + 1

    def set_tag(self, key: str, value: str) -> None:
        """Set a tag of the run in MLflow."""
        if self._mlflow is not None:
            self._mlflow.tags[key] = value

    def close(self, status: Status, timeout: float = 30) -> None:
        """End the record and wait until all trackers have all of it.

        Args:
            status: The run's new state. "RUNNING" is for a run that continues in another process.
        """
        self._file.close()
        complete = [thread.close(status, timeout) for thread in self._threads]
        self.is_complete = all(complete)
