"""The MLflow logger of a run, which sends metrics.jsonl to MLflow.

A daemon thread reads the file, queries MLflow's last step of each metric, and sends later ones. So
every step gets there once, despite outages and kills. A value has its optimiser step, and its name
from `points_of`. After a kill, a run computes the steps since its last checkpoint again; MLflow
keeps the values that it got first, since it cannot delete any. They differ only in timings.
"""

import logging
import os
import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tetdist.errors import UserError, without_passwords
from tetdist.storage.files import locked, made_aside, write_text
from tetdist.tracking.metrics_file import each_line, points_of
from tetdist.tracking.trackers import Status, TrackedRun, first_line
from tetdist.wording import counted

if TYPE_CHECKING:
    from tetdist.config.schema import RunConfig

logger = logging.getLogger(__name__)

# MLflow's settings, unless the environment has others. By default MLflow retries for four minutes
# and waits 120 s more for the last response, longer than close() waits. Here the tracker's thread
# retries instead. Usage statistics would need the internet, which compute nodes seldom have.
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # selects MLflow's pages
    # A shared view of the table of runs, best first. MLflow 3.7's page needs the empty entries.
    "mlflow.sharedViewState.top1": """{"orderByKey": "metrics.`final/top1`", "selectedColumns": [
        "attributes.`Created`", "metrics.`final/top1`", "params.`phases.0.timesteps`",
        "params.`phases.0.epochs`", "params.`loss.kind`", "params.`model.name`",
        "params.`model.neuron.kind`", "params.`seed`"], "runsPinned": [], "runsHidden": [],
        "runsVisibilityMap": {}, "runsExpanded": {}, "groupsExpanded": {}}""",
}


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
    """MLflow as a tracker of one run, with tags and artifacts besides its metrics.

    The run's threads only set `tags` and `artifacts`; the tracker's thread only reads them.
    Single operations on a dict are atomic, hence no locks.
    """

    from_first_line: ClassVar[bool] = True

    def __init__(self, destination: Destination, run: TrackedRun) -> None:
        self.destination = destination
        self.tags = dict(run.tags)
        if run.note is not None:
            self.tags["mlflow.note.content"] = run.note
        self.artifacts: dict[Path, int] = {}  # number of announcements of each
        self._monitor: Any = None  # MLflow's system metrics

    def __call__(self, run: TrackedRun) -> "MLflow":
        """Connect, at the start and after each failure.

        MLflow's state is queried again, so it does not matter whether the failed request had an
        effect.
        """
        self._folder, self._client = run.folder, new_client(self.destination.uri)
        stored = _open_run(self._client, run.folder, self.destination, run.name)
        self._run_id: str = stored.info.run_id
        self._is_repeated = run.finished
        self._ended: int | None = None
        # A finished run keeps the tags and the end of the start that finished it.
        self._is_over = run.finished and stored.info.status == "FINISHED"
        if not self._is_over:
            _set_status(self._client, self._run_id, "RUNNING")
            self._start_monitor()
        # MLflow does not let existing parameters change.
        params = ((_allowed(name), str(value)) for name, value in run.params.items())
        param, known = _mlflow().entities.Param, stored.data.params
        new = [param(name, value) for name, value in params if name not in known]
        self._client.log_batch(self._run_id, params=new)
        # The last step of each metric. The protobuf form is the public one that shows it.
        self._have = {metric.key: metric.step for metric in stored.data.to_proto().metrics}
        self._sent_tags = dict(self.tags) if self._is_over else {}
        self._sent_artifacts: dict[Path, int] = {}
        return self

    def log(self, lines: list[dict[str, Any]]) -> None:
        """Send the points of lines that MLflow lacks."""
        points, metric = [], _mlflow().entities.Metric
        for line in lines:
            step, time = line["step"], int(line["time"] * 1000)
            for name, value in points_of(line):
                key = _allowed(name)
                if step > self._have.get(key, -1):
                    points.append(metric(key, value, time, step))
        self._client.log_batch(self._run_id, metrics=points)
        self._ended = time if self._is_repeated else None
        if points and self._is_repeated:
            shown = without_passwords(self.destination.uri)
            logger.info("sent %s to MLflow at %s", counted(len(points), "value"), shown)

    def show(self) -> None:
        """Send new tags and changed artifacts."""
        self._send_tags()
        self._send_artifacts()

    def close(self, status: Status) -> None:
        self._stop_monitor()  # it would end without its last values once the run has ended
        self._send_tags()
        # Artifacts come later, so that a full artifact store does not leave the run unfinished.
        if not self._is_over:
            _set_status(self._client, self._run_id, status, self._ended)
        self._send_artifacts()

    def _send_tags(self) -> None:
        tags = dict(self.tags)
        if tags != self._sent_tags:
            _set_tags(self._client, self._run_id, tags)
            self._sent_tags = tags

    def _send_artifacts(self) -> None:
        for path, version in list(self.artifacts.items()):
            if version != self._sent_artifacts.get(path) and path.is_file():
                folder = path.parent.relative_to(self._folder).as_posix()
                place = None if folder == "." else folder
                self._client.log_artifact(self._run_id, str(path), place)
                self._sent_artifacts[path] = version

    def _start_monitor(self) -> None:
        """Start MLflow's system metrics, in place of a monitor that an outage has ended."""
        self._stop_monitor()
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            settings = {"resume_logging": True, "tracking_uri": self.destination.uri}
            self._monitor = SystemMetricsMonitor(self._run_id, **settings)
            self._monitor.start()
        except Exception as error:  # no psutil, or a device that it cannot read
            logger.debug("no system metrics: %s", error)

    def _stop_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None


def announce(config: "RunConfig", status: str | None, tags: Mapping[str, str]) -> None:
    """Set the state of a run in MLflow, if used, while no process trains it: queued, ...

    The run is made if missing; the training process will find and use it. If MLflow does not
    answer, this warns, and the run is sent when it trains.

    Args:
        status: RUNNING, SCHEDULED, FINISHED, FAILED or KILLED; DELETED: MLflow no longer lists the
            run; None: unchanged.
    """
    if (destination := Destination.of(config)) is None:
        return
    try:
        client = new_client(destination.uri)
        run = _open_run(client, config.run_dir, destination, config.name)
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


def _mlflow() -> Any:
    """Import MLflow, which takes seconds, with `SETTINGS` and a quieter log."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        for name in ("mlflow", "alembic", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow


def new_client(uri: str) -> Any:
    """Return a client of an MLflow store, and make its database if missing.

    Raises:
        Exception: One of MLflow's many kinds.
    """
    client = _mlflow().MlflowClient
    if uri.startswith("sqlite:///") and not (path := Path(uri.removeprefix("sqlite:///"))).exists():
        # MLflow's setup takes seconds and many steps, which two processes must not do at once.
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent):
            if not path.exists():
                # MLflow keeps opened databases in memory, so each attempt needs another name.
                with made_aside(path, ending=f".{secrets.token_hex(4)}") as draft:
                    client(tracking_uri=f"sqlite:///{draft}").search_experiments()
    return client(tracking_uri=uri)


def _open_run(client: Any, run_dir: Path, destination: Destination, run_name: str) -> Any:
    """Return the MLflow run of a run's folder, made when missing; write its ids there."""
    run = _known_run(client, run_dir) or _create_run(client, destination, run_name, run_dir)
    write_text(run_dir / "mlflow_run_id", f"{run.info.run_id}\n{run.info.experiment_id}\n")
    return run


def _known_run(client: Any, run_dir: Path) -> Any:
    """Return the MLflow run of a run's folder; None if MLflow does not have it (any more)."""
    id_file = run_dir / "mlflow_run_id"
    if not id_file.exists():
        return None
    run_id = id_file.read_text().split()[0]
    try:
        run = client.get_run(run_id)
        if run.info.lifecycle_stage == "active":
            return run
    except _mlflow().exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    shown, file = without_passwords(client.tracking_uri), run_dir / "metrics.jsonl"
    text = "MLflow at %s does not have run %s (any more); sending all of %s to a new run"
    logger.warning(text, shown, run_id, file)
    return None


def _create_run(client: Any, destination: Destination, run_name: str, run_dir: Path) -> Any:
    """Make a run that began when its folder says, with its experiment if missing."""
    name = destination.experiment
    if client.get_experiment_by_name(name) is None:
        # A server's own location works for all its users; a path of this machine would not.
        location = None if is_server(destination.uri) else destination.artifact_root.as_uri()
        client.create_experiment(name, artifact_location=location)
    experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage == "deleted":
        restore = f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        raise UserError(f"experiment {name} is deleted; set tracking.experiment=NAME, or {restore}")
    for tag in EXPERIMENT_TAGS.keys() - experiment.tags.keys():
        client.set_experiment_tag(experiment.experiment_id, tag, EXPERIMENT_TAGS[tag])
    # MLflow's pages show these tags as the run's user, source and version.
    tags, begun = _mlflow().tracking.context.registry.resolve_tags(), _begun(run_dir)
    of = experiment.experiment_id
    return client.create_run(of, start_time=begun, run_name=run_name, tags=tags)


def _begun(run_dir: Path) -> int | None:
    """Return when a run began, in milliseconds; None if it has not."""
    environment, metrics = run_dir / "environment.json", run_dir / "metrics.jsonl"
    # Each start writes the environment, before MLflow is set up.
    times = [environment.stat().st_mtime] if environment.exists() else []
    times += [line["time"] for line in islice(each_line(metrics), 1)] if metrics.exists() else []
    return int(min(times) * 1000) if times else None


def _set_tags(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    tag = _mlflow().entities.RunTag
    client.log_batch(run_id, tags=[tag(_allowed(key), value) for key, value in tags.items()])


def _set_status(client: Any, run_id: str, status: str, ended: int | None = None) -> None:
    """Set a run's status; it ended at a time in milliseconds, or now."""
    if status in ("FINISHED", "FAILED", "KILLED"):
        client.set_terminated(run_id, status, ended)
    elif status == "DELETED":
        client.delete_run(run_id)
    else:
        client.update_run(run_id, status=status)


def _allowed(name: str) -> str:
    """Replace the characters that MLflow does not allow in names."""
    return re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII)[:250]


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def ui_command(tracking_uri: str, run_dir: Path, *, of_all: bool = False) -> str:
    """Return the addresses of the curves of a run (or of all) and of the table of runs, for a local
    store after the command that serves it. Without the workflow, MLflow opens GenAI's pages."""
    id_file, shown, pages = run_dir / "mlflow_run_id", without_passwords(tracking_uri), [""]
    if id_file.exists():
        run_id, experiment_id = id_file.read_text().split()
        runs, kind = f"/#/experiments/{experiment_id}/runs", "workflowType=machine_learning"
        view = "?compareRunsMode=CHART&" if of_all else f"/{run_id}/model-metrics?"
        pages = [f"{runs}{view}{kind}", f"{runs}?{kind}&viewStateShareKey=top1"]
    root = shown.rstrip("/") if is_server(tracking_uri) else "http://localhost:5000"
    addresses = "\n            all runs, best first: ".join(root + page for page in pages)
    if is_server(tracking_uri):
        return addresses
    # Without an activated environment, `mlflow` alone would not be found.
    program = "mlflow" if shutil.which("mlflow") else str(Path(sys.executable).with_name("mlflow"))
    command = shlex.join([program, "ui", "--workers", "1", "--backend-store-uri", shown])
    return f"{command}\n            then open {addresses}"
