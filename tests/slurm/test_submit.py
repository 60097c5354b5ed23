"""From a configuration to a job: what the job is told, and whom it waits for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tetdist.apps.slurm import history, submit
from tetdist.apps.slurm.cluster import ClusterSection
from tetdist.apps.slurm.history import LOCAL, Submission
from tetdist.config import loading
from tetdist.errors import UserError

ConfigWriter = Callable[..., Path]


def test_job_runs_in_another_folder_and_again_and_again(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"data.root": "data", "data.index": "where/index", "runs_dir": "out"}
    cluster = {"cluster.gpus_per_node": 2}
    given = {"tracking.uri": "http://me:secret@host", "resume": "never"}
    config = loading.load(str(tiny_config(places | cluster | given)))
    job = submit.absolute(config)
    assert job.data.root == str(tmp_path / "data")
    assert job.data.index == str(tmp_path / "where/index")
    assert job.runs_dir == str(tmp_path / "out")
    # Asked once, when it is submitted: its second start finds the run of its first.
    assert job.resume == "auto"
    # What is left of the cluster's facts is in the submission.
    assert job.as_dict()["cluster"] == {}
    assert "uri: http://host\n" in job.as_yaml()


def test_whoever_is_waited_for_is_finished_or_queued(tmp_path: Path) -> None:
    def run(name: str, saved: int) -> Path:
        """A run of 10 steps, trained on this machine up to a step."""
        folder = tmp_path / name
        (folder / "checkpoints" / f"step-{saved:08}").mkdir(parents=True)
        submission = Submission(
            job=LOCAL,
            run_dir=str(folder),
            config="",
            code="",
            log="",
            cluster={},
            last_step=10,
            steps_per_epoch=5,
            global_batch=8,
            time=0.0,
        )
        history.write_submission(history.next_submission(folder), submission)
        return folder

    assert submit.jobs_to_wait_for([run("finished", 10)]) == []
    with pytest.raises(UserError, match=r"--after: .*half is neither finished nor queued"):
        submit.jobs_to_wait_for([run("also finished", 10), run("half", 9)])


def test_job_that_slurm_refuses_leaves_nothing_behind(
    tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But a closed run in MLflow, and a folder in which the run may be submitted again."""
    config = loading.load(str(tiny_config()))
    run = submit.prepare(config, ClusterSection(gpus_per_node=0, tasks_per_node=1))
    told: list[str | None] = []

    def refuse(*_: Any) -> list[str]:
        raise UserError("Slurm refuses the job: no such partition")

    monkeypatch.setattr(submit, "is_here", lambda: True)
    monkeypatch.setattr(submit, "refuse_if_queued", lambda _: None)
    monkeypatch.setattr(history, "announce", lambda _run, status, _tags: told.append(status))
    monkeypatch.setattr(submit.batch, "submit", refuse)
    with pytest.raises(UserError, match="no such partition"):
        submit.submit([run], "tiny", code=tmp_path)
    assert told == ["SCHEDULED", "KILLED"]
    assert history.history(run.config.run_dir) == []
    assert history.newest_submission(run.config.run_dir) is None
    with history.submitting(run.config.run_dir):
        pass
