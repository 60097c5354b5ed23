"""Observers of a run started by a command: log, plots, published curve, profile."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from typing_extensions import override

from tetdist.apps.reports.reference import find_reference
from tetdist.apps.reports.run_plots import RunPlots
from tetdist.apps.reports.step_profile import StepProfile
from tetdist.config.flags import import_flags
from tetdist.errors import typed
from tetdist.nn.neurons import kind_of
from tetdist.plugins import without_losses
from tetdist.tracking.mlflow_logger import ui_command
from tetdist.training.evaluating import AVERAGE, Evaluated
from tetdist.training.observers import Observer, Watched
from tetdist.wording import counted

logger = logging.getLogger(__name__)


def observers(watched: Watched) -> Sequence[Callable[[Watched], Observer]]:
    """Return the constructors of the observers that the configuration enables."""
    config = watched.run.config
    chosen: list[Callable[[Watched], Observer]] = [Summary, RunPlots]
    if config.reference is not None:
        chosen.append(PublishedCurve)
    if config.profile is not None:
        chosen.append(StepProfile)
    return chosen


class Summary(Observer):
    """Log the start of the run, and at its end the result and the next commands."""

    def __init__(self, watched: Watched) -> None:
        self.config, self.tracker = watched.run.config, watched.tracker
        self.samples = len(watched.run.val)
        if not watched.finished:
            _log_start(watched)

    @override
    def on_end(self, result: Mapping[str, float] | None) -> None:
        if result is None:
            return
        config, folder = self.config, self.config.run_dir
        lines = [f"{folder} is finished"]
        if result:
            lines[0] += (
                f": top-1 {result['top1']:.2f} %; best {result['best_top1']:.2f} %, "
                f"at step {result['best_step']:.0f}"
            )
        if "ema_top1" in result:
            lines[0] += (
                f". Moving average: {result['ema_top1']:.2f} %; best "
                f"{result['ema_best_top1']:.2f} %, at step {result['ema_best_step']:.0f}"
            )
        if result and self.config.data.held_out:
            lines[0] += f" ({counted(self.samples, 'held-out sample')})"
        copies = [folder / "imports" / Path(file).name for file in without_losses(config.imports)]
        lines.append(f"  evaluate  {typed('eval', folder, *import_flags(copies))}")
        if self.config.tracking_uri and self.tracker.is_complete:
            lines.append(f"  look      {ui_command(self.config.tracking_uri, folder)}")
            lines.append("            a run's accuracy: type val/top1 into 'Search metric charts'")
        logger.info("%s", "\n".join(lines))


def _log_start(watched: Watched) -> None:
    run = watched.run
    config, device, parameters = run.config, run.world.device, run.model.parameters()
    where = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    processes = counted(run.world.world_size, "process")
    if device.type == "cpu":
        processes += f" of {counted(torch.get_num_threads(), 'thread')}"
    logger.info(
        "training %s, %s, in %s on %s, %s: %s of %s an epoch, %s in total; %s",
        config.model.name,
        counted(sum(parameter.numel() for parameter in parameters), "parameter"),
        config.precision,
        where,
        processes,
        counted(run.steps_per_epoch, "step"),
        counted(config.batch.global_, "sample"),
        f"{run.last_step:,}",
        config.run_dir,
    )
    if changed := config.model.changed_by_kind:
        logger.info(
            "model.neuron.kind=%s has other defaults than %s's own neuron: %s",
            kind_of(config.model.neuron),
            config.model.name,
            ", ".join(f"{key}={new}, not {old}" for key, (old, new) in changed.items()),
        )
    for number in range(len(config.phases)):
        optimizer = config.optimizer_of(number)
        if optimizer.lr_per is not None or optimizer.layer_decay is not None:
            rate = optimizer.lr_as_text(config.batch.global_)
            logger.info("phase %d: learning rate %s", number, rate)
    if config.cuda_graphs:
        logger.warning(
            "cuda_graphs=true is not yet verified on a GPU; check it on this machine with `%s`",
            typed("check_gpu", "--only", "steps"),
        )


class PublishedCurve(Observer):
    """Add a published training's top-1 to evaluations."""

    def __init__(self, watched: Watched) -> None:
        config = watched.run.config
        assert config.reference is not None
        self.reference = find_reference(config.reference)
        self.batch = config.batch.global_
        self.obstacle = self.reference.obstacle(len(watched.run.train.classes))
        if self.obstacle is not None:
            logger.info("reference: %s, so the run is not compared with it", self.obstacle)

    @override
    def on_evaluation(self, step: int, evaluated: Evaluated) -> Mapping[str, float]:
        if self.obstacle is not None or evaluated.kind == AVERAGE:
            return {}
        return self.reference.beside(step * self.batch)
