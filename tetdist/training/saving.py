"""Checkpoints of a run, written while training goes on."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tetdist.buffers import copy_to_host
from tetdist.datasets import recorded_split
from tetdist.distributed.signals import StopRequest
from tetdist.distributed.watchdog import CONTINUES, Watch
from tetdist.plugins import checksums_of, without_losses
from tetdist.storage import checkpoint
from tetdist.tracking.tracker import Tracker
from tetdist.training.ema import WeightAverage
from tetdist.training.evaluating import AVERAGE, WEIGHTS, Evaluated
from tetdist.training.prepared import Prepared
from tetdist.training.run_record import show_checkpoints
from tetdist.training.state import RunState


class Saving:
    """Checkpoints that a thread of rank 0 writes one at a time.

    Attributes:
        thread: The thread. As a context, it ends once the checkpoint that was begun is complete.
        step: Step of the newest checkpoint, which is complete after `wait`; None: there is none.
    """

    def __init__(self, run: Prepared, stop: StopRequest, watch: Watch) -> None:
        self.run, self.stop, self.watch = run, stop, watch
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.step: int | None = None
        self._written: Future[None] | None = None

    def begin(
        self,
        state: RunState,
        optimizer: dict[str, Any],
        average: WeightAverage | None,
        evaluated: Sequence[Evaluated],
        tracker: Tracker | None,
    ) -> None:
        """Copy a checkpoint on rank 0 and begin to write it; the one before must be complete.

        If it cannot be written, all processes are asked to stop, and `wait` raises the error.

        Args:
            optimizer: A copy, made by `Engine.optimizer_state`.
            evaluated: Evaluations of the weights and of their average, if just made.
        """
        self.step = state.step
        if tracker is None:
            return
        run, folder = self.run, self.run.config.run_dir / "checkpoints"
        validation = {evaluation.kind: evaluation.validation for evaluation in evaluated}
        description = _describe(run, state.step, validation.get(WEIGHTS))
        weights, values, averaged = copy_to_host(run.model.state_dict()), asdict(state), None
        if average is not None:
            changes = {"validation": validation.get(AVERAGE), "averaged": average.as_text()}
            described = description.model_copy(update=changes)
            averaged = checkpoint.Average(copy_to_host(average.state_dict()), described)
        copied = torch.cuda.Event(blocking=True) if run.world.device.type == "cuda" else None
        if copied is not None:
            copied.record()

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            tracker.sync()
            checkpoint.save(
                folder,
                model=weights,
                optimizer=optimizer,
                description=description,
                state=values,
                keep_last=run.config.save.keep_last,
                average=averaged,
            )
            show_checkpoints(tracker, folder)
            self.watch.after = CONTINUES

        self._written = self.thread.submit(write)
        self._written.add_done_callback(self._ask_to_stop)

    def _ask_to_stop(self, written: Future[None]) -> None:
        if written.exception() is not None:
            self.stop.ask()

    def wait(self) -> None:
        """Wait on all processes until the checkpoint that was begun is complete.

        Raises:
            UserError: It could not be written: the disk is full, ...
        """
        with self.run.world.together():
            if self._written is not None:
                self._written.result()
        if self.step is not None:
            self.watch.after = CONTINUES


def _describe(
    run: Prepared, step: int, validation: dict[str, float] | None
) -> checkpoint.Description:
    """Describe the weights, so that they can be evaluated from another folder."""
    config = run.config
    described = config.as_dict()
    described["data"]["root"] = str(Path(config.data.root).resolve())
    described["data"]["index"] = str(config.data.index_dir.resolve())
    binning = recorded_split.binning(config.data.root)
    description = checkpoint.Description(
        config=described,
        classes=list(run.train.classes),
        timesteps=run.model.timesteps,
        step=step,
        validation=validation,
        imports=checksums_of(without_losses(config.imports)),
    )
    # A file lists only what is set.
    known = {"binning": binning, "looks_ahead": run.model.looks_ahead}
    return description.model_copy(update={k: v for k, v in known.items() if v is not None})
