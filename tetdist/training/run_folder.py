"""``runs/NAME``: who may write there, what is kept there, and what is told of it."""

import fcntl
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml

from tetdist import checkpoint, plugins
from tetdist.config.identity import differences, flatten
from tetdist.config.loading import parse
from tetdist.config.schema import RunConfig
from tetdist.data.index import Index
from tetdist.data.loader import Batch
from tetdist.distributed.world import World
from tetdist.errors import Stopped, UserError, typed, way_out
from tetdist.events.splits import recorded_split
from tetdist.files import write_json, write_text
from tetdist.plugins import import_files
from tetdist.reports.tables import markdown
from tetdist.tracking import environment
from tetdist.tracking.mlflow_follower import Dataset, Status, ui_command
from tetdist.tracking.tracker import Tracker
from tetdist.tracking.trackers import TRACKERS

logger = logging.getLogger(__name__)

# Takes down a micro-batch of an optimiser step (counted from 1).
SampleRecord = Callable[[int, Batch], None]


class RunFolder:
    """``runs/NAME``: configuration, environment, metrics, checkpoints and plots of one run.

    Opened by every process of the run, written by rank 0, which holds it locked.

    Attributes:
        data_split: Name of the split that the data is, where it says so: one of several that
            published figures of this data set are of.

    Raises:
        UserError: The folder is of another run, in use, or not what ``resume`` asks for.
    """

    def __init__(self, config: RunConfig, index: Index, world: World) -> None:
        self.config, self.world, self.index = config, world, index
        self.path = config.run_dir
        self.checkpoints = self.path / "checkpoints"
        self.data_split = recorded_split(config.data.root)
        for name in config.tracking.trackers:
            TRACKERS[name]  # says which are known, if it is not
        # Of a launcher that starts the run again after some signals: further tags for MLflow, and
        # whether this is such a stop.
        self.launcher_tags: Mapping[str, str] = {}
        self.goes_on: Callable[[], bool] = lambda: False
        if world.rank == 0:
            try:
                self._claim()
            except OSError as error:
                raise UserError(
                    f"cannot write to {self.path}: {error.strerror}; {way_out(error)}"
                ) from error

    def _claim(self) -> None:
        has_checkpoints = any(self.checkpoints.glob("step-*"))
        if self.config.resume == "never" and (self.path / "config.yaml").exists():
            raise UserError(
                f"resume=never, and {self.path} already holds a run; choose another name=..., or "
                "resume=auto to continue it"
            )
        if self.config.resume == "must" and not has_checkpoints:
            raise UserError(f"resume=must, and there is no checkpoint in {self.checkpoints}")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is running in {self.path}; wait for it, stop it, or give this "
                "run another name=..."
            ) from error
        imported = import_files(self.config.imports)
        self._check_same_run(imported)
        plugins.keep(imported, self.path / "imports")
        write_text(self.path / "config.yaml", self.config.as_yaml())
        write_json(self.path / "environment.json", environment.environment())

    def _check_same_run(self, imported: list[plugins.Imported]) -> None:
        file = self.path / "config.yaml"
        if not file.exists():
            return
        try:
            earlier = yaml.safe_load(file.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            earlier = None
        if not isinstance(earlier, dict):
            raise UserError(
                f"{file} is damaged, so that it cannot be told which run this is; restore it, "
                "remove it if you know that the run is the same, or give this one another name=..."
            )
        try:
            # Keys that are new since then have their defaults in the earlier run.
            earlier = parse(earlier, str(file), warn=False).as_dict()
        except UserError:
            logger.warning("%s is of another version; its keys are compared as they are", file)
        changed = differences(earlier, self.config.as_dict())
        changed += plugins.changes(plugins.kept(self.path / "imports"), imported)
        if changed:
            raise UserError(
                f"{self.path} holds a run of another configuration: {'; '.join(changed)}. Give "
                "this one another name=..., or set these back to continue"
            )

    def newest_checkpoint(self) -> checkpoint.Checkpoint | None:
        """The checkpoint to continue from, the same on every process."""
        found = self.world.run_on_all(
            lambda: checkpoint.newest(self.checkpoints) if self.world.rank == 0 else None
        )
        name = self.world.from_rank_0(found.path.name if found else None)
        if name is None or found is not None:
            return found
        return checkpoint.read(self.checkpoints / name)

    @contextmanager
    def tracker(self, step: int, val_index: Index) -> Iterator[Tracker | None]:
        """Rank 0's record of the run, from ``step`` on; None elsewhere."""
        if self.world.rank != 0:
            yield None
            return
        config = self.config
        tracker = Tracker(
            self.path,
            run_name=config.name,
            params=flatten(config.as_dict()),
            tags=self._tags(),
            tracking_uri=config.tracking_uri,
            experiment=config.tracking.experiment,
            artifact_root=Path(config.runs_dir).resolve() / "mlartifacts",
            resume_step=step if (self.path / "metrics.jsonl").exists() else None,
            phases=[flatten(phase) for phase in config.as_dict()["phases"]],
            datasets=self._datasets(val_index),
            note=self._note(val_index),
            trackers=config.tracking.trackers,
        )
        tracker.artifact(self.path / "config.yaml")
        tracker.artifact(self.path / "environment.json")
        status: Status = "FAILED"
        try:
            yield tracker
            self._log_checkpoint(tracker)
            status = "FINISHED"
        except Stopped:
            status = "RUNNING" if self.goes_on() else "KILLED"
            raise
        finally:
            tracker.close(status)

    def _log_checkpoint(self, tracker: Tracker) -> None:
        """Give MLflow the checkpoint of a finished run, where that was asked for."""
        which, name = self.config.tracking.log_checkpoint, self.config.tracking.register_
        pointer = self.checkpoints / which
        if which == "none" or not pointer.is_file():
            return
        file = self.checkpoints / pointer.read_text().strip() / checkpoint.MODEL_FILE
        tracker.artifact(file)
        if name is not None:
            tracker.register(file, name)

    @contextmanager
    def sample_record(self, step: int) -> Iterator[SampleRecord]:
        """Takes down what this process trains on, from ``step`` on, where that was asked for."""
        if not self.config.record_samples:
            yield lambda _step, _batch: None
            return
        self.world.run_on_all(lambda: self._forget_samples_after(step))
        path = self.path / f"samples-{self.world.rank}.jsonl"
        with path.open("a", buffering=1) as stream:

            def record(step: int, batch: Batch) -> None:
                sums = [zlib.crc32(image.contiguous().numpy()) for image in batch.images.cpu()]
                line = {"step": step, "ids": batch.ids.tolist(), "crc32": sums}
                stream.write(json.dumps(line) + "\n")

            yield record

    def _forget_samples_after(self, step: int) -> None:
        """Remove what was taken down of steps that are computed again, and a line torn by a kill.

        Rank 0 does it for all: there may have been more processes before.
        """
        if self.world.rank != 0:
            return
        for path in self.path.glob("samples-*.jsonl"):
            whole = path.read_text().rpartition("\n")[0].splitlines(keepends=True)
            kept = (x.rstrip() + "\n" for x in whole if json.loads(x)["step"] <= step)
            write_text(path, "".join(kept))

    def log_summary(self, result: dict[str, float]) -> None:
        """Say that the run is finished, what came out and where to look."""
        if self.world.rank != 0:
            return
        lines = [f"{self.path} is finished"]
        if result:
            lines[0] += (
                f": top-1 {result['top1']:.2f} %; at best {result['best_top1']:.2f} %, "
                f"at step {result['best_step']:.0f}"
            )
        lines.append(f"  evaluate  {typed('eval', '--checkpoint', self.path)}")
        if self.config.tracking_uri:
            lines.append(f"  look      {ui_command(self.config.tracking_uri)}")
        logger.info("%s", "\n".join(lines))

    def _tags(self) -> dict[str, str]:
        config = self.config
        return {
            "model": config.model.name,
            "timesteps": " then ".join(str(phase.timesteps) for phase in config.phases),
            "loss": config.loss.kind,
            "split": "val",
            "git": environment.git_version() or "none",
            "seed": str(config.seed),
            "precision": config.precision,
            "world_size": str(self.world.world_size),
            "run_dir": str(self.path.resolve()),
            "data": self.index.fingerprint[:16],
            **({"data_split": self.data_split} if self.data_split else {}),
            **{key: str(value) for key, value in self._begun_with().items()},
            **self.launcher_tags,
        } | {f"version.{name}": version for name, version in environment.versions().items()}

    def _begun_with(self) -> dict[str, object]:
        """What makes it another run than one of its loss alone."""
        distillation = self.config.loss.distillation
        found = {
            "init_checkpoint": self.config.init_checkpoint,
            "teacher": distillation.teacher,
            "self_distillation": distillation.self_weight or None,
        }
        return {key: value for key, value in found.items() if value is not None}

    def _note(self, val_index: Index) -> str:
        """The description on the run's page in MLflow, in Markdown."""
        config, train = self.config, self.index
        data = f"{len(train):,} {train.kind}, {len(train.classes)} classes"
        phases = [
            [
                str(number),
                str(phase.epochs),
                str(phase.timesteps),
                phase.optimizer.kind,
                f"{phase.optimizer.lr:g}, {phase.schedule}",
            ]
            for number, phase in enumerate(config.phases)
        ]
        lines = [
            f"**{config.model.name}** by {config.loss.kind.upper()} on {config.data.root} ({data}; "
            f"evaluated on the {len(val_index):,} of val)",
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
            f"    {typed('eval', '--checkpoint', self.path.resolve())}",
        ]
        return "\n".join(lines)

    def _datasets(self, val_index: Index) -> list[Dataset]:
        root = Path(self.config.data.root).resolve()
        return [
            Dataset(
                name=f"{root.name}/{index.split}",
                digest=index.fingerprint[:16],
                source=str(root / index.split),
                context=context,
                profile={"samples": len(index), "classes": len(index.classes)},
            )
            for index, context in ((self.index, "training"), (val_index, "validation"))
        ]
