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


class RunRecord:
    """The record of a run for trackers."""

    def __init__(self, run: Prepared, launcher: Launcher) -> None:
        self.run, self.config, self.launcher = run, run.config, launcher

    @contextmanager
    def tracked(self, step: int, stop: StopRequest, *, finished: bool) -> Iterator[Tracker | None]:
        """Record the run from ``step`` on, on rank 0, until it ends or is stopped."""
        hosts = dict.fromkeys(self.run.world.gather(platform.node()))
        if self.run.world.rank != 0:
            yield None
            return
        config, folder = self.config, self.config.run_dir
        run = TrackedRun(
            folder,
            config.name,
            params=flatten(config.as_dict()),
            tags=self._tags() | {"hosts": " ".join(hosts)},
            resume_step=step if (folder / "metrics.jsonl").exists() else None,
            note=self._note(),
            finished=finished,
        )
        tracker = Tracker(run, Destination.of(config), config.tracking.trackers)
        show_checkpoints(tracker, folder / "checkpoints")
        own = (folder / "imports").glob("*")
        for file in (folder / "config.yaml", folder / "environment.json", *own):
            tracker.artifact(file)
        status: Status = "FAILED"
        try:
            yield tracker
            self._log_checkpoint(tracker)
            status = "FINISHED"
        except Stopped:
            restarts = stop.exit_status - 128 in self.launcher.restarts_after
            status = "RUNNING" if restarts else "KILLED"
            raise
        finally:
            tracker.close(status)

    def _log_checkpoint(self, tracker: Tracker) -> None:
        """Upload the checkpoint of a finished run to MLflow, if configured."""
        which, checkpoints = (
            self.config.tracking.log_checkpoint,
            self.config.run_dir / "checkpoints",
        )
        if which == "none":
            return
        path = selection.last(checkpoints) if which == "last" else selection.best(checkpoints)
        if path is not None:
            tracker.artifact(path / selection.MODEL_FILE)

    @property
    def _evaluated_on(self) -> str:
        return "train, held out" if self.config.data.held_out else "val"

    def _tags(self) -> dict[str, str]:
        config, losses = self.config, self.config.losses()
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
            "split": self._evaluated_on,
            "git": environment.git_version(environment.git_state()) or "none",
            "seed": str(config.seed),
            "precision": config.precision,
            "world_size": str(self.run.world.world_size),
            "run_dir": str(config.run_dir.resolve()),
            "data": self.run.train.fingerprint[:16],
            **({"data_split": self.run.data_split} if self.run.data_split else {}),
            **{key: str(value) for key, value in begun_with.items() if value is not None},
            **self.launcher.tags,
        } | {f"version.{name}": version for name, version in environment.versions().items()}

    def _note(self) -> str:
        """Return the description for the run's page in MLflow, in Markdown."""
        config, train = self.config, self.run.train
        data = f"{len(train):,} {train.kind}, {counted(len(train.classes), 'class')}"
        phases = [
            f"Phase {phase.number}: {counted(phase.section.epochs, 'epoch')}, "
            f"T = {phase.section.timesteps_as_text}, {phase.optimizer.kind}, learning rate "
            f"{phase.optimizer.lr_as_text(config.batch.global_)}, {phase.schedule.schedule}."
            for phase in self.run.phases
        ]
        losses, folder = config.losses(), config.run_dir.resolve()
        copies = [folder / "imports" / Path(file).name for file in without_losses(config.imports)]
        lines = [
            f"**{config.model.name}** on {config.data.root} ({data}; "
            f"evaluated on the {len(self.run.val):,} of {self._evaluated_on})",
            "",
            *phases,
            f"Loss: {'; then '.join(loss.as_text() for loss in losses)}.",
            f"Begun with the weights of {config.init_checkpoint or 'no other network'}.",
            f"{counted(self.run.last_step, 'step')}{' (max_steps)' if config.max_steps else ''} of "
            f"{config.batch.global_} samples in micro-batches of {config.batch.micro}, "
            f"{config.precision}, seed {config.seed}.",
            "",
            "Plots and the whole configuration are under Artifacts; what the metrics mean: "
            "docs/metrics.md.",
            "",
            f"    {typed('eval', folder, *import_flags(copies))}",
        ]
        return "\n".join(lines)
