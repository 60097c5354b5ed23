"""Profile of some steps, on request: a trace, and a table of the slowest operations.

Profiling leaves results bitwise identical. torch.profiler shows the C++ or Triton kernels of
normalisation and neurons under the names of tetdist's autograd functions.
"""

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from typing_extensions import override

from tetdist.data.loader import Batch
from tetdist.storage.files import explaining, made_aside, write_text
from tetdist.training.observers import Observer, Watched

logger = logging.getLogger(__name__)

SHOWN = 20  # operations in the table
_STEP = "step "  # prefix of a step's name in the trace


class StepProfile(Observer):
    """Profile of the configured steps, from the first batch of the first step.

    It ends with the epoch at the latest, so that it holds no evaluation, and is then written.
    """

    def __init__(self, watched: Watched) -> None:
        config = watched.run.config
        assert config.profile is not None
        self._first, self._last = config.profile
        self._folder = config.run_dir / "profile"
        is_on_gpu = watched.run.world.device.type == "cuda"
        self._sort = f"self_{'device' if is_on_gpu else 'cpu'}_time_total"
        self._tracker, self._last_step = watched.tracker, watched.run.last_step
        self._steps_per_epoch = watched.run.steps_per_epoch
        self._profiler: Any = None
        self._range = ExitStack()  # the present step in the trace
        self._steps: list[int] = []

    @override
    def on_batch(self, step: int, batch: Batch) -> None:
        if step > self._last:
            self._finish()
        elif step >= self._first and step not in self._steps:
            if self._profiler is None:
                # Suppress two lines of Kineto on the terminal that do not help users.
                os.environ.setdefault("KINETO_LOG_LEVEL", "99")
                self._profiler = torch.profiler.profile()
                self._profiler.start()
            self._range.close()
            self._range.enter_context(torch.profiler.record_function(f"{_STEP}{step}"))
            self._steps.append(step)

    @override
    def on_line(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if kind == "train" and (step % self._steps_per_epoch == 0 or step == self._last_step):
            self._finish()

    @override
    def on_end(self, result: Mapping[str, float] | None) -> None:
        self._finish()

    def _finish(self) -> None:
        """Write the profile, once."""
        if self._profiler is None:
            return
        self._range.close()
        profiler, self._profiler, self._last = self._profiler, None, 0
        profiler.stop()
        steps = f"step {self._steps[0]}"
        if len(self._steps) > 1:
            steps = f"steps {self._steps[0]} to {self._steps[-1]}"
        trace, table = self._folder / "trace.json.gz", self._folder / "table.md"
        with explaining(trace):
            self._folder.mkdir(exist_ok=True)
            with made_aside(trace, ending=".json.gz") as aside:
                profiler.export_chrome_trace(str(aside))
            write_text(table, f"# Profile of {steps} on rank 0\n\n{_report(profiler, self._sort)}")
        logger.info("profile of %s: %s; open the trace beside it in ui.perfetto.dev", steps, table)
        self._tracker.artifact(table)


def _report(profiler: Any, sort: str) -> str:
    """Return torch's table, and the files of tetdist's operations and kernels in it."""
    averages = profiler.key_averages()
    averages[:] = [one for one in averages if not one.key.startswith(_STEP)]
    table = averages.table(sort, row_limit=SHOWN, max_name_column_width=60)
    modules = {one.__name__: one.__module__ for one in torch.autograd.Function.__subclasses__()}
    for kernels in [name for name in sys.modules if name.startswith("tetdist.nn.fast.kernels.")]:
        modules |= dict.fromkeys(vars(sys.modules[kernels]), kernels)
    own = [
        f"* `{name}`: {module.replace('.', '/')}.py\n"
        for name, module in modules.items()
        if module.startswith("tetdist.") and f" {name} " in table
    ]
    heading = "\nOperations of tetdist, including their backward passes:\n\n" if own else ""
    return f"```\n{table.strip()}\n```\n{heading}{''.join(own)}"
