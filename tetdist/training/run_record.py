"""The record of a run for MLflow and other trackers besides metrics: tags, data, description."""

import platform
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tetdist.config.flags import import_flags
from tetdist.config.overrides import flatten
from tetdist.distributed.signals import StopRequest
from tetdist.errors import Stopped, UserError, typed
from tetdist.plugins import without_losses
from tetdist.storage import selection
from tetdist.tracking import environment
from tetdist.tracking.mlflow_logger import Destination
from tetdist.tracking.tracker import Tracker
from tetdist.tracking.trackers import Status, TrackedRun
from tetdist.training.prepared import Prepared
from tetdist.wording import counted


@dataclass(frozen=True)
class Launcher:
    """A program that starts a run, and starts it again.

    Attributes:
        tags: Additional tags for MLflow.
        restarts_after: Signals after which the launcher restarts the run; MLflow still shows it as
            running.
        on_failure: Called with a process's error, before the other processes lose it and fail, too.
    """

    tags: Mapping[str, str] = field(default_factory=dict)
    restarts_after: Collection[int] = ()
    on_failure: Callable[[Exception], None] = lambda _: None


def show_checkpoints(tracker: Tracker, checkpoints: Path) -> None:
    """Record in MLflow where the last and the best checkpoints are; they may be the same."""
    paths = {"checkpoint": selection.last(checkpoints)}
    with suppress(UserError):  # A damaged one may be the best; its evaluation says so.
        paths["best_checkpoint"] = selection.best(checkpoints)
        paths["best_ema_checkpoint"] = selection.best(checkpoints, selection.EMA_FILE)
    for tag, path in paths.items():
        if path is not None:
            tracker.set_tag(tag, str(path.resolve()))


@contextmanager
def recorded(
    run: Prepared, launcher: Launcher, step: int, stop: StopRequest, *, finished: bool
) -> Iterator[Tracker | None]:
    """Record a run from ``step`` on, on rank 0, until it ends or is stopped."""
    hosts = dict.fromkeys(run.world.gather(platform.node()))
    if run.world.rank != 0:
        yield None
        return
    config, folder = run.config, run.config.run_dir
    evaluated_on = "train, held out" if config.data.held_out else "val"
    tags, note = _tags(run), _note(run, evaluated_on)
    tracked = TrackedRun(
        folder,
        config.name,
        params=flatten(config.as_dict()),
        tags={**tags, "split": evaluated_on, "hosts": " ".join(hosts), **launcher.tags},
        resume_step=step if (folder / "metrics.jsonl").exists() else None,
        note=note,
        finished=finished,
    )
    tracker = Tracker(tracked, Destination.of(config), config.tracking.trackers)
    checkpoints, which = folder / "checkpoints", config.tracking.log_checkpoint
    show_checkpoints(tracker, checkpoints)
    own = (folder / "imports").glob("*")
    for file in (folder / "config.yaml", folder / "environment.json", *own):
        tracker.artifact(file)
    status: Status = "FAILED"
    try:
        yield tracker
        if which != "none":
            path = selection.last(checkpoints) if which == "last" else selection.best(checkpoints)
            if path is not None:
                tracker.artifact(path / selection.MODEL_FILE)
        status = "FINISHED"
    except Stopped:
        restarts = stop.exit_status - 128 in launcher.restarts_after
        status = "RUNNING" if restarts else "KILLED"
        raise
    finally:
        tracker.close(status)


def _tags(run: Prepared) -> dict[str, str]:
    config, losses = run.config, run.config.losses()
    # These distinguish it from a run of its loss alone.
    begun_with = {
        "init_checkpoint": config.init_checkpoint,
        "teacher": config.loss.distillation.teacher,
        "self_distillation": max(loss.distillation.self_weight for loss in losses) or None,
    }
    return {
        "model": config.model.name,
        "timesteps": " then ".join(phase.timesteps_as_text for phase in config.phases),
        "loss": " then ".join(loss.kind for loss in losses),
        "git": environment.git_version(environment.git_state()) or "none",
        "seed": str(config.seed),
        "precision": config.precision,
        "world_size": str(run.world.world_size),
        "run_dir": str(config.run_dir.resolve()),
        "data": run.train.fingerprint[:16],
        **({"data_split": run.data_split} if run.data_split else {}),
        **{key: str(value) for key, value in begun_with.items() if value is not None},
    } | {f"version.{name}": version for name, version in environment.versions().items()}


def _note(run: Prepared, evaluated_on: str) -> str:
    """Return the description for the run's page in MLflow, in Markdown."""
    config, train = run.config, run.train
    data = f"{len(train):,} {train.kind}, {counted(len(train.classes), 'class')}"
    phases = [
        f"Phase {phase.number}: {counted(phase.section.epochs, 'epoch')}, "
        f"T = {phase.section.timesteps_as_text}, {phase.optimizer.kind}, learning rate "
        f"{phase.optimizer.lr_as_text(config.batch.global_)}, {phase.schedule.schedule}."
        for phase in run.phases
    ]
    losses, folder = config.losses(), config.run_dir.resolve()
    copies = [folder / "imports" / Path(file).name for file in without_losses(config.imports)]
    lines = [
        f"**{config.model.name}** on {config.data.root} ({data}; "
        f"evaluated on the {len(run.val):,} of {evaluated_on})",
        "",
        *phases,
        f"Loss: {'; then '.join(loss.as_text() for loss in losses)}.",
        f"Begun with the weights of {config.init_checkpoint or 'no other network'}.",
        f"{counted(run.last_step, 'step')}{' (max_steps)' if config.max_steps else ''} of "
        f"{config.batch.global_} samples in micro-batches of {config.batch.micro}, "
        f"{config.precision}, seed {config.seed}.",
        "",
        "Plots and the whole configuration are under Artifacts; what the metrics mean: "
        "docs/metrics.md.",
        "",
        f"    {typed('eval', folder, *import_flags(copies))}",
    ]
    return "\n".join(lines)
