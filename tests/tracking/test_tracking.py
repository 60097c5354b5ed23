"""metrics.jsonl keeps everything, and MLflow ends up with the same, whatever happens between."""

import json
import logging
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tetdist.errors import UserError
from tetdist.tracking import environment as environment_module
from tetdist.tracking import metrics_file, mlflow_follower
from tetdist.tracking.environment import environment
from tetdist.tracking.metrics_file import from_end, keep_until, read_from, read_metrics, strict
from tetdist.tracking.mlflow_follower import Dataset, ui_command
from tetdist.tracking.tracker import Tracker
from tetdist.tracking.trackers import TrackedRun, _line_start


def wait_until(condition: Callable[[], bool], seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def run_python(code: str, *args: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that is set up, because that takes seconds."""
    import mlflow

    path = tmp_path_factory.mktemp("store") / "empty.db"
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_follower, "SEND_EVERY", 0.05)


class Store:
    """A local MLflow store and what it holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.opened: list[Tracker] = []

    @property
    def client(self) -> Any:
        import mlflow

        return mlflow.MlflowClient(tracking_uri=self.uri)

    def open(self, run_dir: Path, resume_step: int | None = None, **settings: Any) -> Tracker:
        run_dir.mkdir(exist_ok=True)
        given: dict[str, Any] = {
            "params": {"model.name": "sew_resnet18", "lr": 0.1},
            "tags": {"loss": "tet"},
            "tracking_uri": self.uri,
            "experiment": "trials",
            "artifact_root": self.folder / "artifacts",
            **settings,
        }
        known = {"params": given.pop("params"), "tags": given.pop("tags")}
        run = TrackedRun(run_dir, "a run", resume_step=resume_step, **known)
        tracker = Tracker(run, **given)
        self.opened.append(tracker)
        return tracker

    def run(self, run_dir: Path) -> Any:
        return self.client.get_run((run_dir / "mlflow_run_id").read_text().strip())

    def history(self, run_dir: Path, key: str) -> list[tuple[int, float]]:
        if not (run_dir / "mlflow_run_id").exists():
            return []
        run_id = (run_dir / "mlflow_run_id").read_text().strip()
        return sorted((m.step, m.value) for m in self.client.get_metric_history(run_id, key))

    def phases(self, run_dir: Path) -> list[Any]:
        """The child runs that stand for phases, in their order."""
        if not (run_dir / "mlflow_run_id").exists():
            return []
        parent = self.run(run_dir).info
        found = self.client.search_runs(
            [parent.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
        )
        phases = [run for run in found if run.data.tags.get("phase", "").isdecimal()]
        return sorted(phases, key=lambda run: int(run.data.tags["phase"]))

    def statuses(self, run_dir: Path) -> list[str]:
        return [run.info.status for run in self.phases(run_dir)]

    def steps(self, run_dir: Path, key: str) -> list[list[int]]:
        """The steps at which each phase's run has a metric."""
        return [
            sorted(m.step for m in self.client.get_metric_history(run.info.run_id, key))
            for run in self.phases(run_dir)
        ]


@pytest.fixture
def store(tmp_path: Path, empty_store: Path) -> Iterator[Store]:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    store = Store(tmp_path)
    yield store
    for tracker in store.opened:  # where a test has failed
        tracker.close("KILLED", timeout=5)


@pytest.fixture
def untracked(tmp_path: Path) -> Callable[..., Tracker]:
    def open_tracker(resume_step: int | None = None) -> Tracker:
        return Store(tmp_path).open(tmp_path / "run", resume_step, tracking_uri=None)

    return open_tracker


# The file.


def test_lines_are_strict_json_and_read_back(
    untracked: Callable[..., Tracker], tmp_path: Path
) -> None:
    tracker = untracked()
    before = time.time()
    tracker.log("train", 1, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.1, "note": None})
    values = {"top1": 50.0, "per_timestep_top1": [1.0, -math.inf], "firing_rate": {"a.sn": 0.5}}
    tracker.log("val", 1, values)

    path = tmp_path / "run" / "metrics.jsonl"
    first, second = path.read_text().splitlines()  # there before close()

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    line = json.loads(first, parse_constant=refuse)
    assert list(line)[:3] == ["kind", "step", "time"]
    assert abs(line["time"] - before) < 60
    assert (line["loss"], line["grad_norm"], line["note"]) == ("NaN", "Infinity", None)
    json.loads(second, parse_constant=refuse)

    train, val = read_metrics(path)
    assert math.isnan(train["loss"])
    assert train["grad_norm"] == math.inf
    assert (train["lr"], train["note"], train["step"]) == (0.1, None, 1)
    assert {key: val[key] for key in values} == values
    tracker.close("FINISHED")


def test_a_new_run_does_not_touch_the_file_of_another(
    untracked: Callable[..., Tracker], tmp_path: Path
) -> None:
    untracked().close("FINISHED")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl belongs to an earlier run"):
        untracked()
    assert path.read_text() == '{"kind": "train", "step": 1}\n'


@pytest.mark.parametrize("torn", [b"", b'{"kind": "train", "st', b"\x00" * 100])
def test_resume_removes_later_steps_and_a_torn_line(
    untracked: Callable[..., Tracker], tmp_path: Path, torn: bytes
) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    tracker = untracked()
    for step in range(1, 11):
        tracker.log("train", step, {"loss": 1 / step})
        if step % 5 == 0:
            tracker.log("val", step, {"top1": float(step)})
    tracker.close("KILLED")
    kept = b"".join(path.read_bytes().splitlines(keepends=True)[:9])  # 1..8 and the val of 5
    with path.open("ab") as file:
        file.write(torn)

    assert keep_until(path, 8) == ({"train": 8, "val": 5}, 9)
    tracker = untracked(resume_step=8)
    assert path.read_bytes() == kept
    for step in (9, 10):
        tracker.log("train", step, {"loss": 1 / step})
    tracker.log("val", 10, {"top1": 10.0})
    tracker.close("FINISHED")

    lines = read_metrics(path)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 11))
    assert [line["step"] for line in lines if line["kind"] == "val"] == [5, 10]
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


def test_the_checkpoints_own_step_is_not_written_twice(
    untracked: Callable[..., Tracker], tmp_path: Path
) -> None:
    tracker = untracked()
    tracker.log("val", 4, {"top1": 1.0})
    tracker.close("KILLED")
    tracker = untracked(resume_step=4)
    tracker.log("val", 4, {"top1": 1.0})
    tracker.log("train", 4, {"loss": 1.0})
    with pytest.raises(AssertionError, match="step 3 after step 4"):
        tracker.log("val", 3, {"top1": 1.0})
    tracker.log("val", 5, {"top1": 1.0})
    with pytest.raises(AssertionError, match="step 5 after step 5"):
        tracker.log("val", 5, {"top1": 1.0})
    tracker.close("FINISHED")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("val", 4),
        ("train", 4),
        ("val", 5),
    ]


def test_a_damaged_line_is_named(untracked: Callable[..., Tracker], tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr\n{"kind": "train", "step": 3}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged") as caught:
        untracked(resume_step=3)
    assert path.read_bytes() == before
    # Whoever follows the file and has read the first line tells the same number.
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged"):
        read_from(path, before.index(b"\n") + 1)
    # The way out that it names, followed to the letter.
    command = re.search(r"\((sed .*?)\)", str(caught.value))
    assert command is not None
    subprocess.run(shlex.split(command[1]), check=True, timeout=60)
    untracked(resume_step=3).close("FINISHED")
    assert [line["step"] for line in read_metrics(path)] == [1, 3]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("torn", ["", '{"kind": "tra'])
def test_lines_from_the_end_are_those_from_the_beginning(
    block: int, torn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_file, "_BLOCK", block)
    path = tmp_path / "metrics.jsonl"
    for steps in range(4):
        lines = [{"kind": "train", "step": step, "loss": math.inf} for step in range(steps)]
        path.write_text("".join(json.dumps(strict(line)) + "\n" for line in lines) + torn)
        assert list(from_end(path)) == read_metrics(path)[::-1] == lines[::-1]
    path.write_text(
        f'{{"kind": "train", "step": 1}}\n{{"kind"\n{{"kind": "val", "step": 2}}\n{torn}'
    )
    found = from_end(path)
    assert next(found)["kind"] == "val"
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged"):
        next(found)


def test_a_tracker_of_ones_own_is_given_no_torn_line(tmp_path: Path) -> None:
    """Whoever removes a damaged line moves those behind it, and the tracker's mark stays."""
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"kind": "train", "step": {step}, "loss": 1.{"5" * step}}}\n' for step in (1, 2, 3)]
    path.write_text("".join(lines))
    first, second = len(lines[0]), len(lines[0]) + len(lines[1])
    assert [_line_start(path, mark) for mark in (0, first, second)] == [0, first, second]
    assert _line_start(path, 10_000) == path.stat().st_size
    path.write_text("".join(lines[1:]))
    assert _line_start(path, second) == 0
    assert read_from(path, _line_start(path, second))[0] == read_metrics(path)


def test_a_full_disk_is_said_and_leaves_whole_lines(tmp_path: Path) -> None:
    done = run_python(
        """
        import resource, sys
        from pathlib import Path
        from tetdist.errors import UserError
        from tetdist.tracking.tracker import Tracker
        from tetdist.tracking.trackers import TrackedRun

        tracker = Tracker(TrackedRun(Path(sys.argv[1]), "", {}, {}, None), tracking_uri=None,
                          experiment="", artifact_root=Path())
        tracker.log("train", 1, {"loss": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            tracker.log("train", 2, {"loss": 2.0})
        except UserError as error:
            print(error)
        assert "mlflow" not in sys.modules
        assert "matplotlib" not in sys.modules
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"cannot write {tmp_path}/metrics.jsonl: ")
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")


# MLflow.


def test_a_line_is_sent_whole(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What MLflow has is asked by step, so half a line would stay half.
    import mlflow

    calls: list[list[int]] = []
    send = mlflow.MlflowClient.log_batch

    def spy(client: Any, run_id: str, metrics: Any = (), **others: Any) -> None:
        calls.append([metric.step for metric in metrics if metric.key.startswith("train/")])
        send(client, run_id, metrics, **others)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", spy)
    tracker = store.open(tmp_path / "run")
    for step in range(1, 601):
        tracker.log("train", step, dict.fromkeys("abcdefg", 1.0))
    tracker.close("FINISHED")
    assert all(len(steps) <= 1000 for steps in calls)
    assert max(len(steps) for steps in calls) > 900
    times = Counter(step for steps in calls for step in set(steps))
    assert times == dict.fromkeys(range(1, 601), 1)


def test_everything_arrives(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    run_dir = tmp_path / "run"
    params = {"model.name": "sew_resnet18", "crop": [0.08, 1.0], "long": "x" * 9000}
    tracker = store.open(run_dir, params=params | {f"p{i}": i for i in range(250)})
    for step in range(1, 301):  # more values than MLflow takes at once
        values = {"loss": 1 / step, "lr": 0.1, "epoch": step / 100, "top1": 1.0, "phase": 0}
        tracker.log("train", step, values)
    tracker.log("train", 301, {"loss": math.nan, "grad_norm": math.inf})
    tracker.log(
        "val",
        301,
        {
            "top1": 61.5,
            "per_timestep_top1": [58.0, 60.0, 61.5],
            "firing_rate": {"layer1.0.sn1": 0.25, "a:b": 0.5},
            "note": "text stays in the file",
        },
    )
    plots = run_dir / "plots"
    plots.mkdir()
    (plots / "curves.png").write_bytes(b"old")
    (run_dir / "config.yaml").write_text("model: {}\n")
    tracker.artifact(plots / "curves.png")
    tracker.artifact(run_dir / "config.yaml")
    artifact = tmp_path / "artifacts"
    wait_until(lambda: any(artifact.glob("*/artifacts/plots/curves.png")))
    (plots / "curves.png").write_bytes(b"new")
    tracker.artifact(plots / "curves.png")
    tracker.set_tag("checkpoint", "/there/last")
    wait_until(lambda: len(store.history(run_dir, "system/cpu_utilization_percentage")) >= 2)
    assert store.run(run_dir).info.status == "RUNNING"
    tracker.close("FINISHED")

    run = store.run(run_dir)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a run"
    assert run.data.params["crop"] == "[0.08, 1.0]"
    assert run.data.params["long"].startswith("xxxx")
    assert len(run.data.params) == 253
    assert run.data.tags["loss"] == "tet"
    assert run.data.tags["checkpoint"] == "/there/last"
    assert "resumed_at_step" not in run.data.tags
    losses = store.history(run_dir, "train/loss")
    assert losses[:300] == [(step, 1 / step) for step in range(1, 301)]
    assert losses[300][0] == 301
    assert math.isnan(losses[300][1])
    assert store.history(run_dir, "train/grad_norm")[0][1] > 1e300
    assert len(store.history(run_dir, "train/epoch")) == 300
    assert store.history(run_dir, "val/top1") == [(301, 61.5)]
    assert store.history(run_dir, "val/top1_t1") == [(301, 58.0)]
    assert store.history(run_dir, "val/top1_t3") == [(301, 61.5)]
    assert store.history(run_dir, "val/firing_rate/layer1.0.sn1") == [(301, 0.25)]
    assert store.history(run_dir, "val/firing_rate/a_b") == [(301, 0.5)]
    assert not any("note" in key for key in run.data.metrics)

    assert run.info.artifact_uri.startswith((tmp_path / "artifacts").as_uri())
    (copy,) = artifact.glob("*/artifacts/plots/curves.png")
    assert copy.read_bytes() == b"new"
    (copy,) = artifact.glob("*/artifacts/config.yaml")
    assert copy.read_text() == "model: {}\n"
    assert list(elsewhere.iterdir()) == []


def test_experiments_open_as_model_training(store: Store, tmp_path: Path) -> None:
    def kind(name: str) -> str:
        return str(store.client.get_experiment_by_name(name).tags["mlflow.experimentKind"])

    store.client.create_experiment("older")
    store.client.create_experiment("chosen", tags={"mlflow.experimentKind": "genai_development"})
    for name in ("new", "older", "chosen"):
        store.open(tmp_path / name, experiment=name).close("FINISHED")
    assert [kind(name) for name in ("new", "older")] == ["custom_model_development"] * 2
    assert kind("chosen") == "genai_development"


def test_a_resumed_run_has_every_step_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No psutil must do no harm.
    monkeypatch.setitem(sys.modules, "mlflow.system_metrics.system_metrics_monitor", None)
    run_dir = tmp_path / "run"
    tracker = store.open(run_dir)
    for step in range(1, 11):
        tracker.log("train", step, {"loss": float(step)})
        if step % 5 == 0:
            tracker.log("val", step, {"top1": float(step)})
    tracker.close("RUNNING")
    first = store.run(run_dir)
    assert first.info.status == "RUNNING"  # a requeued job

    tracker = store.open(run_dir, 7, params={"lr": 0.2, "new": 1}, tags={"loss": "sdt"})
    for step in range(8, 13):
        tracker.log("train", step, {"loss": float(step)})
        if step % 5 == 0:
            tracker.log("val", step, {"top1": float(step)})
    tracker.close("FAILED")
    assert store.run(run_dir).info.status == "FAILED"

    tracker = store.open(run_dir, 12)
    wait_until(lambda: store.run(run_dir).info.status == "RUNNING")
    tracker.close("FINISHED")

    run = store.run(run_dir)
    assert run.info.run_id == first.info.run_id
    assert run.info.status == "FINISHED"
    assert store.history(run_dir, "train/loss") == [(step, float(step)) for step in range(1, 13)]
    assert store.history(run_dir, "val/top1") == [(5, 5.0), (10, 10.0)]
    assert run.data.params == {"model.name": "sew_resnet18", "lr": "0.1", "new": "1"}
    assert run.data.tags["resumed_at_step"] == "7, 12"
    assert run.data.tags["loss"] == "tet"


KILLED = """
import os, sys, time
from pathlib import Path
from tetdist.tracking import mlflow_follower
from tetdist.tracking.tracker import Tracker
from tetdist.tracking.trackers import TrackedRun

mlflow_follower.SEND_EVERY = 0.01
run_dir, uri = Path(sys.argv[1]), sys.argv[2]
tracker = Tracker(TrackedRun(run_dir, "a run", {}, {}, None), tracking_uri=uri,
                  experiment="trials", artifact_root=run_dir.parent / "artifacts")
step = 0
while tracker._follower.sent < 30:  # until MLflow has some, and while it gets more
    step += 1
    tracker.log("train", step, {"loss": float(step), "lr": 0.1})
    if step % 7 == 0:
        tracker.log("val", step, {"top1": float(step)})
    time.sleep(0.002)
with (run_dir / "metrics.jsonl").open("a") as file:
    file.write('{"kind": "train", "step"')
print(step, flush=True)
os._exit(9)
"""


def test_a_killed_run_is_caught_up(store: Store, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    done = run_python(KILLED, run_dir, store.uri)
    assert done.returncode == 9, done.stderr
    last = int(done.stdout)
    assert store.run(run_dir).info.status == "RUNNING"
    in_mlflow = len(store.history(run_dir, "train/loss"))
    assert 20 <= in_mlflow <= last

    # From a step that MLflow is beyond, and then from one that it has not reached.
    checkpoint = 13
    tracker = store.open(run_dir, checkpoint)
    for step in range(checkpoint + 1, last + 21):
        tracker.log("train", step, {"loss": float(step), "lr": 0.1})
        if step % 7 == 0:
            tracker.log("val", step, {"top1": float(step)})
    tracker.close("FINISHED")

    expected = [(step, float(step)) for step in range(1, last + 21)]
    assert store.history(run_dir, "train/loss") == expected
    assert store.history(run_dir, "val/top1") == [pair for pair in expected if pair[0] % 7 == 0]
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert set(Counter((line["kind"], line["step"]) for line in lines).values()) == {1}


def test_steps_computed_again_have_their_new_values(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at step 6 after a checkpoint of step 2; only the speed comes out another."""
    monkeypatch.setitem(sys.modules, "mlflow.system_metrics.system_metrics_monitor", None)
    run_dir = tmp_path / "run"

    def train(tracker: Tracker, first: int, last: int, speed: float) -> None:
        tracker.enter_phase(1)
        for step in range(first, last + 1):
            values = {"loss": math.inf if step == 4 else math.nan if step == 5 else float(step)}
            tracker.log("train", step, values | {"samples_per_s": speed + step, "phase": 1})

    def newest(run: str, key: str) -> dict[int, float]:
        found = sorted(store.client.get_metric_history(run, key), key=lambda m: m.timestamp)
        return {metric.step: metric.value for metric in found}

    tracker = store.open(run_dir, phases=PHASES)
    train(tracker, 1, 6, 100.0)
    tracker.close("RUNNING")  # all that a killed process could have sent
    tracker = store.open(run_dir, 2, phases=PHASES)
    train(tracker, 3, 8, 200.0)
    tracker.close("FINISHED")
    # Nothing is sent a third time.
    store.open(run_dir, 8, phases=PHASES).close("FINISHED")

    speeds = {step: (100.0 if step <= 2 else 200.0) + step for step in range(1, 9)}
    runs = [store.run(run_dir), *store.phases(run_dir)]
    assert len(runs) == 2
    for run in (run.info.run_id for run in runs):
        assert newest(run, "train/samples_per_s") == speeds
        rates = store.client.get_metric_history(run, "train/samples_per_s")
        assert Counter(metric.step for metric in rates) == Counter([*range(1, 9), 3, 4, 5, 6])
        losses = store.client.get_metric_history(run, "train/loss")
        assert sorted(metric.step for metric in losses) == list(range(1, 9))
    assert runs[0].data.metrics["train/samples_per_s"] == 208.0


def test_a_run_that_mlflow_forgot_is_sent_anew(
    store: Store, empty_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    tracker = store.open(run_dir)
    tracker.log("train", 1, {"loss": 1.0})
    tracker.close("KILLED")
    first = store.run(run_dir).info.run_id

    elsewhere = Store(tmp_path / "other")
    elsewhere.folder.mkdir()
    shutil.copy(empty_store, elsewhere.folder / "mlflow.db")
    with caplog.at_level(logging.INFO, logger="tetdist"):
        tracker = elsewhere.open(run_dir, 1)
        tracker.log("train", 2, {"loss": 2.0})
        tracker.close("FINISHED")
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"does not know run {first}" in message
    assert elsewhere.history(run_dir, "train/loss") == [(1, 1.0), (2, 2.0)]

    # Deleted by hand, in the user interface.
    elsewhere.client.delete_run(elsewhere.run(run_dir).info.run_id)
    elsewhere.open(run_dir, 2).close("FINISHED")
    assert elsewhere.history(run_dir, "train/loss") == [(1, 1.0), (2, 2.0)]
    assert elsewhere.run(run_dir).info.lifecycle_stage == "active"


def test_datasets_and_the_registered_model(store: Store, tmp_path: Path) -> None:
    """Once each, however often the run is opened and asks for it."""
    run_dir = tmp_path / "run"
    file = run_dir / "checkpoints" / "step-00000005" / "model.safetensors"
    datasets = [
        Dataset("digits/train", "0123456789abcdef", "/d/train", "training", {"samples": 40}),
        Dataset("digits/val", "fedcba9876543210", "/d/val", "validation", {"samples": 10}),
    ]
    for start in range(3):
        tracker = store.open(run_dir, resume_step=5 if start else None, datasets=datasets)
        if not start:
            file.parent.mkdir(parents=True)
            file.write_bytes(b"weights")
            tracker.log("train", 5, {"loss": 0.5})
        if start:  # asked for afterwards
            tracker.artifact(file)
            tracker.register(file, "digits", "top-1 50 %")
        tracker.close("FINISHED")
        assert len(store.client.search_model_versions("name = 'digits'")) == min(start, 1)
    inputs = store.run(run_dir).inputs.dataset_inputs
    assert sorted((i.dataset.name, i.dataset.digest, i.tags[0].value) for i in inputs) == [
        ("digits/train", "0123456789abcdef", "training"),
        ("digits/val", "fedcba9876543210", "validation"),
    ]
    (version,) = store.client.search_model_versions("name = 'digits'")
    assert version.run_id == store.run(run_dir).info.run_id
    assert version.description == "top-1 50 %"
    folder = Path(version.source.removeprefix("file://"))
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    # Another run's model is the next version.
    other = store.open(tmp_path / "other", datasets=datasets)
    (tmp_path / "other" / "model.safetensors").write_bytes(b"others")
    other.artifact(tmp_path / "other" / "model.safetensors")
    other.register(tmp_path / "other" / "model.safetensors", "digits", "")
    other.close("FINISHED")
    versions = store.client.search_model_versions("name = 'digits'")
    assert sorted(v.version for v in versions) == [1, 2]


def test_an_outage_is_one_line_and_is_caught_up(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = tmp_path / "mlflow.db"
    aside = database.rename(tmp_path / "aside.db")
    database.mkdir()  # so that it cannot be opened
    run_dir = tmp_path / "run"
    with caplog.at_level(logging.INFO, logger="tetdist"):
        tracker = store.open(run_dir)
        for step in range(1, 6):
            tracker.log("train", step, {"loss": float(step)})
        wait_until(lambda: len(caplog.records) > 0)
        assert not (run_dir / "mlflow_run_id").exists()
        database.rmdir()
        aside.rename(database)
        wait_until(lambda: len(store.history(run_dir, "train/loss")) == 5)
        tracker.log("train", 6, {"loss": 6.0})
        tracker.close("FINISHED")
    lost, back = [record.getMessage() for record in caplog.records]
    assert "Training goes on" in lost
    assert lost.count("\n") == 0
    assert "is back" in back
    assert [step for step, _ in store.history(run_dir, "train/loss")] == list(range(1, 7))


# The phases below a run.

PHASES: list[dict[str, Any]] = [
    {"timesteps": 4, "epochs": 90, "optimizer.kind": "sgd", "optimizer.lr": 0.1},
    {"timesteps": 6, "epochs": 30, "optimizer.kind": "adam", "optimizer.lr": 0.001},
]


def log_steps(tracker: Tracker, phase: int, first: int, last: int) -> None:
    """One line a step, and an evaluation at every fifth."""
    for step in range(first, last + 1):
        tracker.log("train", step, {"phase": phase, "loss": float(step)})
        if step % 5 == 0:
            tracker.log("val", step, {"phase": phase, "top1": float(step)})


def assert_all_there(store: Store, run_dir: Path) -> None:
    """Ten steps of each phase, each once."""
    expected = [(step, float(step)) for step in range(1, 21)]
    assert store.history(run_dir, "train/loss") == expected
    assert store.history(run_dir, "val/top1") == expected[4::5]
    assert store.steps(run_dir, "train/loss") == [list(range(1, 11)), list(range(11, 21))]
    assert store.steps(run_dir, "val/top1") == [[5, 10], [15, 20]]
    assert store.statuses(run_dir) == ["FINISHED", "FINISHED"]
    assert store.run(run_dir).info.status == "FINISHED"


def test_each_phase_is_a_run_below_the_run(store: Store, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    tracker = store.open(run_dir, phases=PHASES)
    tracker.enter_phase(0)
    wait_until(lambda: store.statuses(run_dir) == ["RUNNING"])  # before its first line
    log_steps(tracker, 0, 1, 10)
    tracker.enter_phase(1)
    wait_until(lambda: store.statuses(run_dir) == ["FINISHED", "RUNNING"])
    assert store.steps(run_dir, "train/loss") == [list(range(1, 11)), []]
    log_steps(tracker, 1, 11, 20)
    tracker.close("FINISHED")

    assert_all_there(store, run_dir)
    first, second = store.phases(run_dir)
    assert [first.info.run_name, second.info.run_name] == ["phase 0: T=4", "phase 1: T=6"]
    assert first.data.params == {name: str(value) for name, value in PHASES[0].items()}
    assert second.data.params["optimizer.kind"] == "adam"
    assert second.data.metrics["train/phase"] == 1
    parent = store.run(run_dir)
    assert first.data.tags["mlflow.parentRunId"] == parent.info.run_id
    # They are found by the run's tags, too, and by their own T.
    assert first.data.tags["loss"] == "tet"
    assert [run.data.tags["timesteps"] for run in (first, second)] == ["4", "6"]
    assert parent.data.params == {"model.name": "sew_resnet18", "lr": "0.1"}
    assert "mlflow.parentRunId" not in parent.data.tags


def test_a_single_phase_has_no_run_below_it(store: Store, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    tracker = store.open(run_dir, phases=PHASES[:1])
    tracker.enter_phase(0)
    log_steps(tracker, 0, 1, 5)
    tracker.close("FINISHED")
    assert len(store.client.search_runs([store.run(run_dir).info.experiment_id])) == 1
    assert store.history(run_dir, "val/top1") == [(5, 5.0)]


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_the_phase_that_stops_has_the_state_of_its_run(
    store: Store, tmp_path: Path, status: mlflow_follower.Status
) -> None:
    run_dir = tmp_path / "run"
    tracker = store.open(run_dir, phases=PHASES)
    tracker.enter_phase(0)
    log_steps(tracker, 0, 1, 10)
    tracker.enter_phase(1)  # and before its first line, say, memory runs out
    tracker.close(status)
    assert store.statuses(run_dir) == ["FINISHED", status]
    ended = store.phases(run_dir)[0].info.end_time

    tracker = store.open(run_dir, 10, phases=PHASES)
    wait_until(lambda: store.run(run_dir).info.status == "RUNNING")
    tracker.enter_phase(1)
    wait_until(lambda: store.statuses(run_dir) == ["FINISHED", "RUNNING"])
    log_steps(tracker, 1, 11, 13)
    tracker.close("RUNNING")  # a requeued job
    assert store.statuses(run_dir) == ["FINISHED", "RUNNING"]

    tracker = store.open(run_dir, 12, phases=PHASES)
    tracker.enter_phase(1)
    log_steps(tracker, 1, 13, 20)
    tracker.close("FINISHED")
    assert_all_there(store, run_dir)
    assert store.phases(run_dir)[0].info.end_time == ended

    # Started again though nothing is left to do.
    store.open(run_dir, 20, phases=PHASES).close("FINISHED")
    assert_all_there(store, run_dir)


KILLED_IN_PHASE_2 = """
import os, sys, time
from pathlib import Path
from tetdist.tracking import mlflow_follower
from tetdist.tracking.tracker import Tracker
from tetdist.tracking.trackers import TrackedRun

mlflow_follower.SEND_EVERY = 0.01
run_dir, uri = Path(sys.argv[1]), sys.argv[2]
phases = [{"timesteps": 4}, {"timesteps": 6}]
tracker = Tracker(TrackedRun(run_dir, "a run", {}, {}, None), tracking_uri=uri,
                  experiment="trials", artifact_root=run_dir.parent / "artifacts", phases=phases)
end = time.monotonic() + 40
for step in range(1, 18):
    phase = 0 if step <= 10 else 1
    tracker.enter_phase(phase)
    tracker.log("train", step, {"phase": phase, "loss": float(step)})
    if step % 5 == 0:
        tracker.log("val", step, {"phase": phase, "top1": float(step)})
    # MLflow is behind by a different number of lines at each kill.
    while tracker._follower.sent < min(step, int(sys.argv[3])) and time.monotonic() < end:
        time.sleep(0.005)
os._exit(9)
"""


@pytest.mark.parametrize(
    ("sent", "checkpoint"),
    [
        pytest.param(17, 8, marks=pytest.mark.long),
        (17, 10),
        pytest.param(4, 14, marks=pytest.mark.long),
        pytest.param(13, 14, marks=pytest.mark.long),
    ],
)
def test_phases_of_a_killed_run_have_every_step_once(
    store: Store, tmp_path: Path, sent: int, checkpoint: int
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    done = run_python(KILLED_IN_PHASE_2, run_dir, store.uri, sent)
    assert done.returncode == 9, done.stderr

    tracker = store.open(run_dir, checkpoint, phases=PHASES)
    if checkpoint <= 10:
        tracker.enter_phase(0)
        if sent == 17:  # the second phase, which had begun, does not run now
            wait_until(lambda: store.statuses(run_dir) == ["RUNNING", "KILLED"])
        log_steps(tracker, 0, checkpoint + 1, 10)
    tracker.enter_phase(1)
    log_steps(tracker, 1, max(checkpoint, 10) + 1, 20)
    tracker.close("FINISHED")
    assert_all_there(store, run_dir)


def test_phases_that_mlflow_forgot_are_sent_anew(
    store: Store, empty_store: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    tracker = store.open(run_dir)  # by a version that knew nothing of phases
    log_steps(tracker, 0, 1, 10)
    tracker.close("KILLED")
    tracker = store.open(run_dir, 10, phases=PHASES)
    tracker.enter_phase(1)
    log_steps(tracker, 1, 11, 20)
    tracker.close("FINISHED")
    assert_all_there(store, run_dir)

    elsewhere = Store(tmp_path / "other")
    elsewhere.folder.mkdir()
    shutil.copy(empty_store, elsewhere.folder / "mlflow.db")
    elsewhere.open(run_dir, 20, phases=PHASES).close("FINISHED")
    assert_all_there(elsewhere, run_dir)

    # One that was deleted by hand, beside runs that others have hung below ours.
    client, parent = elsewhere.client, elsewhere.run(run_dir).info
    client.delete_run(elsewhere.phases(run_dir)[0].info.run_id)
    below = {"mlflow.parentRunId": parent.run_id}
    for tags in (below, below | {"phase": "of the moon"}):
        client.create_run(parent.experiment_id, tags=tags)
    before = {run.info.run_id for run in client.search_runs([parent.experiment_id])}
    elsewhere.open(run_dir, 20, phases=PHASES).close("FINISHED")
    after = {run.info.run_id for run in client.search_runs([parent.experiment_id])}
    assert before < after
    assert len(after - before) == 1
    assert_all_there(elsewhere, run_dir)


def test_points_that_only_the_run_got_reach_its_phase_later(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    tracker = store.open(run_dir, phases=PHASES)
    tracker.enter_phase(0)
    log_steps(tracker, 0, 1, 7)
    wait_until(lambda: store.steps(run_dir, "train/loss") == [list(range(1, 8))])
    # A store that refuses the points of phases.
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute(
            "create trigger refuse before insert on metrics when new.run_uuid in "
            "(select run_uuid from tags where key = 'phase') "
            "begin select raise(abort, 'no more'); end"
        )
    log_steps(tracker, 0, 8, 10)
    tracker.enter_phase(1)
    log_steps(tracker, 1, 11, 20)
    wait_until(lambda: len(store.history(run_dir, "train/loss")) == 20)
    wait_until(lambda: "Training goes on" in caplog.text)
    assert store.steps(run_dir, "train/loss")[0] == list(range(1, 8))
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("drop trigger refuse")
    tracker.close("FINISHED")
    assert_all_there(store, run_dir)


def test_a_twin_of_a_phases_run_is_let_be(store: Store, tmp_path: Path) -> None:
    # As a request leaves it whose answer was lost.
    run_dir = tmp_path / "run"
    tracker = store.open(run_dir, phases=PHASES)
    tracker.enter_phase(0)
    log_steps(tracker, 0, 1, 4)
    tracker.close("KILLED")
    phase, parent = store.phases(run_dir)[0], store.run(run_dir).info
    tags = {"mlflow.parentRunId": parent.run_id, "phase": "0"}
    for start in (1, 2**42):
        store.client.create_run(parent.experiment_id, start_time=start, tags=tags)
    tracker = store.open(run_dir, 4, phases=PHASES)
    tracker.enter_phase(0)
    log_steps(tracker, 0, 5, 9)
    tracker.close("FINISHED")
    history = store.client.get_metric_history(phase.info.run_id, "train/loss")
    assert sorted(metric.step for metric in history) == list(range(1, 10))
    assert sorted(map(len, store.steps(run_dir, "train/loss"))) == [0, 0, 9]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def server(store: Store, tmp_path: Path) -> Iterator[Callable[[int], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(port: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", store.uri]
        command += ["--artifacts-destination", str(tmp_path / "served")]
        with (tmp_path / "server.log").open("wb") as out:
            # A session of its own, since the server has children.
            process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        started.append(process)
        return process

    yield start
    for process in started:
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


@pytest.mark.long
def test_a_server_comes_late_and_goes_early(
    store: Store,
    server: Callable[[int], subprocess.Popen[bytes]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run_dir = tmp_path / "run"
    port = free_port()
    uri = f"http://user:secret@127.0.0.1:{port}"
    with caplog.at_level(logging.INFO, logger="tetdist"):
        tracker = store.open(run_dir, tracking_uri=uri)
        begin = time.monotonic()
        for step in range(1, 1001):
            tracker.log("train", step, {"loss": float(step)})
        assert time.monotonic() - begin < 2
        (run_dir / "config.yaml").write_text("model: {}\n")
        tracker.artifact(run_dir / "config.yaml")
        wait_until(lambda: len(caplog.records) == 1)
        assert "Connection refused" in caplog.text

        process = server(port)
        # Over the store that the server uses.
        wait_until(lambda: len(store.history(run_dir, "train/loss")) == 1000)
        wait_until(lambda: any((tmp_path / "served").rglob("config.yaml")))
        wait_until(lambda: "is back" in caplog.text)

        end_group(process)
        for step in range(1001, 1011):
            tracker.log("train", step, {"loss": float(step)})
        begin = time.monotonic()
        tracker.close("FINISHED", timeout=5)
        assert time.monotonic() - begin < 7
    assert "up to 10 of the 1010 points" in caplog.records[-1].getMessage()
    assert len(caplog.records) <= 4
    assert "secret" not in caplog.text

    caplog.clear()
    store.open(run_dir, 1010).close("FINISHED")
    assert caplog.records == []
    assert [step for step, _ in store.history(run_dir, "train/loss")] == list(range(1, 1011))
    assert store.run(run_dir).info.status == "FINISHED"


@pytest.mark.long
def test_a_server_is_away_while_the_next_phase_begins(
    store: Store, server: Callable[[int], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    port = free_port()
    process = server(port)
    tracker = store.open(run_dir, tracking_uri=f"http://127.0.0.1:{port}", phases=PHASES)
    tracker.enter_phase(0)
    log_steps(tracker, 0, 1, 8)
    # Over the store that the server uses.
    wait_until(lambda: len(store.history(run_dir, "val/top1")) == 1)
    end_group(process)
    log_steps(tracker, 0, 9, 10)
    tracker.enter_phase(1)
    log_steps(tracker, 1, 11, 14)
    server(port)
    wait_until(lambda: store.statuses(run_dir) == ["FINISHED", "RUNNING"])
    log_steps(tracker, 1, 15, 20)
    tracker.close("FINISHED")
    assert_all_there(store, run_dir)


SHORT_RUN = """
import logging, sys
from pathlib import Path
from tetdist.tracking.tracker import Tracker
from tetdist.tracking.trackers import TrackedRun

logging.basicConfig(level=logging.WARNING)
run_dir, uri = Path(sys.argv[1]), sys.argv[2]
tracker = Tracker(TrackedRun(run_dir, "a run", {"a": 1}, {}, None), tracking_uri=uri,
                  experiment="trials", artifact_root=run_dir.parent / "artifacts")
tracker.log("train", 1, {"loss": 1.0})
sys.stdin.readline()
tracker.close("FINISHED", timeout=float(sys.argv[3]))
"""


def test_a_server_that_never_answers_holds_nobody_up(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        sock.settimeout(60)
        uri = f"http://127.0.0.1:{sock.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-c", SHORT_RUN, str(tmp_path), uri, "1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            sock.accept()  # the request is on its way
            begin = time.monotonic()
            printed, _ = process.communicate("now\n", timeout=60)
        finally:
            process.kill()
    assert time.monotonic() - begin < 10
    assert process.returncode == 0
    assert printed.count("\n") == 1
    assert "no answer within 1 s" in printed
    assert "up to 1 of the 1 points" in printed


@pytest.mark.long
def test_two_runs_make_one_database_at_once_and_print_nothing(
    tmp_path: Path, ended: Callable[..., subprocess.Popen[str]]
) -> None:
    store = Store(tmp_path / "not" / "yet")
    run_dirs = [tmp_path / "a", tmp_path / "b"]
    processes = []
    for run_dir in run_dirs:
        run_dir.mkdir()
        process = subprocess.Popen(
            [sys.executable, "-c", SHORT_RUN, str(run_dir), store.uri, "60"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=run_dir,
            start_new_session=True,
        )
        processes.append(ended(process))
    for process in processes:
        printed, _ = process.communicate(timeout=60)
        assert printed == ""
        assert process.returncode == 0
    assert [store.run(run_dir).info.status for run_dir in run_dirs] == ["FINISHED", "FINISHED"]
    assert [store.history(run_dir, "train/loss") for run_dir in run_dirs] == [[(1, 1.0)]] * 2
    assert len({store.run(run_dir).info.experiment_id for run_dir in run_dirs}) == 1
    assert [entry.name for entry in (tmp_path / "not" / "yet").iterdir()] == ["mlflow.db"]
    for run_dir in run_dirs:
        assert sorted(entry.name for entry in run_dir.iterdir()) == [
            "metrics.jsonl",
            "mlflow_run_id",
        ]


def test_mlflow_missing_is_said_at_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"MLflow is not installed: pip install 'tetdist\[train\]'"):
        store.open(tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# What surrounds a run.


def test_environment_is_json_and_true(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("SLURM_JOB_ID", "42")
    secret = secrets.token_hex()  # which no diff of the checkout has
    monkeypatch.setenv("SLURM_JWT", secret)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    found = json.loads(json.dumps(environment()))
    assert found["packages"]["torch"] == torch.__version__
    assert "mlflow" in found["packages"]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["slurm"]["SLURM_JOB_ID"] == "42"
    assert secret not in json.dumps(found)
    assert (found["cores"], found["usable_cores"]) == (64, 1)


@pytest.mark.skipif(
    shutil.which("git") is None and not os.environ.get("CI"), reason="no git here (CI installs it)"
)
def test_environment_tells_the_state_of_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*args: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    package = tmp_path / "tetdist" / "tracking"
    package.mkdir(parents=True)
    source = package / "tracking.py"
    source.write_text("a = 1\n")
    monkeypatch.setattr(environment_module, "__file__", str(source))
    assert environment()["git"] is None

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = environment()["git"]
    assert clean["commit"] == git("rev-parse", "HEAD").strip()
    assert (clean["dirty"], clean["diff"]) == (False, "")
    source.write_text("a = 2\n")
    dirty = environment()["git"]
    assert dirty["dirty"]
    assert dirty["diff"].endswith("-a = 1\n+a = 2\n")

    # Installed in an environment that lies in somebody's checkout.
    deeper = package / "site-packages" / "tetdist" / "tracking"
    deeper.mkdir(parents=True)
    monkeypatch.setattr(environment_module, "__file__", str(deeper / "tracking.py"))
    assert environment()["git"] is None


def test_ui_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_follower.shutil, "which", lambda _: "/usr/bin/mlflow")
    assert ui_command("sqlite:////a b/x.db") == (
        "mlflow ui --backend-store-uri 'sqlite:////a b/x.db'"
    )
    assert ui_command("https://me:secret@tracker.example.org") == "https://tracker.example.org"
    monkeypatch.setattr(mlflow_follower.shutil, "which", lambda _: None)
    program = Path(ui_command("sqlite:////x.db").split()[0])
    assert program.parent == Path(sys.executable).parent
    assert program.is_file()
