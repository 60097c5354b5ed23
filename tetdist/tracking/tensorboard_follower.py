"""TensorBoard's view of a run, which follows metrics.jsonl: an event file in RUN/tensorboard/.

TensorBoard takes points back only from a step on (``purge_step``), all of a step or none; what a
killed process had written of a step is not known. So each start writes the file anew, from the
first line on: it has each point of metrics.jsonl once, whatever was killed or computed again in
between. A hundred thousand lines take seconds, in a thread.

Values are called as `points_of` calls them, and are float32, which is what TensorBoard shows.
"""

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
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self._summary = Summary
        folder = run.folder / "tensorboard"
        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        # With purge_step, a TensorBoard that is open on the folder forgets what it has read of
        # earlier files.
        self._writer: Any = SummaryWriter(folder, purge_step=0)
        for title, values in (("configuration", run.params), ("tags", run.tags)):
            shown = "\n".join(f"    {key}: {value}" for key, value in values.items())
            self._writer.add_text(title, shown)
        self._writer.flush()

    def log(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            values = [
                self._summary.Value(tag=name, simple_value=value) for name, value in points_of(line)
            ]
            # All values of a line at once: add_scalar takes several times as long.
            summary = self._summary(value=values)
            self._writer.file_writer.add_summary(summary, line["step"], line["time"])
        self._writer.flush()

    def close(self, status: str) -> None:  # noqa: ARG002  # an event file has no state
        self._writer.close()
