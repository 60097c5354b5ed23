"""Profile of some steps, on request: a trace, and a table of the slowest operations.

Profiling leaves results bitwise identical. torch.profiler shows the C++ or Triton kernels of
normalisation and neurons under the names of tetdist's autograd functions.
"""

import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from typing_extensions import override

from tetdist.data.loader import Batch
from tetdist.storage.files import explaining, made_aside, write_text
from tetdist.training.observers import Observer, Watched
from tetdist.wording import counted

logger = logging.getLogger(__name__)

SHOWN = 20  # operations in the table
_STEP = "step "  # prefix of a step's name in the trace


class StepProfile(Observer):
    """Profile of the configured steps, from the first batch of the first step.

    It ends with the epoch at the latest, so that it holds no evaluation, and is then written. A run
    that stops within these steps writes no profile; resumed, it profiles the remaining steps.
    """

    def __init__(self, watched: Watched) -> None:
        config = watched.run.config
        assert config.profile is not None
        self._first, self._last = config.profile.steps
        self._device, self._folder = watched.run.world.device, config.run_dir / "profile"
        self._tracker, self._steps_per_epoch = watched.tracker, watched.run.steps_per_epoch
        self._last_step = watched.run.last_step
        self._profiler: Any = None
        self._range: Any = None  # the present step in the trace
        self._steps: list[int] = []
        self._started = 0.0

    @override
    def on_batch(self, step: int, batch: Batch) -> None:
        if step > self._last:
            self._finish()
        elif step >= self._first and step not in self._steps:
            if self._profiler is None:
                self._start()
            self._end_range()
            self._range = torch.profiler.record_function(f"{_STEP}{step}").__enter__()
            self._steps.append(step)

    @override
    def on_line(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if kind == "train" and (step % self._steps_per_epoch == 0 or step == self._last_step):
            self._finish()

    @override
    def on_end(self, result: Mapping[str, float] | None) -> None:
        if self._steps and self._steps[-1] == self._last:
            self._finish()
        elif self._profiler is not None:
            self._end_range()
            self._profiler.stop()

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _start(self) -> None:
        # Suppress two lines of Kineto on the terminal that do not help users.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()
        self._started = time.perf_counter()

    def _finish(self) -> None:
        """Write the profile once."""
        if self._profiler is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._started
        self._end_range()
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        trace, table = self._folder / "trace.json.gz", self._folder / "table.md"
        with explaining(trace):
            self._folder.mkdir(exist_ok=True)
            with made_aside(trace, ending=".json.gz") as aside:
                profiler.export_chrome_trace(str(aside))
            write_text(table, _report(profiler, self._steps, seconds, self._device))
        logger.info(
            "profile of %s: %s; open the trace beside it in ui.perfetto.dev",
            _named(self._steps),
            table,
        )
        self._last = 0
        self._tracker.artifact(table)


def _named(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def _report(profiler: Any, steps: list[int], seconds: float, device: torch.device) -> str:
    """Return torch's table, and the files of tetdist's operations in it."""
    kind = "device" if device.type == "cuda" else "cpu"
    averages = profiler.key_averages()
    averages[:] = [one for one in averages if not one.key.startswith(_STEP)]
    table = averages.table(f"self_{kind}_time_total", row_limit=SHOWN, max_name_column_width=60)
    own = [f"* `{name}`: {file}" for name, file in _own_files().items() if f" {name} " in table]
    parts = [
        f"# Profile of {_named(steps)}",
        f"{counted(len(steps), 'step')} of {1e3 * seconds / len(steps):.1f} ms on rank 0, "
        "including waiting for data and checkpoints between them; profiling slows them down. "
        "The table is torch's, over all steps.",
        f"```\n{table.strip()}\n```",
        "Operations of tetdist, including their backward passes:\n\n" + "\n".join(own),
    ]
    return "\n\n".join(parts[: None if own else -1]) + "\n"


def _own_files() -> dict[str, str]:
    """Return the files of tetdist's autograd functions and Triton kernels, by profile name."""
    modules = {
        one.__name__: one.__module__
        for one in torch.autograd.Function.__subclasses__()
        if one.__module__.startswith("tetdist.")
    }
    for module in list(sys.modules):
        if module.startswith("tetdist.nn.fast.kernels."):
            modules |= dict.fromkeys(vars(sys.modules[module]), module)
    return {name: f"{module.replace('.', '/')}.py" for name, module in modules.items()}
