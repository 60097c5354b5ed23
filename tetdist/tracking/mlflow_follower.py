"""MLflow's view of a run, which follows metrics.jsonl.

A daemon thread reads the file, asks MLflow how far it is, and sends the rest, so every step is
there once, whatever was down or killed in between.

In MLflow a value stands at its optimiser step, under the name that `points_of` gives it.

Steps that a run computes again, since it was killed after its last checkpoint, MLflow may have
already. It takes nothing back, so a value that has become another, as samples_per_s does, is sent
once more, and the newest of a step counts; what is the same stands there once.

A run of several phases has a child run a phase below it in MLflow, with the phase's parameters and
those points whose lines say `"phase": N`. The run itself has all points.
"""

import contextlib
import getpass
import json
import logging
import math
import os
import re
import shlex
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, assert_never

from tetdist.errors import UserError, without_passwords
from tetdist.storage.files import write_text
from tetdist.tracking.environment import git_state
from tetdist.tracking.metrics_file import points_of, read_from
from tetdist.tracking.trackers import TrackedRun

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED", "RUNNING"]

SEND_EVERY = 2.0  # seconds; a call to MLflow costs about the same for one point as for a hundred
LONGEST_PAUSE = 60.0  # seconds between two attempts to reach a tracker that is down
BATCH = 1000  # the most metrics that MLflow takes in one call

PARENT_TAG = "mlflow.parentRunId"  # by which MLflow's pages nest runs
# By which MLflow chooses the pages of an experiment; without it, it guesses.
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
PHASE_TAG = "phase"  # the phase's number, as in the file and in the configuration: from 0


@dataclass(frozen=True)
class Dataset:
    """A split of the data, as MLflow's pages show it.

    Attributes:
        name: Of the split and the data.
        digest: Tells its content, in at most 36 characters.
        source: Where it is.
        context: "training" or "validation".
        profile: Sizes, by name.
    """

    name: str
    digest: str
    source: str
    context: str
    profile: Mapping[str, int]


class MLflowFollower:
    """The thread that keeps MLflow level with the file.

    The training thread only sets `tags`, `artifacts`, `model`, `phase`, `status` and `closing`;
    this one only reads them. Single operations on a dict are atomic, hence no locks.

    Args:
        path: The run's metrics.jsonl.
        run: The run.
        uri, experiment, artifact_root, datasets, note: As of `Tracker`.
        phases: As of `Tracker`; empty: no child runs.
    """

    def __init__(
        self,
        path: Path,
        run: TrackedRun,
        *,
        uri: str,
        experiment: str,
        artifact_root: Path,
        phases: Sequence[Mapping[str, Any]],
        datasets: Sequence[Dataset],
        note: str | None,
    ) -> None:
        self.path, self.run, self.phases, self.datasets = path, run, phases, datasets
        self.uri, self.experiment, self.artifact_root = uri, experiment, artifact_root

        self.tags = dict(run.tags) | ({} if note is None else {"mlflow.note.content": note})
        self.phase: int | None = None  # the one that runs; None: none was entered yet
        self.artifacts: dict[Path, int] = {}  # how often each was announced
        # An artifact, its name in the registry, and the description of that version of it.
        self.model: tuple[Path, str, str] | None = None
        self.status: Status = "RUNNING"
        self.closing = threading.Event()

        # What MLflow had, of each of its runs, before this process sent anything: see `_Receiver`.
        self.had: dict[str, dict[str, int]] = {}
        self.sent = 0  # lines of the file that MLflow has
        self.complete = False
        self.trouble = ""
        self.thread = threading.Thread(target=self._follow, name="mlflow-follower", daemon=True)

        _set_mlflow_up()

    def close(self, status: Status, timeout: float) -> bool:
        """Send what is left and end, in so many seconds; whether MLflow has everything."""
        self.status = status
        self.closing.set()
        self.thread.join(timeout)
        return self.complete

    def _follow(self) -> None:
        session: _Session | None = None
        failures = 0
        while True:
            # Both are asked before sending, so that what was logged before close(), or before the
            # next phase began, is surely sent before a run is called finished.
            closing, phase = self.closing.is_set(), self.phase
            try:
                if session is None:
                    session = _Session(self, system_metrics=not closing)
                session.send_points()
                session.show_phases(phase, self.status if closing else None)
                if closing:
                    # Artifacts come later, lest a full artifact store leave the run unfinished.
                    session.end(self.status)
                session.send_artifacts()
                session.register_model()
            except Exception as error:
                failures += 1
                self.trouble = first_line(error)
                # One failure is often two jobs that open the same database; it passes.
                if failures == 2:
                    logger.warning(
                        "MLflow at %s: %s. Training goes on, %s has everything, and MLflow gets it "
                        "as soon as it takes it again",
                        without_passwords(self.uri),
                        self.trouble,
                        self.path,
                    )
                if session is not None:
                    session.stop_system_metrics()
                    session = None
                if closing and failures >= 3:
                    return
                pause = min(2.0 ** (failures - 1), LONGEST_PAUSE)
            else:
                if failures >= 2:
                    logger.info(
                        "MLflow at %s is back and has everything", without_passwords(self.uri)
                    )
                failures, self.trouble = 0, ""
                if closing:
                    self.complete = True
                    return
                pause = SEND_EVERY
            if closing:
                time.sleep(0.3)
            else:
                self.closing.wait(pause)


class _Receiver:
    """A run in MLflow: what it has, and what is about to be sent to it."""

    def __init__(self, run: Any) -> None:
        self.run_id: str = run.info.run_id
        self.status: str = run.info.status
        self.params = set(run.data.params)
        # The last step of each kind. The protobuf form is the public one that shows the step of
        # each metric's newest value.
        self.have: dict[str, int] = {}
        for metric in run.data.to_proto().metrics:
            kind = metric.key.partition("/")[0]
            self.have[kind] = max(metric.step, self.have.get(kind, -1))
        self.batch: list[Any] = []
        self._newest: dict[str, dict[int, tuple[int, float]]] = {}

    def lacks(self, line: dict[str, Any]) -> bool:
        return line["step"] > self.have.get(line["kind"], -1)

    def changed(self, points: Sequence[Any], client: Any) -> list[Any]:
        """The points whose values differ from the newest ones that MLflow has of their steps."""
        return [p for p in points if _stored(p.value) != self._value(p.key, p.step, client)]

    def _value(self, key: str, step: int, client: Any) -> float | str | None:
        if key not in self._newest:
            newest: dict[int, tuple[int, float]] = {}
            for metric in client.get_metric_history(self.run_id, key):
                entry = metric.timestamp, metric.value
                newest[metric.step] = max(newest.get(metric.step, entry), entry)
            self._newest[key] = newest
        known = self._newest[key].get(step)
        return None if known is None else _stored(known[1])


class _Session:
    """One unbroken acquaintance with MLflow.

    After any failure a new one begins and asks MLflow afresh what it has, so it does not matter
    whether a request that failed had its effect or not.
    """

    def __init__(self, follower: MLflowFollower, *, system_metrics: bool) -> None:
        self._follower = follower
        self._run_dir = follower.run.folder
        self._client = new_client(follower.uri)
        run = self._known_run() or _create_run(
            self._client,
            self._run_dir,
            uri=follower.uri,
            experiment=follower.experiment,
            artifact_root=follower.artifact_root,
            run_name=follower.run.name,
        )
        self._run = _Receiver(run)
        self._run_id = self._run.run_id
        self._set_status(self._run, "RUNNING")

        if (step := follower.run.resume_step) is not None:
            # Each process that resumes notes it once, whatever its number of sessions.
            noted = run.data.tags.get("resumed_at_step")
            note = f"{noted}, {step}" if noted else str(step)
            follower.tags.setdefault("resumed_at_step", note)
        self._send_params(self._run, follower.run.params)
        self._send_datasets()

        self._experiment_id: str = run.info.experiment_id
        self._phases = self._known_phases() if follower.phases else {}
        self._last_phase: int | None = None  # of the lines read so far

        self._offset = 0
        self._lines = 0
        self._tags: dict[str, str] = {}
        self._artifacts: dict[Path, int] = {}
        self._monitor: Any = None
        if system_metrics:
            self._start_system_metrics()

    def _known_run(self) -> Any:
        """Return the run of an earlier session, or None."""
        id_file = self._run_dir / "mlflow_run_id"
        if not id_file.exists():
            return None
        run = _get_run(self._client, id_file)
        if run is None or run.info.lifecycle_stage != "active":
            logger.warning(
                "MLflow at %s does not know run %s (any more): sending all of %s to a new one",
                without_passwords(self._follower.uri),
                id_file.read_text().strip(),
                self._follower.path,
            )
            return None
        return run

    def _start_system_metrics(self) -> None:
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            monitor = SystemMetricsMonitor(
                self._run_id, resume_logging=True, tracking_uri=self._follower.uri
            )
        except Exception as error:  # no psutil, or a device that it cannot read
            logger.debug("no system metrics: %s", error)
            return
        monitor.start()
        self._monitor = monitor

    def stop_system_metrics(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None

    def _known_phases(self) -> dict[int, _Receiver]:
        """Find the phases' runs of earlier sessions, by their tags."""
        found: dict[int, _Receiver] = {}
        for run in self._client.search_runs(
            [self._experiment_id],
            f"tags.`{PARENT_TAG}` = '{self._run_id}'",
            order_by=["attributes.start_time ASC"],
        ):
            number = run.data.tags.get(PHASE_TAG, "")
            # A user may have hung runs of another kind below ours.
            if not number.isdecimal() or int(number) >= len(self._follower.phases):
                continue
            phase = _Receiver(run)
            # A request to create a run whose answer was lost leaves a twin. The one that got
            # points, or else the older one, goes on.
            twin = found.get(int(number))
            if twin is None or (phase.have and not twin.have):
                found[int(number)] = phase
        for number, phase in found.items():
            self._send_params(phase, self._follower.phases[number])
        return found

    def _phase(self, number: int) -> _Receiver:
        """Return the run of a phase, made when missing."""
        if number not in self._phases:
            params = self._follower.phases[number]
            of_run = {_allowed(key): value for key, value in self._follower.run.tags.items()}
            of_phase = {"timesteps": str(params["timesteps"]), PHASE_TAG: str(number)}
            run = self._client.create_run(
                self._experiment_id,
                run_name=f"phase {number}: T={params['timesteps']}",
                tags=of_run | of_phase | _origin() | {PARENT_TAG: self._run_id},
            )
            self._phases[number] = _Receiver(run)
            self._send_params(self._phases[number], params)
        return self._phases[number]

    def _send_params(self, receiver: _Receiver, params: Mapping[str, Any]) -> None:
        import mlflow

        missing = [
            mlflow.entities.Param(key, str(value))
            for name, value in params.items()
            if (key := _allowed(name)) not in receiver.params
        ]
        self._client.log_batch(receiver.run_id, params=missing)

    def _set_status(self, receiver: _Receiver, status: Status) -> None:
        if receiver.status == status:
            return
        match status:
            case "RUNNING":
                self._client.update_run(receiver.run_id, status=status)
            case "FINISHED" | "FAILED" | "KILLED":
                self._client.set_terminated(receiver.run_id, status)
            case other:
                assert_never(other)
        receiver.status = status

    def send_points(self) -> None:
        """Send the lines that are new in the file, and the tags that have changed."""
        import mlflow

        lines, self._offset = read_from(self._follower.path, self._offset)
        for line in lines:
            receivers = [self._run]
            number = line.get("phase")
            if isinstance(number, int) and number < len(self._follower.phases):
                receivers.append(self._phase(number))
                self._last_phase = number
            points = [
                mlflow.entities.Metric(
                    _allowed(name), value, int(line["time"] * 1000), line["step"]
                )
                for name, value in points_of(line)
            ]
            for receiver in receivers:
                # A line goes whole, because what MLflow has is asked by step.
                missing = points
                if not receiver.lacks(line):
                    again = self._is_computed_again(line, receiver)
                    missing = receiver.changed(points, self._client) if again else []
                if len(receiver.batch) + len(missing) > BATCH:
                    self._send_batches()
                receiver.batch += missing
            self._lines += 1
        self._send_batches()

        tags = dict(self._follower.tags)
        if tags != self._tags:
            entities = [mlflow.entities.RunTag(_allowed(key), tags[key]) for key in tags]
            self._client.log_batch(self._run_id, tags=entities)
            self._tags = tags

    def _is_computed_again(self, line: dict[str, Any], receiver: _Receiver) -> bool:
        """Return whether this process computed a step that MLflow has from an earlier one."""
        resumed, had = self._follower.run.resume_step, self._follower.had
        earlier = had.setdefault(receiver.run_id, dict(receiver.have))
        return resumed is not None and resumed < line["step"] <= earlier.get(line["kind"], -1)

    def _send_batches(self) -> None:
        for receiver in (self._run, *self._phases.values()):
            if receiver.batch:
                self._client.log_batch(receiver.run_id, metrics=receiver.batch)
                receiver.batch = []
        self._follower.sent = max(self._follower.sent, self._lines)

    def show_phases(self, present: int | None, ending: Status | None) -> None:
        """Give the phases' runs the states that they are in.

        Args:
            present: The phase that was entered last, if any was.
            ending: The run's state from now on, if it ends; None while it runs.
        """
        if present is None and ending is not None:
            # It ended before any phase was entered, as a finished run that is started again does.
            present = self._last_phase
        if present is None or not self._follower.phases:
            return
        self._phase(present)
        for number, phase in self._phases.items():
            if number < present:
                self._set_status(phase, "FINISHED")
            elif number == present:
                self._set_status(phase, ending or "RUNNING")
            else:
                # It began before a resume from an earlier phase, and will begin again.
                self._set_status(phase, "KILLED")

    def send_artifacts(self) -> None:
        for path, version in list(self._follower.artifacts.items()):
            if version == self._artifacts.get(path) or not path.is_file():
                continue
            self._client.log_artifact(self._run_id, str(path), self._artifact_folder(path))
            self._artifacts[path] = version

    def _artifact_folder(self, path: Path) -> str | None:
        """Return where among the run's artifacts a file goes; None: to the top."""
        folder = path.parent
        inside = folder != self._run_dir and folder.is_relative_to(self._run_dir)
        return folder.relative_to(self._run_dir).as_posix() if inside else None

    def _send_datasets(self) -> None:
        from mlflow.entities import Dataset as Entity
        from mlflow.entities import DatasetInput, InputTag

        # What MLflow has of the same name and digest it does not take twice.
        entries = [
            DatasetInput(
                Entity(
                    name=dataset.name,
                    digest=dataset.digest,
                    source_type="local",
                    source=json.dumps({"uri": dataset.source}),
                    profile=json.dumps(dict(dataset.profile)),
                ),
                [InputTag("mlflow.data.context", dataset.context)],
            )
            for dataset in self._follower.datasets
        ]
        if entries:
            self._client.log_inputs(self._run_id, entries)

    def register_model(self) -> None:
        """Register what was asked for, once, when the artifact is there."""
        if self._follower.model is None:
            return
        path, name, description = self._follower.model
        if path not in self._artifacts:
            return
        import mlflow

        run = self._client.get_run(self._run_id)
        source = f"{run.info.artifact_uri}/{self._artifact_folder(path)}"
        try:
            self._client.create_registered_model(name)
        except mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = self._client.search_model_versions(f"run_id = '{self._run_id}'")
        if not any(version.name == name and version.source == source for version in versions):
            self._client.create_model_version(
                name, source, run_id=self._run_id, description=description
            )

    def end(self, status: Status) -> None:
        # The monitor ends by itself, without its last values, when it sees a run that does not
        # run: so it is stopped first.
        self.stop_system_metrics()
        self._set_status(self._run, status)


def _get_run(client: Any, id_file: Path) -> Any:
    """Return the run in MLflow whose id a file holds; None if MLflow has no such run."""
    import mlflow

    try:
        return client.get_run(id_file.read_text().strip())
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def find_run(run_dir: Path, uri: str) -> Any:
    """Return the run in MLflow of a run's folder; None if MLflow has none.

    Its status is FINISHED only when MLflow has all of its points.

    Raises:
        UserError: MLflow does not answer.
    """
    id_file = run_dir / "mlflow_run_id"
    if not id_file.exists():
        return None
    try:
        return _get_run(new_client(uri), id_file)
    except Exception as error:  # MLflow raises many kinds
        raise UserError(f"MLflow at {without_passwords(uri)}: {first_line(error)}") from error


def announce(
    run_dir: Path,
    *,
    run_name: str,
    uri: str,
    experiment: str,
    artifact_root: Path,
    tags: Mapping[str, str],
    status: str | None,
) -> str | None:
    """Tell MLflow of a run from outside of it, while no process trains: queued, cancelled, ...

    The run is made if MLflow does not have it yet; the training process will find and use it.

    Args:
        run_dir: The run's folder, which exists.
        status: RUNNING, SCHEDULED, FINISHED, FAILED or KILLED; None: as it is.
        run_name, uri, experiment, artifact_root, tags: As of `Tracker`.

    Returns:
        The run's MLflow id; None if MLflow does not answer, which is only warned of: the run gets
        there when it trains.
    """
    try:
        client = new_client(uri)
        id_file = run_dir / "mlflow_run_id"
        run_id = id_file.read_text().strip() if id_file.exists() else None
        if run_id is None:
            run = _create_run(
                client,
                run_dir,
                uri=uri,
                experiment=experiment,
                artifact_root=artifact_root,
                run_name=run_name,
            )
            run_id = str(run.info.run_id)
        for key, value in tags.items():
            client.set_tag(run_id, _allowed(key), value)
        if status in ("FINISHED", "FAILED", "KILLED"):
            client.set_terminated(run_id, status)
        elif status is not None:
            client.update_run(run_id, status=status)
    except Exception as error:
        logger.warning(
            "MLflow at %s: %s; the run goes on without it",
            without_passwords(uri),
            first_line(error),
        )
        return None
    return run_id


def run_address(uri: str, run_id: str) -> str | None:
    """Return a run's address on a server; None for a local store, which has no server by itself."""
    if not is_server(uri):
        return None
    try:
        import mlflow

        run = mlflow.MlflowClient(tracking_uri=uri).get_run(run_id)
    except Exception:  # announce() has said what is wrong
        return None
    return (
        f"{without_passwords(uri).rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{run_id}"
    )


def _set_mlflow_up() -> None:
    """Bound how long MLflow tries, before it is imported; what the environment says stands."""
    # By default MLflow tries for four minutes, then 120 s more for the last answer: close() would
    # leave everything behind. Here the pauses between attempts are ours.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # Usage statistics would go out to the internet, which compute nodes seldom reach.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def new_client(uri: str) -> Any:
    """Return a client of a tracker, whose database is made if need be; MLflow itself says little.

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


def _create_run(
    client: Any, run_dir: Path, *, uri: str, experiment: str, artifact_root: Path, run_name: str
) -> Any:
    """Make a run, and its experiment when missing, and note its id in the run's folder."""
    import mlflow

    found = client.get_experiment_by_name(experiment)
    if found is not None:
        experiment_id = found.experiment_id
        if KIND_TAG not in found.tags:  # of an earlier version, or made by hand
            client.set_experiment_tag(experiment_id, KIND_TAG, KIND)
    else:
        # A server's own location works for all who can reach the server; a path of this machine
        # would not.
        location = None if is_server(uri) else artifact_root.absolute().as_uri()
        try:
            experiment_id = client.create_experiment(
                experiment, artifact_location=location, tags={KIND_TAG: KIND}
            )
        except mlflow.exceptions.MlflowException:
            # Another run may have been faster.
            found = client.get_experiment_by_name(experiment)
            if found is None:
                raise
            experiment_id = found.experiment_id
    run = client.create_run(experiment_id, run_name=run_name, tags=_origin())
    write_text(run_dir / "mlflow_run_id", run.info.run_id + "\n")
    return run


def _stored(value: float) -> float | str:
    """A value as MLflow stores it, made comparable."""
    if math.isnan(value):
        return "NaN"
    return max(-sys.float_info.max, min(sys.float_info.max, value))


def _allowed(name: str) -> str:
    """Replace the characters that MLflow takes in no name."""
    return re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII)[:250]


def _prepare_database(path: Path) -> None:
    """Make MLflow's SQLite database if there is none, and see that it can be read.

    MLflow sets it up over seconds and many steps. Two processes at once, or a kill in between,
    leave a database that no later attempt can mend; so it appears all at once, set up.
    """
    import mlflow

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=path.parent) as folder:
            draft, ready = Path(folder, "draft.db"), Path(folder, "ready.db")
            mlflow.MlflowClient(tracking_uri=f"sqlite:///{draft}").search_experiments()
            # A copy, because MLflow holds the draft open.
            shutil.copyfile(draft, ready)
            try:
                path.hardlink_to(ready)  # unlike a rename, never over the one of a faster process
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                if not path.exists():
                    ready.rename(path)
    # MLflow itself would try for 100 s before it says that it cannot open a database.
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA schema_version")


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def first_line(error: Exception) -> str:
    """The first line of what MLflow raises, without passwords."""
    text = str(error).strip() or type(error).__name__
    # The reason of a refused connection is at the end of a long line, the request at its start.
    reason = re.search(r"Caused by \w+\((.*)\)\)?$", text.splitlines()[0])
    return without_passwords((reason[1] if reason else text.splitlines()[0]).strip("\"'"))[:300]


def _origin() -> dict[str, str]:
    """The tags that MLflow's pages show as a run's user, source and version."""
    tags = {
        "mlflow.source.name": Path(sys.argv[0]).name,
        "mlflow.source.type": "JOB" if "SLURM_JOB_ID" in os.environ else "LOCAL",
    }
    # In containers the user's number often has no name.
    with contextlib.suppress(KeyError, OSError):
        tags["mlflow.user"] = getpass.getuser()
    commit = git_state().get("commit")
    if commit:
        tags["mlflow.source.git.commit"] = commit
    return tags


def ui_command(tracking_uri: str) -> str:
    """Say how to look at a tracker: the command for a local store, the address of a server.

    MLflow listens on 127.0.0.1:5000 unless told otherwise, so no address is needed to keep it from
    the network.
    """
    if is_server(tracking_uri):
        return without_passwords(tracking_uri)
    # In an environment that is not activated, `mlflow` alone would not be found.
    program = "mlflow" if shutil.which("mlflow") else str(Path(sys.executable).with_name("mlflow"))
    return shlex.join([program, "ui", "--backend-store-uri", without_passwords(tracking_uri)])
