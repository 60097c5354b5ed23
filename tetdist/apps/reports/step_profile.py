"""A profile of some steps, on request: a trace, and a table of the operations that took longest.

A profile only looks: results are the same to the bit. The passes of normalisation and neurons, in
C++ or Triton, are inside of autograd functions of tetdist's, by which torch.profiler knows them.
"""

import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from typing_extensions import override

from tetdist.data.loader import Batch
from tetdist.storage.files import explaining, made_aside, write_text
from tetdist.tables import markdown
from tetdist.training.observers import Observer, Watched
from tetdist.wording import counted

logger = logging.getLogger(__name__)

SHOWN = 20  # operations in the table
_STEP = "step "  # begins the name of a step in the trace


class Operation(NamedTuple):
    """All calls of an operation in the profiled steps.

    Attributes:
        name: As torch.profiler has it.
        calls: How often it was called.
        seconds: What it took itself, without the operations that it called; on a GPU that of the
            kernels that it started.
    """

    name: str
    calls: int
    seconds: float


class StepProfile(Observer):
    """The profile that a configuration asks for, from the first batch of its first step.

    It ends with the epoch at the latest, lest an evaluation be in it, and is written where it ends.
    A run that stops within the steps leaves no profile; resumed, it profiles the rest.
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
        if self._profiler is not None:
            self._end_range()
            self._profiler.stop()

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _start(self) -> None:
        # Kineto writes two lines to the terminal that say nothing to anybody else.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()
        self._started = time.perf_counter()

    def _finish(self) -> None:
        """Write the profile, once.

        Raises:
            UserError: It cannot be written.
        """
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
            "profile of %s: %s; the trace beside it opens in ui.perfetto.dev",
            _named(self._steps),
            table,
        )
        self._last = 0
        self._tracker.artifact(table)


def _named(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def _report(profiler: Any, steps: list[int], seconds: float, device: torch.device) -> str:
    on_gpu = device.type == "cuda"
    of_cpu = torch.autograd.DeviceType.CPU
    events = [one for one in profiler.key_averages() if not one.key.startswith(_STEP)]
    operations = [
        Operation(
            one.key,
            one.count,
            (one.self_device_time_total if on_gpu else one.self_cpu_time_total) / 1e6,
        )
        for one in events
        if one.device_type == of_cpu
    ]
    where = "the GPU's time" if on_gpu else "the CPU's time"
    parts = [
        f"# Profile of {_named(steps)}",
        f"{counted(len(steps), 'step')} of {1e3 * seconds / len(steps):.1f} ms on rank 0, waiting "
        "for data included; to be profiled makes them slower. An operation's time is its own, "
        f"without that of others it calls: {where}.",
        as_table("operation", operations, len(steps), own_passes()),
    ]
    if on_gpu:
        kernels = [
            Operation(one.key, one.count, one.self_device_time_total / 1e6)
            for one in events
            if one.device_type == torch.autograd.DeviceType.CUDA
        ]
        parts += ["The same by kernels:", as_table("kernel", kernels, len(steps), own_kernels())]
    return "\n\n".join(parts) + "\n"


def as_table(what: str, operations: list[Operation], steps: int, own: dict[str, str]) -> str:
    """The dearest operations, those of tetdist by their meaning, and what all took.

    Args:
        what: Title of the first column.
        operations: In any order.
        steps: Over how many steps they were counted.
        own: What is shown instead of a name.
    """
    total = sum(one.seconds for one in operations) or 1.0
    dearest = sorted(operations, key=lambda one: -one.seconds)[:SHOWN]
    rows = [
        [
            own.get(one.name, one.name).replace("|", "\\|"),
            f"{one.calls / steps:g}",
            f"{1e3 * one.seconds / steps:.3f}",
            f"{100 * one.seconds / total:.1f}",
        ]
        for one in dearest
    ]
    others = total - sum(one.seconds for one in dearest)
    if len(operations) > len(dearest):
        calls = sum(one.calls for one in operations) - sum(one.calls for one in dearest)
        row = [f"{counted(len(operations) - len(dearest), 'other')}", f"{calls / steps:g}"]
        rows.append([*row, f"{1e3 * others / steps:.3f}", f"{100 * others / total:.1f}"])
    return markdown([what, "calls a step", "ms a step", "%"], rows, numbers=True)


def own_passes() -> dict[str, str]:
    """Return the names of tetdist's autograd functions for a table, by their names in a profile."""
    found: dict[str, str] = {}
    for function in torch.autograd.Function.__subclasses__():
        if function.__module__.startswith("tetdist."):
            room = function.__module__.removeprefix("tetdist.").replace(".", "/")
            name = f"tetdist {function.__name__.lstrip('_')} ({room}.py)"
            found[function.__name__] = f"{name}, forward"
            found[f"{function.__name__}Backward"] = f"{name}, backward"
    return found


def own_kernels() -> dict[str, str]:
    """Return the names of tetdist's Triton kernels for a table, by their names in a profile."""
    prefix = "tetdist.nn.fast.kernels."
    return {
        name: f"tetdist {name} (nn/fast/kernels/{module.removeprefix(prefix)}.py)"
        for module in list(sys.modules)
        if module.startswith(prefix)
        for name in vars(sys.modules[module])
        if not name.startswith("_")
    }
