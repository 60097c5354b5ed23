"""The MLflow logger of a run, which sends metrics.jsonl to MLflow.

A daemon thread reads the file, queries MLflow's last steps, and sends the rest. So every step gets
there once, despite outages and kills.

In MLflow a value has its optimiser step, and its name from `points_of`.

After a kill, a run computes the steps since its last checkpoint again, and MLflow may have them
already. MLflow cannot delete values, so a changed value, such as samples_per_s, is sent again, and
the newest one of a step counts; an unchanged value is not sent again.

A run of several phases has a child run per phase in MLflow, with the phase's parameters and the
points of lines with `"phase": N`. The run itself has all points.
"""

import contextlib
import getpass
import json
import logging
import math
import os
import re
import secrets
import shlex
import shutil
import sqlite3
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tetdist.errors import UserError, without_passwords
from tetdist.storage.files import locked, remove, write_text
from tetdist.tracking.environment import git_state
from tetdist.tracking.metrics_file import points_of
from tetdist.tracking.trackers import Status, TrackedRun, first_line

if TYPE_CHECKING:
    from tetdist.config.schema import RunConfig

logger = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"  # MLflow's pages nest runs by it
# MLflow chooses the pages of an experiment by it; without it, MLflow guesses.
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
PHASE_TAG = "phase"  # the phase's number, as in the file and in the configuration: from 0


@dataclass(frozen=True)
class Destination:
    """The place of a run in MLflow.

    Attributes:
        uri: A server's http(s) address or an absolute sqlite:/// URI.
        experiment: The experiment's name, made when missing.
        artifact_root: Folder for the files of a new experiment in a local store; a server chooses
            its own.
    """

    uri: str
    experiment: str
    artifact_root: Path

    @classmethod
    def of(cls, config: "RunConfig") -> "Destination | None":
        """Return the place of a configuration's run; None without MLflow."""
        if config.tracking_uri is None:
            return None
        root = Path(config.runs_dir).absolute() / "mlartifacts"
        return cls(config.tracking_uri, config.tracking.experiment, root)


class MLflow:
    """MLflow as a tracker of one run, with tags, artifacts, model and phase besides its metrics.

    The training thread only sets `tags`, `artifacts`, `model` and `phase`; the tracker's thread
    only reads them. Single operations on a dict are atomic, hence no locks.
    """

    from_first_line: ClassVar[bool] = True

    def __init__(self, destination: Destination, run: TrackedRun) -> None:
        self.destination = destination
        self.tags = dict(run.tags)
        if run.note is not None:
            self.tags["mlflow.note.content"] = run.note
        self.phase: int | None = None  # the current one; None before the first
        self.artifacts: dict[Path, int] = {}  # number of announcements of each
        # An artifact, its name in the registry, and the description of that version of it.
        self.model: tuple[Path, str, str] | None = None
        self.monitor: Any = None  # MLflow's system metrics
        _set_mlflow_up()

    def __call__(self, run: TrackedRun) -> "_Session":
        return _Session(self, run)

    def start_monitor(self, run_id: str) -> None:
        """Start MLflow's system metrics, in place of a monitor that an outage has ended."""
        self.stop_monitor()
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self.monitor = SystemMetricsMonitor(
                run_id, resume_logging=True, tracking_uri=self.destination.uri
            )
        except Exception as error:  # no psutil, or a device that it cannot read
            logger.debug("no system metrics: %s", error)
            return
        self.monitor.start()

    def stop_monitor(self) -> None:
        if self.monitor is not None:
            self.monitor.finish()
            self.monitor = None


class _Receiver:
    """A run in MLflow: the points that it has, and those to be sent.

    Args:
        params: Parameters of `run`; MLflow does not let existing ones change.
    """

    def __init__(
        self, client: Any, run: Any, tracked: TrackedRun, params: Mapping[str, Any]
    ) -> None:
        import mlflow

        self._client = client
        self.run_id: str = run.info.run_id
        self.status: str = run.info.status
        again_after = tracked.resume_step
        self._again_after = math.inf if again_after is None else again_after
        # The last step of each metric. The protobuf form is the public one that shows it.
        self.have: dict[str, int] = {m.key: m.step for m in run.data.to_proto().metrics}
        self._last: dict[str, int] = {}  # of each kind of line
        for key, step in self.have.items():
            kind = key.partition("/")[0]
            self._last[kind] = max(step, self._last.get(kind, -1))
        self._newest: dict[str, dict[int, float | str]] = {}
        self._batch: list[Any] = []
        known = ((_allowed(name), str(value)) for name, value in params.items())
        missing = [mlflow.entities.Param(*pair) for pair in known if pair[0] not in run.data.params]
        client.log_batch(self.run_id, params=missing)

    def add(self, line: dict[str, Any]) -> None:
        """Queue the points of a line that are missing in MLflow or have another value there.

        Points are sent in the file's order, so only a kind's last line may be incomplete.
        """
        import mlflow

        step = line["step"]
        if step < self._last.get(line["kind"], -1) and step <= self._again_after:
            return
        for name, value in points_of(line):
            key = _allowed(name)
            if step > self.have.get(key, -1) or (
                step > self._again_after and self._newest_of(key).get(step) != _stored(value)
            ):
                time = int(line["time"] * 1000)
                self._batch.append(mlflow.entities.Metric(key, value, time, step))

    def _newest_of(self, key: str) -> dict[int, float | str]:
        """Return MLflow's values of the steps that are computed again."""
        if key not in self._newest:
            history = self._client.get_metric_history(self.run_id, key)
            again = (metric for metric in history if metric.step > self._again_after)
            ordered = sorted(again, key=lambda metric: (metric.timestamp, metric.value))
            self._newest[key] = {metric.step: _stored(metric.value) for metric in ordered}
        return self._newest[key]

    def send(self) -> None:
        self._client.log_batch(self.run_id, metrics=self._batch)
        self._batch = []

    def set_status(self, status: Status) -> None:
        if self.status != status:
            _set_status(self._client, self.run_id, status)
            self.status = status


class _Session:
    """A session with MLflow without failures.

    After any failure a new session queries MLflow's state again, so it does not matter whether the
    failed request had an effect.
    """

    def __init__(self, mlflow: MLflow, run: TrackedRun) -> None:
        self._mlflow, self._tracked = mlflow, run
        self._client = new_client(mlflow.destination.uri)
        found = _known_run(self._client, run.folder) or _create_run(
            self._client, run.folder, mlflow.destination, run.name
        )
        self._run = _Receiver(self._client, found, run, run.params)
        self._run.set_status("RUNNING")
        if run.resume_step is not None:
            # Each process that resumes notes it once, in however many sessions.
            noted = found.data.tags.get("resumed_at_step")
            note = f"{noted}, {run.resume_step}" if noted else str(run.resume_step)
            mlflow.tags.setdefault("resumed_at_step", note)
        self._send_datasets()

        self._experiment_id: str = found.info.experiment_id
        # A single phase is the run itself.
        self._phase_params = run.phases if len(run.phases) > 1 else ()
        self._phases: dict[int, _Receiver] = {}
        self._find_phases()
        self._last_phase: int | None = None  # of the lines so far

        self._tags: dict[str, str] = {}
        self._artifacts: dict[Path, int] = {}
        mlflow.start_monitor(self._run.run_id)

    def _find_phases(self) -> None:
        """Find the phases' runs of earlier sessions, by their tags."""
        if not self._phase_params:
            return
        for run in self._client.search_runs(
            [self._experiment_id],
            f"tags.`{PARENT_TAG}` = '{self._run.run_id}'",
            # A lost response to creating a run leaves a duplicate; the older run is used.
            order_by=["attributes.start_time DESC"],
        ):
            number = run.data.tags.get(PHASE_TAG, "")
            # Users may have added other child runs.
            if number.isdecimal() and int(number) < len(self._phase_params):
                self._phases[int(number)] = self._receiver(run, int(number))

    def _receiver(self, run: Any, phase: int) -> _Receiver:
        return _Receiver(self._client, run, self._tracked, self._phase_params[phase])

    def _phase(self, number: int) -> _Receiver:
        """Return the run of a phase, made when missing."""
        if number not in self._phases:
            params = self._phase_params[number]
            of_run = {_allowed(key): value for key, value in self._tracked.tags.items()}
            of_phase = {"timesteps": str(params["timesteps"]), PHASE_TAG: str(number)}
            run = self._client.create_run(
                self._experiment_id,
                run_name=f"phase {number}: T={params['timesteps']}",
                tags=of_run | of_phase | _origin() | {PARENT_TAG: self._run.run_id},
            )
            self._phases[number] = self._receiver(run, number)
        return self._phases[number]

    def log(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            self._run.add(line)
            number = line.get("phase")
            if isinstance(number, int) and number < len(self._phase_params):
                self._phase(number).add(line)
                self._last_phase = number
        for receiver in (self._run, *self._phases.values()):
            receiver.send()

    def show(self, ending: Status | None = None) -> None:
        """Send tags, phases and artifacts, and the final state if given."""
        tags = dict(self._mlflow.tags)
        if tags != self._tags:
            _set_tags(self._client, self._run.run_id, tags)
            self._tags = tags
        self._show_phases(ending)
        if ending is not None:
            # The monitor would end without its last values once the run has ended: stop it first.
            self._mlflow.stop_monitor()
            # Artifacts come later, so that a full artifact store does not leave the run unfinished.
            self._run.set_status(ending)
        self._send_artifacts()
        self._register_model()

    def close(self, status: Status) -> None:
        self.show(status)

    def _show_phases(self, ending: Status | None) -> None:
        """Set the states of the phases' runs."""
        present = self._mlflow.phase
        if present is None and ending is not None:
            # It ended before entering a phase, as a finished run does when started again.
            present = self._last_phase
        if present is None or not self._phase_params:
            return
        self._phase(present)
        for number, phase in self._phases.items():
            if number < present:
                phase.set_status("FINISHED")
            elif number == present:
                phase.set_status(ending or "RUNNING")
            else:
                # It began before a resume from an earlier phase, and will run again.
                phase.set_status("KILLED")

    def _send_artifacts(self) -> None:
        for path, version in list(self._mlflow.artifacts.items()):
            if version == self._artifacts.get(path) or not path.is_file():
                continue
            self._client.log_artifact(self._run.run_id, str(path), self._artifact_folder(path))
            self._artifacts[path] = version

    def _artifact_folder(self, path: Path) -> str | None:
        """Return the folder of a file among the run's artifacts; None for the top."""
        folder = path.parent
        inside = folder != self._tracked.folder and folder.is_relative_to(self._tracked.folder)
        return folder.relative_to(self._tracked.folder).as_posix() if inside else None

    def _send_datasets(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # MLflow ignores a data set of the same name and digest.
        entries = [
            DatasetInput(
                Dataset(
                    name=dataset.name,
                    digest=dataset.digest,
                    source_type="local",
                    source=json.dumps({"uri": dataset.source}),
                    profile=json.dumps(dict(dataset.profile)),
                ),
                [InputTag("mlflow.data.context", dataset.context)],
            )
            for dataset in self._tracked.datasets
        ]
        if entries:
            self._client.log_inputs(self._run.run_id, entries)

    def _register_model(self) -> None:
        """Register the requested model once, when its artifact is in MLflow."""
        if self._mlflow.model is None:
            return
        path, name, description = self._mlflow.model
        if path not in self._artifacts:
            return
        import mlflow

        run = self._client.get_run(self._run.run_id)
        source = f"{run.info.artifact_uri}/{self._artifact_folder(path)}"
        try:
            self._client.create_registered_model(name)
        except mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = self._client.search_model_versions(f"run_id = '{run.info.run_id}'")
        if not any(version.name == name and version.source == source for version in versions):
            self._client.create_model_version(
                name, source, run_id=run.info.run_id, description=description
            )


def _known_run(client: Any, run_dir: Path) -> Any:
    """Return the MLflow run of a run's folder; None if MLflow does not have it (any more)."""
    import mlflow

    id_file = run_dir / "mlflow_run_id"
    if not id_file.exists():
        return None
    run_id, run = id_file.read_text().strip(), None
    try:
        run = client.get_run(run_id)
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    if run is None or run.info.lifecycle_stage != "active":
        logger.warning(
            "MLflow at %s does not have run %s (any more); sending all of %s to a new run",
            without_passwords(client.tracking_uri),
            run_id,
            run_dir / "metrics.jsonl",
        )
        return None
    return run


def find_run(run_dir: Path, uri: str) -> Any:
    """Return the MLflow run of a run's folder; None if MLflow does not have it.

    Its status is FINISHED only if MLflow has all of its points.
    """
    try:
        return _known_run(new_client(uri), run_dir)
    except Exception as error:  # MLflow raises many kinds
        raise UserError(f"MLflow at {without_passwords(uri)}: {first_line(error)}") from error


def announce(
    run_dir: Path,
    run_name: str,
    destination: Destination,
    tags: Mapping[str, str],
    status: str | None,
) -> str | None:
    """Set the state of a run in MLflow while no process trains it: queued, cancelled, ...

    The run is made if missing; the training process will find and use it.

    Args:
        status: RUNNING, SCHEDULED, FINISHED, FAILED or KILLED; None: unchanged.

    Returns:
        The run's MLflow id; None, with a warning, if MLflow does not answer. The run is then sent
        when it trains.
    """
    try:
        client = new_client(destination.uri)
        run = _known_run(client, run_dir) or _create_run(client, run_dir, destination, run_name)
        run_id = str(run.info.run_id)
        _set_tags(client, run_id, tags)
        if status is not None:
            _set_status(client, run_id, status)
    except Exception as error:
        logger.warning(
            "MLflow at %s failed: %s. The run goes on without it, and is sent when it trains",
            without_passwords(destination.uri),
            first_line(error),
        )
        return None
    return run_id


def _set_mlflow_up() -> None:
    """Limit the time of MLflow's retries, unless environment variables are set."""
    # By default MLflow retries for four minutes and waits 120 s more for the last response, longer
    # than close() waits. Here the tracker's thread retries instead.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # Usage statistics would need the internet, which compute nodes seldom have.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def new_client(uri: str) -> Any:
    """Return a client of an MLflow store, and make its database if missing; quieten MLflow's log.

    Raises:
        Exception: One of MLflow's many kinds.
    """
    _set_mlflow_up()
    import mlflow

    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        for name in ("mlflow", "alembic", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.ERROR)
    if uri.startswith("sqlite:///"):
        _prepare_database(Path(uri.removeprefix("sqlite:///")))
    return mlflow.MlflowClient(tracking_uri=uri)


def _create_run(client: Any, run_dir: Path, destination: Destination, run_name: str) -> Any:
    """Make a run, with its experiment if missing, and write its id into the run's folder."""
    import mlflow

    name = destination.experiment
    found = client.get_experiment_by_name(name)
    if found is None:
        # A server's own location works for all its users; a path of this machine would not.
        local = not is_server(destination.uri)
        location = destination.artifact_root.as_uri() if local else None
        try:
            client.create_experiment(name, artifact_location=location, tags={KIND_TAG: KIND})
        except mlflow.exceptions.MlflowException:
            # Another run may have made it meanwhile.
            if client.get_experiment_by_name(name) is None:
                raise
        found = client.get_experiment_by_name(name)
    elif KIND_TAG not in found.tags:  # of an earlier version, or made by hand
        client.set_experiment_tag(found.experiment_id, KIND_TAG, KIND)
    run = client.create_run(found.experiment_id, run_name=run_name, tags=_origin())
    write_text(run_dir / "mlflow_run_id", run.info.run_id + "\n")
    return run


def _set_tags(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    import mlflow

    entities = [mlflow.entities.RunTag(_allowed(key), value) for key, value in tags.items()]
    client.log_batch(run_id, tags=entities)


def _set_status(client: Any, run_id: str, status: str) -> None:
    if status in ("FINISHED", "FAILED", "KILLED"):
        client.set_terminated(run_id, status)
    else:
        client.update_run(run_id, status=status)


def _stored(value: float) -> float | str:
    """Return a value as MLflow stores it, in a comparable form."""
    if math.isnan(value):
        return "NaN"
    return max(-sys.float_info.max, min(sys.float_info.max, value))


def _allowed(name: str) -> str:
    """Replace the characters that MLflow does not allow in names."""
    return re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII)[:250]


def _prepare_database(path: Path) -> None:
    """Make MLflow's SQLite database if missing, and check that it can be read.

    MLflow's setup takes seconds and many steps. Two processes at once, or a kill meanwhile, would
    leave a database that cannot be repaired; so it is set up aside and then linked in one step.
    """
    import mlflow

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent):
            for leftover in path.parent.glob(f".{path.name}.*.tmp*"):
                remove(leftover)  # of a process that was killed
            # MLflow keeps opened databases in memory, so each attempt needs another name.
            draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            if not path.exists():
                mlflow.MlflowClient(tracking_uri=f"sqlite:///{draft}").search_experiments()
                try:
                    path.hardlink_to(draft)  # unlike a rename, never replaces another node's
                except FileExistsError:
                    pass
                except OSError:  # a file system without hard links
                    draft.rename(path)
                remove(draft)
    # MLflow itself would retry for 100 s before failing to open a database.
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA schema_version")


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _origin() -> dict[str, str]:
    """Return the tags that MLflow's pages show as a run's user, source and version."""
    tags = {
        "mlflow.source.name": Path(sys.argv[0]).name,
        "mlflow.source.type": "JOB" if "SLURM_JOB_ID" in os.environ else "LOCAL",
    }
    # In containers the user id often has no name.
    with contextlib.suppress(KeyError, OSError):
        tags["mlflow.user"] = getpass.getuser()
    commit = git_state().get("commit")
    if commit:
        tags["mlflow.source.git.commit"] = commit
    return tags


def ui_command(tracking_uri: str, run_id: str | None = None) -> str:
    """Return the command that shows a local store, or the address of a server.

    MLflow listens on 127.0.0.1:5000 by default, so it is not exposed to the network.

    Args:
        run_id: Run whose page on a server to return.
    """
    shown = without_passwords(tracking_uri)
    if is_server(tracking_uri):
        return f"{shown.rstrip('/')}/#/runs/{run_id}" if run_id else shown
    # Without an activated environment, `mlflow` alone would not be found.
    program = "mlflow" if shutil.which("mlflow") else str(Path(sys.executable).with_name("mlflow"))
    return shlex.join([program, "ui", "--workers", "1", "--backend-store-uri", shown])
