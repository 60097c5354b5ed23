"""TensorBoard's view of a run, which follows metrics.jsonl: an event file in RUN/tensorboard/.

TensorBoard takes points back only from a step on (``purge_step``), all of a step or none; what a
killed process had written of a step is not known. So each start writes the file anew, from the
first line on: it has each point of metrics.jsonl once, whatever was killed or computed again in
between. A hundred thousand lines take seconds, in a thread.

Values are called as `points_of` calls them, and are float32, which is what TensorBoard shows.
"""

import os
import socket
import time
from typing import Any, ClassVar

from tetdist.tracking.metrics_file import points_of
from tetdist.tracking.trackers import TRACKERS, TrackedRun, require_package


@TRACKERS.register("tensorboard")
class TensorBoard:
    """The event file of one start of a run, in place of those of earlier starts."""

    from_first_line: ClassVar[bool] = True

    @staticmethod
    def check() -> None:
        require_package("tensorboard", "tensorboard")

    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard.summary import text

        self._event, self._summary = Event, Summary
        folder = run.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((folder / name).open("wb"))
        self._write(step=0, file_version="brain.Event:2")
        # A TensorBoard that is open on the folder forgets what it has read of earlier files.
        self._write(step=0, session_log=SessionLog(status=SessionLog.START))
        for title, values in (("configuration", run.params), ("tags", run.tags)):
            shown = "\n".join(f"    {key}: {value}" for key, value in values.items())
            self._write(step=0, summary=text(title, shown))
        self._records.flush()

    def log(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            values = [
                self._summary.Value(tag=name, simple_value=value) for name, value in points_of(line)
            ]
            summary = self._summary(value=values)
            self._write(step=line["step"], wall_time=line["time"], summary=summary)
        self._records.flush()

    def _write(self, **event: Any) -> None:
        event.setdefault("wall_time", time.time())
        self._records.write(self._event(**event).SerializeToString())

    def close(self, status: str) -> None:  # noqa: ARG002  # an event file has no state
        self._records.close()
