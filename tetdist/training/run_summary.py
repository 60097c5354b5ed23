"""The story of a run, for MLflow and other trackers while it goes on, for a person at its end."""

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from tetdist.config.identity import flatten
from tetdist.config.schema import RunConfig
from tetdist.data.index import Index
from tetdist.distributed.signals import StopRequest
from tetdist.errors import Stopped, typed
from tetdist.nn.neurons import kind_of
from tetdist.reports.tables import markdown
from tetdist.storage import checkpoint
from tetdist.tracking import environment
from tetdist.tracking.mlflow_follower import Dataset, Status, ui_command
from tetdist.tracking.tracker import Tracker
from tetdist.tracking.trackers import TrackedRun
from tetdist.wording import counted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launcher:
    """A program that starts a run, and starts it again.

    Attributes:
        tags: Further tags for MLflow.
        goes_on_after: Signals after which the run is started again: meanwhile MLflow shows it as
            running.
        on_failure: Told what a process raises, before the other processes lose it and raise, too.
    """

    tags: Mapping[str, str] = field(default_factory=dict)
    goes_on_after: Collection[int] = ()
    on_failure: Callable[[Exception], None] = lambda _: None


def show_checkpoints(tracker: Tracker, checkpoints: Path) -> None:
    """Have MLflow say where the last checkpoint is, and the best ones, which may be the same."""
    tags = {
        "last": "checkpoint",
        "best": "best_checkpoint",
        checkpoint.BEST_EMA: "best_ema_checkpoint",
    }
    for which, tag in tags.items():
        pointer = checkpoints / which
        if pointer.is_file():
            path = pointer.with_name(pointer.read_text().strip())
            tracker.set_tag(tag, str(path.resolve()))


@dataclass(frozen=True)
class RunSummary:
    """A run as others see it.

    Attributes:
        config: Its configuration.
        train: What it is trained on.
        val: What it is evaluated on.
        world_size: Number of its processes.
        launcher: The program that started it.
        data_split: See `RunFolder`.
    """

    config: RunConfig
    train: Index
    val: Index
    world_size: int
    launcher: Launcher
    data_split: str | None

    @contextmanager
    def tracked(self, step: int, stop: StopRequest) -> Iterator[Tracker]:
        """Record the run from ``step`` on, until it ends or is stopped."""
        config, folder = self.config, self.config.run_dir
        tracker = Tracker(
            TrackedRun(
                folder,
                config.name,
                params=flatten(config.as_dict()),
                tags=self._tags(),
                resume_step=step if (folder / "metrics.jsonl").exists() else None,
            ),
            tracking_uri=config.tracking_uri,
            experiment=config.tracking.experiment,
            artifact_root=Path(config.runs_dir).resolve() / "mlartifacts",
            phases=[flatten(phase) for phase in config.as_dict()["phases"]],
            datasets=self._datasets(),
            note=self._note(),
            trackers=config.tracking.trackers,
        )
        show_checkpoints(tracker, folder / "checkpoints")
        tracker.artifact(folder / "config.yaml")
        tracker.artifact(folder / "environment.json")
        status: Status = "FAILED"
        try:
            yield tracker
            self._log_checkpoint(tracker)
            status = "FINISHED"
        except Stopped:
            restarts = stop.exit_status - 128 in self.launcher.goes_on_after
            status = "RUNNING" if restarts else "KILLED"
            raise
        finally:
            tracker.close(status)

    def _log_checkpoint(self, tracker: Tracker) -> None:
        """Give MLflow the checkpoint of a finished run, where that was asked for."""
        which, name = self.config.tracking.log_checkpoint, self.config.tracking.register_
        pointer = self.config.run_dir / "checkpoints" / which
        if which == "none" or not pointer.is_file():
            return
        folder = pointer.with_name(pointer.read_text().strip())
        file = folder / checkpoint.MODEL_FILE
        tracker.artifact(file)
        if name is not None:
            state = json.loads((folder / checkpoint.STATE_FILE).read_text())
            what = (
                f"The {which} checkpoint of {self.config.name}, of step {state['step']:,}: top-1 "
                f"{state['result']['top1']:.2f} % on val."
            )
            tracker.register(file, name, f"{what}\n\n{self._note()}")

    def log_start(
        self, model: nn.Module, device: torch.device, steps_per_epoch: int, last_step: int
    ) -> None:
        """Say what begins: on what, how much of it there is, and where it goes."""
        config = self.config
        where = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
        processes = counted(self.world_size, "process")
        if device.type == "cpu":
            processes += f" of {counted(torch.get_num_threads(), 'thread')}"
        parameters = sum(parameter.numel() for parameter in model.parameters())
        logger.info(
            "training %s, %s, in %s on %s, %s: %s of %s an epoch, %s in all; %s",
            config.model.name,
            counted(parameters, "parameter"),
            config.precision,
            where,
            processes,
            counted(steps_per_epoch, "step"),
            counted(config.batch.global_, "sample"),
            f"{last_step:,}",
            config.run_dir,
        )
        if changed := config.model.changed_by_kind:
            logger.info(
                "model.neuron.kind=%s also sets, in place of the values of %s's own neuron: %s",
                kind_of(config.model.neuron),
                config.model.name,
                ", ".join(f"{key}={new} ({old})" for key, (old, new) in changed.items()),
            )
        for number, phase in enumerate(config.phases):
            optimizer = phase.optimizer
            if optimizer.lr_per is not None or optimizer.layer_decay is not None:
                rate = optimizer.lr_as_text(config.batch.global_)
                logger.info("phase %d: learning rate %s", number, rate)

    def log(self, result: dict[str, float], *, in_mlflow: bool) -> None:
        """Say that the run is finished, what came out and where to look.

        Args:
            result: Of the last evaluation, and the best one.
            in_mlflow: Whether MLflow, if there is one, has everything.
        """
        folder = self.config.run_dir
        lines = [f"{folder} is finished"]
        if result:
            lines[0] += (
                f": top-1 {result['top1']:.2f} %; at best {result['best_top1']:.2f} %, "
                f"at step {result['best_step']:.0f}"
            )
        if "ema_top1" in result:
            lines[0] += (
                f". The moving average: {result['ema_top1']:.2f} %; at best "
                f"{result['ema_best_top1']:.2f} %, at step {result['ema_best_step']:.0f}"
            )
        lines.append(f"  evaluate  {typed('eval', '--checkpoint', folder)}")
        if self.config.tracking_uri and in_mlflow:
            lines.append(f"  look      {ui_command(self.config.tracking_uri)}")
        logger.info("%s", "\n".join(lines))

    @property
    def _evaluated_on(self) -> str:
        return "train, held out" if self.config.data.held_out else "val"

    def _tags(self) -> dict[str, str]:
        config, distillation = self.config, self.config.loss.distillation
        # These make it another run than one of its loss alone.
        begun_with = {
            "init_checkpoint": config.init_checkpoint,
            "teacher": distillation.teacher,
            "self_distillation": distillation.self_weight or None,
        }
        return {
            "model": config.model.name,
            "timesteps": " then ".join(str(phase.timesteps) for phase in config.phases),
            "loss": config.loss.kind,
            "split": self._evaluated_on,
            "git": environment.git_version() or "none",
            "seed": str(config.seed),
            "precision": config.precision,
            "world_size": str(self.world_size),
            "run_dir": str(config.run_dir.resolve()),
            "data": self.train.fingerprint[:16],
            **({"data_split": self.data_split} if self.data_split else {}),
            **{key: str(value) for key, value in begun_with.items() if value is not None},
            **self.launcher.tags,
        } | {f"version.{name}": version for name, version in environment.versions().items()}

    def _note(self) -> str:
        """The description on the run's page in MLflow, in Markdown."""
        config, train = self.config, self.train
        data = f"{len(train):,} {train.kind}, {counted(len(train.classes), 'class')}"
        phases = [
            [
                str(number),
                str(phase.epochs),
                str(phase.timesteps),
                phase.optimizer.kind,
                f"{phase.optimizer.lr_as_text(config.batch.global_)}, {phase.schedule}",
            ]
            for number, phase in enumerate(config.phases)
        ]
        lines = [
            f"**{config.model.name}** by {config.loss.kind.upper()} on {config.data.root} ({data}; "
            f"evaluated on the {len(self.val):,} of {self._evaluated_on})",
            "",
            markdown(["phase", "epochs", "T", "optimiser", "learning rate"], phases, tight=True),
            "",
            f"Loss: {config.loss.as_text()}.",
            f"Begun with the weights of {config.init_checkpoint or 'no other network'}.",
            f"Batch {config.batch.global_} in micro-batches of {config.batch.micro}, "
            f"{config.precision}, seed {config.seed}.",
            "",
            "Pictures and the whole configuration are under Artifacts; what the metrics mean: "
            "docs/metrics.md.",
            "",
            f"    {typed('eval', '--checkpoint', config.run_dir.resolve())}",
        ]
        return "\n".join(lines)

    def _datasets(self) -> list[Dataset]:
        root = Path(self.config.data.root).resolve()
        return [
            Dataset(
                name=f"{root.name}/{index.split}",
                digest=index.fingerprint[:16],
                source=str(root / index.split),
                context=context,
                profile={"samples": len(index), "classes": len(index.classes)},
            )
            for index, context in ((self.train, "training"), (self.val, "validation"))
        ]
