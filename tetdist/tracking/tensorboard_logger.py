"""The TensorBoard logger of a run: it writes metrics.jsonl to an event file in RUN/tensorboard/.

TensorBoard can only discard all points from a step on (``purge_step``), and a killed process may
have written part of a step. So each start writes the file anew from the first line on: it has each
point of metrics.jsonl once, despite kills and repeated steps. 100,000 lines take seconds, in a
thread.

Values have their names from `points_of`, and are float32, as TensorBoard shows them.
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
        # With purge_step, a running TensorBoard forgets points of earlier files.
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
            # All values of a line at once: add_scalar is several times slower.
            summary = self._summary(value=values)
            self._writer.file_writer.add_summary(summary, line["step"], line["time"])
        self._writer.flush()

    def close(self, status: str) -> None:  # noqa: ARG002  # an event file has no state
        self._writer.close()
