"""metrics.jsonl keeps everything, and MLflow ends up with the same, whatever happens between."""

import errno
import itertools
import json
import logging
import math
import os
import re
import resource
import secrets
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny

from tetdist.config import loading
from tetdist.errors import UserError, pip_install
from tetdist.tracking import metrics_file, mlflow_logger, trackers
from tetdist.tracking.environment import environment
from tetdist.tracking.metrics_file import (
    from_end,
    keep_until,
    lines_of,
    points_of,
    read_metrics,
    strict,
)
from tetdist.tracking.mlflow_logger import Destination, ui_command
from tetdist.tracking.tracker import Tracker
from tetdist.tracking.trackers import TrackedRun

MONITOR = "mlflow.system_metrics.system_metrics_monitor"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(trackers, "SEND_EVERY", 0.05)
    # A missing psutil must do no harm.
    monkeypatch.setitem(sys.modules, MONITOR, None)


class Store:
    """A local MLflow store and what it holds."""

    def __init__(self, folder):
        self.folder = folder
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.opened = []

    @property
    def client(self):
        import mlflow

        return mlflow.MlflowClient(tracking_uri=self.uri)

    def open(self, run_dir, resume_step=None, *, params=None, tags=None, uri=None, **own):
        run_dir.mkdir(exist_ok=True)
        params = {"model.name": "sew_resnet18", "lr": 0.1} if params is None else params
        run = TrackedRun(run_dir, "a run", params, tags or {"loss": "tet"}, resume_step, **own)
        destination = Destination(uri or self.uri, "trials", self.folder / "artifacts")
        self.opened.append(Tracker(run, destination))
        self.opened[-1].begin()
        return self.opened[-1]

    def run(self, run_dir):
        return self.client.get_run((run_dir / "mlflow_run_id").read_text().split()[0])

    def points(self, run):
        """All that a run has been sent, sorted; NaN as -1, which equals itself."""
        with sqlite3.connect(self.folder / "mlflow.db") as database:
            found = database.execute(
                "select key, step, case when is_nan then -1 else value end from metrics "
                "where run_uuid = ? and key not like 'system/%'",
                [run.info.run_id],
            )
            return sorted(found)

    def steps(self, run_dir, key="train/loss"):
        """The steps at which a run has a metric."""
        if not (run_dir / "mlflow_run_id").exists():
            return []
        return [step for name, step, _ in self.points(self.run(run_dir)) if name == key]


@pytest.fixture
def store(tmp_path, empty_store):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    store = Store(tmp_path)
    yield store
    for tracker in store.opened:  # where a test has failed
        tracker.close("KILLED", timeout=5)


@pytest.fixture
def untracked(tmp_path):
    def open_tracker(resume_step=None):
        (tmp_path / "run").mkdir(exist_ok=True)
        return Tracker(TrackedRun(tmp_path / "run", "a run", {}, {}, resume_step), None)

    return open_tracker


def log_steps(tracker, first, last, **values):
    """One line a step, and an evaluation at every fifth."""
    for step in range(first, last + 1):
        tracker.log("train", step, {"loss": float(step)} | values)
        if step % 5 == 0:
            tracker.log("val", step, {"top1": float(step)})


def assert_all_there(store, run_dir):
    """Each point of the file once, in a run that is finished."""
    lines, run = read_metrics(run_dir / "metrics.jsonl"), store.run(run_dir)
    expected = [(key, line["step"], value) for line in lines for key, value in points_of(line)]
    assert store.points(run) == sorted(expected)
    assert run.info.status == "FINISHED"


# The file.


def test_lines_are_strict_json_and_read_back(untracked, tmp_path):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    tracker, before = untracked(), time.time()
    values = {"loss": math.inf, "grad_norm": math.nan, "lr": 0.1, "note": None}
    values |= {"per_timestep_top1": [1.0, -math.inf], "firing_rate": {"a.sn": 0.5}}
    tracker.log("train", 1, values)
    path = tmp_path / "run" / "metrics.jsonl"
    line = json.loads(path.read_text(), parse_constant=refuse)  # there before close()
    assert list(line)[:3] == ["kind", "step", "time"]
    assert abs(line["time"] - before) < 60
    assert (line["loss"], line["grad_norm"], line["note"]) == ("Infinity", "NaN", None)
    (read,) = read_metrics(path)
    assert math.isnan(read.pop("grad_norm"))
    assert read.items() >= {key: values[key] for key in values if key != "grad_norm"}.items()
    tracker.close("FINISHED")


@pytest.mark.parametrize("torn", [b"", b'{"kind": "train", "st', b"\x00" * 100])
def test_resume_removes_later_steps_and_a_torn_line(untracked, tmp_path, torn):
    path = tmp_path / "run" / "metrics.jsonl"
    tracker = untracked()
    log_steps(tracker, 1, 10)
    tracker.close("KILLED")
    kept = b"".join(path.read_bytes().splitlines(keepends=True)[:9])  # 1..8 and the val of 5
    with path.open("ab") as file:
        file.write(torn)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl belongs to an earlier run"):
        untracked()
    assert path.read_bytes() == before

    assert keep_until(path, 8) == {"train": 8, "val": 5}
    tracker = untracked(resume_step=8)
    assert path.read_bytes() == kept
    # The checkpoint's own step is not written twice.
    tracker.log("train", 8, {"loss": 8.0})
    with pytest.raises(AssertionError, match="step 7 after step 8"):
        tracker.log("train", 7, {"loss": 7.0})
    log_steps(tracker, 9, 10)
    with pytest.raises(AssertionError, match="step 10 after step 10"):
        tracker.log("val", 10, {"top1": 1.0})
    tracker.close("FINISHED")
    lines = read_metrics(path)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 11))
    assert [line["step"] for line in lines if line["kind"] == "val"] == [5, 10]
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("damaged", ['{"kind": "tr', '{"a":' * 10**5])
def test_a_damaged_line_is_named(untracked, tmp_path, damaged):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text(f'{{"kind": "a", "step": 1}}\n{damaged}\n{{"kind": "b", "step": 3}}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged") as caught:
        untracked(resume_step=3)
    assert path.read_bytes() == before
    # A reader that follows the file and has read the first line gets the same number.
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged"):
        list(lines_of(path, before.index(b"\n") + 1))
    # The way out that it names, followed to the letter.
    command = re.search(r"\((sed .*?)\)", str(caught.value))
    subprocess.run(shlex.split(command[1]), check=True, timeout=60)
    untracked(resume_step=3).close("FINISHED")
    assert [line["step"] for line in read_metrics(path)] == [1, 3]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("torn", ["", '{"kind": "tra'])
def test_lines_from_the_end_are_those_from_the_beginning(block, torn, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_file, "_BLOCK", block)
    path = tmp_path / "metrics.jsonl"
    for steps in range(4):
        lines = [
            {"kind": "train", "step": step, "loss": (-1) ** step * math.inf}
            for step in range(steps)
        ]
        path.write_text("".join(json.dumps(strict(line)) + "\n" for line in lines) + torn)
        assert list(from_end(path)) == read_metrics(path)[::-1] == lines[::-1]
    path.write_text(f'{{"kind": "train", "step": 1}}\n{{\n{{"kind": "val", "step": 2}}\n{torn}')
    found = from_end(path)
    assert next(found)["kind"] == "val"
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged"):
        next(found)


def test_a_file_that_becomes_read_only_is_reported(untracked, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    tracker = untracked()
    monkeypatch.setattr(tracker, "_file", Mock(closed=False, write=refuse))
    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(UserError, match=r"metrics\.jsonl: Read-only file system; get permission"):
        tracker.log("train", 1, {"loss": 1.0})


def test_a_full_disk_is_reported_and_leaves_whole_lines(untracked, tmp_path):
    tracker = untracked()
    tracker.log("train", 1, {"loss": 1.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(UserError, match=rf"cannot write {tmp_path}/run/metrics\.jsonl: "):
            tracker.log("train", 2, {"loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    path = tmp_path / "run" / "metrics.jsonl"
    assert [line["step"] for line in read_metrics(path)] == [1]
    assert path.read_bytes().endswith(b"}\n")


def test_a_tracker_that_cannot_be_imported_asks_for_an_upgrade(tmp_path, monkeypatch, caplog):
    def mine(_):
        raise ImportError("no Pool in sqlalchemy")

    monkeypatch.setitem(trackers.TRACKERS, "mine", mine)
    tracker = Tracker(TrackedRun(tmp_path, "a run", {}, {}, None), None, ["mine"])
    tracker.log("train", 1, {"loss": 1.0})
    tracker.close("FINISHED")
    assert len(caplog.messages) == 2
    assert all("ImportError: no Pool in sqlalchemy" in text for text in caplog.messages)
    assert caplog.messages[-1].endswith("start this run again after an upgrade of its package")


# MLflow.


def test_everything_arrives(store, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    monkeypatch.delitem(sys.modules, MONITOR)
    run_dir = tmp_path / "run"
    params = {"model.name": "sew_resnet18", "crop": [0.08, 1.0], "long": "x" * 9000}
    tracker = store.open(run_dir, params=params | {f"p{i}": i for i in range(250)})
    for step in range(1, 301):
        tracker.log("train", step, {"loss": 1 / step, "lr": 0.1})
    tracker.log("train", 301, {"loss": math.nan, "grad_norm": math.inf})
    values = {"top1": 61.5, "per_timestep_top1": [58.0, 60.0, 61.5], "note": "stays in the file"}
    tracker.log("val", 301, values | {"firing_rate": {"layer1.0.sn1": 0.25, "a:b": 0.5}})
    plots = run_dir / "plots"
    plots.mkdir()
    (plots / "curves.png").write_bytes(b"old")
    (run_dir / "config.yaml").write_text("model: {}\n")
    tracker.artifact(plots / "curves.png")
    tracker.artifact(run_dir / "config.yaml")
    artifact = tmp_path / "artifacts"
    tiny.wait_until(lambda: any(artifact.glob("*/artifacts/plots/curves.png")), 40)
    (plots / "curves.png").write_bytes(b"new")
    tracker.artifact(plots / "curves.png")
    tracker.set_tag("checkpoint", "/there/last")
    system = "system/cpu_utilization_percentage"
    tiny.wait_until(lambda: store.run(run_dir).data.metrics.get(system), 40)
    assert store.run(run_dir).info.status == "RUNNING"
    tracker.close("FINISHED")

    run = store.run(run_dir)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a run")
    assert run.data.params["crop"] == "[0.08, 1.0]"
    assert run.data.params["long"].startswith("xxxx")
    assert len(run.data.params) == 253
    assert run.data.tags["loss"] == "tet"
    assert run.data.tags["checkpoint"] == "/there/last"
    expected = [
        (f"train/{k}", i, v) for i in range(1, 301) for k, v in (("loss", 1 / i), ("lr", 0.1))
    ]
    expected += [("train/loss", 301, -1.0), ("train/grad_norm", 301, sys.float_info.max)]
    expected += [("val/top1", 301, 61.5), ("val/firing_rate/layer1.0.sn1", 301, 0.25)]
    expected += [(f"val/top1_t{t}", 301, top1) for t, top1 in ((1, 58.0), (2, 60.0), (3, 61.5))]
    assert store.points(run) == sorted([*expected, ("val/firing_rate/a_b", 301, 0.5)])
    (point,) = store.client.get_metric_history(run.info.run_id, "val/top1")
    line = next(from_end(run_dir / "metrics.jsonl"))
    assert point.timestamp == int(1000 * line["time"])

    (copy,) = artifact.glob("*/artifacts/plots/curves.png")
    assert copy.read_bytes() == b"new"
    (copy,) = artifact.glob("*/artifacts/config.yaml")
    assert copy.read_text() == "model: {}\n"
    assert list(elsewhere.iterdir()) == []


def test_a_resumed_run_is_the_same_run_and_no_point_is_there_twice(store, tmp_path):
    """Requeued at step 6 after a checkpoint of step 2; only the speed comes out another."""
    run_dir = tmp_path / "run"

    def train(tracker, first, last, speed):
        for step in range(first, last + 1):
            values = {"loss": math.inf if step == 4 else math.nan if step == 5 else float(step)}
            tracker.log("train", step, values | {"samples_per_s": speed + step})

    tracker = store.open(run_dir)
    train(tracker, 1, 6, 100.0)
    tracker.close("RUNNING")
    first = store.run(run_dir).info
    assert first.status == "RUNNING"
    tracker = store.open(run_dir, 2, params={"lr": 0.2, "new": 1})
    train(tracker, 3, 8, 200.0)
    tracker.close("KILLED")
    assert store.run(run_dir).info.status == "KILLED"
    assert store.run(run_dir).info.end_time >= first.start_time
    tracker = store.open(run_dir, 3, tags={"loss": "sdt"})
    tiny.wait_until(lambda: store.run(run_dir).info.status == "RUNNING", 40)
    train(tracker, 4, 8, 200.0)
    tracker.close("FINISHED")

    run = store.run(run_dir)
    assert (run.info.run_id, run.info.status) == (first.run_id, "FINISHED")
    assert (run_dir / "mlflow_run_id").read_text().split() == [first.run_id, first.experiment_id]
    # MLflow does not let parameters change; tags may.
    assert run.data.params == {"model.name": "sew_resnet18", "lr": "0.1", "new": "1"}
    assert run.data.tags["loss"] == "sdt"
    # Of the steps that are computed again, MLflow keeps the values that it got first.
    expected = [("train/samples_per_s", step, 100.0 + step) for step in range(1, 7)]
    expected += [("train/samples_per_s", step, 200.0 + step) for step in (7, 8)]
    losses = {4: sys.float_info.max, 5: -1.0}
    expected += [("train/loss", step, losses.get(step, float(step))) for step in range(1, 9)]
    assert store.points(run) == sorted(expected)
    experiment = store.client.get_experiment(run.info.experiment_id)
    assert experiment.tags == mlflow_logger.EXPERIMENT_TAGS
    view = json.loads(experiment.tags["mlflow.sharedViewState.top1"])
    assert view["orderByKey"] in view["selectedColumns"]


class Killed(BaseException):
    pass


# `Killed` also ends the thread that sends, which pytest would warn of.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_kill_at_any_call_is_caught_up(store, tmp_path, monkeypatch):
    """MLflow gets the first calls of a process, and all the rest from the next one.

    Of the points that MLflow's client sends at once the last are some of step 13.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    client = "mlflow.tracking._tracking_service.client"
    monkeypatch.setattr(f"{client}.MAX_METRICS_PER_BATCH", 127)  # of 1000
    values = {f"value{i}": float(i) for i in range(8)}
    for number in itertools.count():
        run_dir = tmp_path / f"run{number}"
        run_dir.mkdir()
        before = Tracker(TrackedRun(run_dir, "a run", {}, {}, None), None)
        log_steps(before, 1, 17, **values)
        before.close("RUNNING")
        calls = itertools.count(1)

        def counted(original, calls=calls, number=number):
            def call(*args, **kwargs):
                if next(calls) > number:
                    raise Killed
                return original(*args, **kwargs)

            return call

        with pytest.MonkeyPatch.context() as patch:
            for name in ("create_run", "log_batch", "update_run_info"):
                patch.setattr(SqlAlchemyStore, name, counted(getattr(SqlAlchemyStore, name)))
            killed = store.open(run_dir, 17)
            killed.close("KILLED")
        # Lines after a checkpoint are computed again.
        tracker = store.open(run_dir, 14)
        log_steps(tracker, 15, 20, **values)
        tracker.close("FINISHED")
        assert_all_there(store, run_dir)
        if killed.is_complete:
            break
    assert number > 5


def test_a_run_that_mlflow_forgot_is_sent_anew(store, tmp_path, caplog, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    run_dir = tmp_path / "run"
    tracker = store.open(run_dir)
    log_steps(tracker, 1, 20)
    (run_dir / "config.yaml").write_text("model: {}\n")
    tracker.artifact(run_dir / "config.yaml")
    with monkeypatch.context() as patch:
        # A full store of artifacts does not leave the run unfinished.
        patch.setattr("mlflow.MlflowClient.log_artifact", full)
        tracker.close("FINISHED")
    assert not tracker.is_complete
    assert_all_there(store, run_dir)
    caplog.clear()

    # Deleted, as if by hand in the user interface.
    overrides = ["name=run", f"runs_dir={tmp_path}", "tracking.mlflow=true"]
    config = loading.load("quickstart", [*overrides, f"tracking.uri={store.uri}"])
    mlflow_logger.announce(config, "DELETED", {})
    deleted = (run_dir / "mlflow_run_id").read_text().split()[0]
    assert store.client.get_run(deleted).info.lifecycle_stage == "deleted"
    (run_dir / "environment.json").touch()  # of the last start
    with caplog.at_level(logging.INFO, logger="tetdist"):
        store.open(run_dir, 20, finished=True).close("FINISHED")
    assert f"does not have run {deleted}" in caplog.messages[0]
    assert_all_there(store, run_dir)
    info, lines = store.run(run_dir).info, read_metrics(run_dir / "metrics.jsonl")
    times = [int(lines[i]["time"] * 1000) for i in (0, -1)]
    assert [info.start_time, info.end_time] == times
    store.client.delete_experiment("1")
    store.open(tmp_path / "other").close("FINISHED")
    assert "or `mlflow experiments restore --experiment-id 1`" in caplog.text


# Servers and databases.


def test_a_server_comes_late_and_goes_early(store, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run_dir, port = tmp_path / "run", tiny.free_port()
    uri = f"http://me:secret@127.0.0.1:{port}"
    with caplog.at_level(logging.INFO, logger="tetdist"):
        tracker = store.open(run_dir, uri=uri)
        begin = time.monotonic()
        for step in range(1, 1001):
            tracker.log("train", step, {"loss": float(step)})
        assert time.monotonic() - begin < 2
        (run_dir / "config.yaml").write_text("model: {}\n")
        tracker.artifact(run_dir / "config.yaml")
        tiny.wait_until(lambda: len(caplog.records) == 1, 40)
        with tiny.mlflow_server(tmp_path / "mlflow.db", port, "secret"):
            # Over the store that the server uses.
            tiny.wait_until(lambda: len(store.steps(run_dir)) == 1000, 40)
            tiny.wait_until(lambda: any((tmp_path / "artifacts").rglob("config.yaml")), 40)
            tiny.wait_until(lambda: "answers again" in caplog.text, 40)
        for step in range(1001, 1011):
            tracker.log("train", step, {"loss": float(step)})
        begin = time.monotonic()
        tracker.close("FINISHED", timeout=5)
        assert time.monotonic() - begin < 7
    messages = [one.getMessage() for one in caplog.records if one.name.startswith("tetdist")]
    assert "Connection refused. Training continues" in messages[0]
    assert "up to 10 of the 1010 lines" in messages[-1]
    assert len(messages) <= 4
    assert not any("\n" in message for message in messages)
    assert "secret" not in caplog.text

    caplog.clear()
    store.open(run_dir, 1010).close("FINISHED")
    assert caplog.records == []
    assert store.steps(run_dir) == list(range(1, 1011))
    assert store.run(run_dir).info.status == "FINISHED"


def test_a_server_that_never_answers_holds_nobody_up(store, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(30)
        tracker = store.open(tmp_path / "run", uri=f"http://127.0.0.1:{server.getsockname()[1]}")
        tracker.log("train", 1, {"loss": 1.0})
        connection, _ = server.accept()  # the request is on its way
        with connection:
            assert b"mlflow/experiments/get-by-name?" in connection.recv(1000)
            begin = time.monotonic()
            tracker.close("FINISHED", timeout=0.5)
    assert time.monotonic() - begin < 5
    assert tracker._threads[0]._thread.daemon  # so it does not hold the process up either
    (record,) = caplog.records
    assert "no answer within 0.5 s" in record.getMessage()
    assert "up to 1 of the 1 lines" in record.getMessage()


def test_two_runs_make_one_database_at_once_after_a_kill(tmp_path, capfd, caplog):
    def kill(_):
        raise Killed

    store = Store(tmp_path / "not" / "yet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlflow.store.db.utils._upgrade_db", kill)
        with pytest.raises(Killed):
            mlflow_logger.new_client(store.uri)
    run_dirs = [tmp_path / "a", tmp_path / "b"]
    for tracker in [store.open(run_dir) for run_dir in run_dirs]:
        tracker.log("train", 1, {"loss": 1.0})
        tracker.close("FINISHED", timeout=60)
    for run_dir in run_dirs:
        assert_all_there(store, run_dir)
        assert sorted(path.name for path in run_dir.iterdir()) == ["metrics.jsonl", "mlflow_run_id"]
    assert len({store.run(run_dir).info.experiment_id for run_dir in run_dirs}) == 1
    assert [path.name for path in store.folder.iterdir()] == ["mlflow.db"]
    assert (capfd.readouterr(), caplog.records) == (("", ""), [])


def test_mlflow_missing_is_reported_at_once(store, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    message = f"MLflow is not installed; {pip_install('train,cuda130')}, or"
    with pytest.raises(UserError, match=re.escape(message)):
        store.open(tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# What surrounds a run.


def test_environment_holds_no_token(monkeypatch):
    secret = secrets.token_hex()  # which no diff of the checkout has
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_JWT", secret)
    found = json.dumps(environment())
    assert '"SLURM_JOB_ID": "42"' in found
    assert secret not in found


def test_ui_command(monkeypatch, tmp_path):
    runs, kind = "/#/experiments/0/runs", "?workflowType=machine_learning"
    addresses = f"SERVER{runs}/a1/model-metrics{kind}"
    addresses += f"\n            all runs, best first: SERVER{runs}{kind}&viewStateShareKey=top1"
    (tmp_path / "mlflow_run_id").write_text("a1\n0\n")
    monkeypatch.setattr(mlflow_logger.shutil, "which", lambda _: "/usr/bin/mlflow")
    for arguments, command in (
        (
            ["sqlite:////a b/x.db", tmp_path],
            "mlflow ui --workers 1 --backend-store-uri 'sqlite:////a b/x.db'"
            f"\n            then open {addresses.replace('SERVER', 'http://localhost:5000')}",
        ),
        (["https://me:secret@there.org/", tmp_path / "none"], "https://there.org"),
        (["https://there.org/", tmp_path], addresses.replace("SERVER", "https://there.org")),
    ):
        assert ui_command(*arguments) == command
    (tmp_path / "mlflow_run_id").write_text("a1\n12\n")
    assert "/experiments/12/runs/a1/" in ui_command("https://there.org", tmp_path)
    monkeypatch.setattr(mlflow_logger.shutil, "which", lambda _: None)
    program = Path(ui_command("sqlite:////x.db", tmp_path).split()[0])
    assert program.parent == Path(sys.executable).parent
    assert program.is_file()
