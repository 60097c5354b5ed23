"""Runs on the test cluster: the tiny data set and network, 2 nodes x 2 processes.

They take some seconds of steps, so that there is time to disturb them; every test checks that the
disturbance did hit the run in mid-training.
"""

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
from cluster import Cluster, wait_until

from tetdist.apps.cli import slurm
from tetdist.apps.slurm.history import JobEvent, history, newest_submission, restarts

# Two phases, as in TIT: whatever happens may happen in either.
PHASES = [
    {"epochs": 10, "timesteps": 2, "optimizer": {"kind": "sgd", "lr": 0.05}},
    {"epochs": 20, "timesteps": 3, "optimizer": {"kind": "adam", "lr": 0.004}},
]
FIRST_PHASE, LAST_STEP = 10 * tiny.STEPS_PER_EPOCH, 30 * tiny.STEPS_PER_EPOCH
CHANGES = {
    "model.arguments.channels": [16, 32],
    "phases": PHASES,
    "evaluate_every": 10,
    "engine": "torch",
    "save.every_steps": 10,
    "tracking.mlflow": True,
    "cluster": {"nodes": 2, "tasks_per_node": 2, "gpus_per_node": 0, "time": "10"},
}


@dataclass
class Run:
    """A submitted run, as seen from outside."""

    cluster: Cluster
    path: Path

    @property
    def job(self) -> str:
        submission = newest_submission(self.path)
        return submission.job

    @property
    def log(self) -> str:
        submission = newest_submission(self.path)
        return submission.log_file.read_text() if submission.log_file.exists() else ""

    @property
    def history(self) -> list[JobEvent]:
        return history(self.path)

    @property
    def restarts(self) -> list[JobEvent]:
        return restarts(self.history)

    @property
    def logged_step(self) -> int:
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: self.logged_step >= step, f"step {step} of {self.path}\n{self.log}", 180)
        assert self.logged_step < LAST_STEP, "too late to disturb it"

    def wait_for_start(self, number: int) -> None:
        """Until the run was started for the number-th time, the first being 1."""
        wait_until(
            lambda: sum(event.kind == "started" for event in self.history) >= number,
            f"start {number} of {self.path}: {self.history}",
            300,
        )

    def wait_for(self, kind: str, seconds: float = 240) -> None:
        """Until the newest thing that happened to the run is ``kind``, and no job is left."""

        def done() -> bool:
            return self.history[-1].kind == kind and not self.is_queued

        try:
            wait_until(done, f"{kind} {self.path}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.history}\n{self.log[-3000:]}") from None

    @property
    def is_queued(self) -> bool:
        return any(line.split()[0] == self.job for line in self.cluster.squeue())


@dataclass
class Launcher:
    """Submits runs of one configuration, in this process: a start of Python takes seconds."""

    cluster: Cluster
    config: Path
    runs_dir: Path

    def __call__(self, name: str, *arguments: str) -> Run:
        status = slurm.main(["--config", str(self.config), f"name={name}", *arguments])
        assert status == 0
        return Run(self.cluster, self.runs_dir / name)


def assert_undisturbed(run: Run, straight: Run) -> None:
    """The run is, to the bit, the one that nobody disturbed; MLflow has it once."""
    tiny.assert_same_run(run.path, straight.path)
    assert_mlflow_has(run)
    run.cluster.wait_until_clean()


def mlflow_status(run: Run) -> str:
    with sqlite3.connect(run.path.parent / "mlflow.db") as store:
        ((status,),) = store.execute("select status from runs where name = ?", (run.path.name,))
    return str(status)


def assert_mlflow_has(run: Run) -> dict[str, str]:
    """One run, finished, with every line of metrics once. Returns its tags."""
    with sqlite3.connect(run.path.parent / "mlflow.db") as store:

        def rows(query: str) -> list[Any]:
            return store.execute(query, (run.path.name,)).fetchall()

        found = rows("select run_uuid, status from runs where name = ?")
        assert [status for _, status in found] == ["FINISHED"]
        of_run = "where run_uuid = (select run_uuid from runs where name = ?)"
        points = rows(f"select step, value from metrics {of_run} and key = 'train/loss'")
        assert sorted(points) == [(m["step"], m["loss"]) for m in tiny.metrics(run.path, "train")]
        points = rows(f"select step, value from metrics {of_run} and key = 'val/top1'")
        assert sorted(points) == [(m["step"], m["top1"]) for m in tiny.metrics(run.path, "val")]
        return dict(rows(f"select key, value from tags {of_run}"))
