"""``runs/NAME``: its lock, the check that it holds the same run, and its checkpoints."""

import fcntl
import json
import logging
from typing import Self, assert_never

from tetdist import plugins
from tetdist.config.identity import differences
from tetdist.config.loading import parse
from tetdist.config.schema import RunConfig
from tetdist.config.yaml_files import read_yaml
from tetdist.distributed.world import World
from tetdist.errors import UserError, way_out
from tetdist.plugins import import_files
from tetdist.storage import checkpoint, selection
from tetdist.storage.files import parse_json, write_json, write_text
from tetdist.tracking import environment, metrics_file
from tetdist.tracking.trackers import check_tracker

logger = logging.getLogger(__name__)


class RunFolder:
    """``runs/NAME``: configuration, environment, metrics, checkpoints and plots of one run.

    Every process of the run opens it; rank 0 writes to it and keeps it locked.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        self.path = config.run_dir
        self.checkpoints = self.path / "checkpoints"
        if world.rank == 0:
            for name in config.tracking.trackers:
                check_tracker(name)
            try:
                self._claim()
            except OSError as error:
                raise UserError(
                    f"cannot write to {self.path}: {error.strerror}; {way_out(error)}"
                ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Unlock the folder, so that another process may claim it."""
        if self.world.rank == 0:
            self._lock.close()

    def _claim(self) -> None:
        match self.config.resume:
            case "never" if (self.path / "config.yaml").exists():
                raise UserError(
                    f"resume=never, but {self.path} already holds a run; choose another name=..., "
                    "or resume=auto to continue it"
                )
            case "must" if not self._saved():
                raise UserError(
                    f"resume=must, but {self.checkpoints} has no checkpoint; set resume=auto to "
                    "begin a new run"
                )
            case "never" | "must" | "auto":
                pass
            case other:
                assert_never(other)
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
        (self.path / "traceback.txt").unlink(missing_ok=True)  # of an earlier start
        # A finished run that is started again, to send MLflow missing data, computes nothing.
        if not is_trained(self.config):
            self._record_environment()
        elif (self.path / "config.yaml").exists():
            return  # a smaller max_steps is not that of the run
        write_text(self.path / "config.yaml", self.config.as_yaml())

    def _record_environment(self) -> None:
        """Write environment.json; a start with another commit keeps those of earlier ones."""
        file, own = self.path / "environment.json", environment.environment()
        before = parse_json(file.read_bytes()) if file.exists() and self._saved() else {}
        own["earlier"] = before.pop("earlier", [])
        code, other = (environment.git_version(one.get("git")) for one in (own, before))
        if other not in ("", code):
            own["earlier"].append(before)
            text = "this run's code was %s before and is %s now; this may change its results"
            logger.warning(text, other, code)
        write_json(file, own)

    def _saved(self) -> bool:
        return selection.last(self.checkpoints) is not None

    def _check_same_run(self, imported: list[plugins.Imported]) -> None:
        file, metrics = self.path / "config.yaml", self.path / "metrics.jsonl"
        if not file.exists():
            return
        try:
            earlier = read_yaml(file)
        except (OSError, UserError) as error:
            raise UserError(
                f"{file} is damaged, so the run in this folder cannot be identified; restore the "
                "file, remove it if you know that the run is the same, or set another name=..."
            ) from error
        doubt, of_files = "", plugins.changes(self.path / "imports", imported)
        try:
            # Keys added since then get defaults in the earlier run; its names need its files.
            earlier = earlier if of_files else parse(earlier, str(file)).as_dict()
        except UserError as error:
            doubt = f"{file} is damaged or of another version ({error}): restore it; or "
            logger.warning("%s is of another version; its keys are compared as they are", file)
        changed = differences(earlier, self.config.as_dict()) + of_files
        # A run that failed before its first line may be corrected and started again.
        has_begun = self._saved() or (metrics.exists() and metrics.stat().st_size > 0)
        if changed and not has_begun:
            # MLflow does not allow changed parameters, so this becomes a new run there.
            (self.path / "mlflow_run_id").unlink(missing_ok=True)
        elif changed:
            # More epochs make another run as well: learning rates fall towards the last epoch.
            further = f"; to train its weights further, add init_checkpoint={self.path} to that"
            back = "set these values back"
            if (name := earlier.get("name", self.config.name)) != self.config.name:
                back = f"rename the folder back to {self.path.with_name(name)}"
            raise UserError(
                f"{doubt}{self.path} holds a run of another configuration: {'; '.join(changed)}. "
                f"To train anew, choose another name=...{further if self._saved() else ''}; "
                f"to continue this run, {back}"
            )

    def newest_checkpoint(self) -> checkpoint.Checkpoint | None:
        """Return the checkpoint to continue from, the same on every process."""
        with self.world.together():
            newest = checkpoint.newest(self.checkpoints) if self.world.rank == 0 else None
        name = self.world.from_rank_0(newest.path.name if newest else None)
        if name is None or newest is not None:
            return newest
        return checkpoint.read(self.checkpoints / name)


def is_trained(config: RunConfig) -> bool:
    """Return whether the run has finished and its last checkpoint is of the last step."""
    file = config.run_dir / "metrics.jsonl"
    lines = metrics_file.from_end(file) if file.exists() else ()
    last = next((line for line in lines if line["kind"] == "val"), None)
    if last is None:
        return False
    epochs, most = sum(phase.epochs for phase in config.phases), config.max_steps
    at_end = last["epoch"] >= epochs or (most is not None and last["step"] >= most)
    return at_end and _saved_evaluation(config) == last["step"]


def _saved_evaluation(config: RunConfig) -> int | None:
    """Return the last evaluated step that the last checkpoint records."""
    newest = selection.last(config.run_dir / "checkpoints")
    if newest is None:
        return None
    try:
        return int(json.loads((newest / checkpoint.STATE_FILE).read_text())["evaluated_step"])
    except (OSError, ValueError, KeyError):
        return None
