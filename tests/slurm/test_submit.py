"""From a configuration to a job: its script, and the jobs that it waits for."""

from pathlib import Path

import pytest

from tetdist.apps.slurm import history, jobs, status, submit
from tetdist.apps.slurm.cluster import ClusterSection
from tetdist.apps.slurm.history import JobEvent, Submission
from tetdist.config import loading
from tetdist.errors import UserError


def test_job_runs_in_another_folder_and_again_and_again(tiny_config, tmp_path, monkeypatch):
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


def submitted(folder, saved, job="12"):
    """A submitted run of 10 steps, trained up to a step."""
    (folder / "checkpoints" / f"step-{saved:08}").mkdir(parents=True)
    submission = Submission(job, str(folder), "", "", "", {}, 10, 0.0)
    (folder / "config.yaml").touch()
    history.note_submission(history.next_submission(folder), submission)
    return submission


@pytest.fixture
def queue(monkeypatch):
    """The jobs in Slurm's queue, which remembers no others."""
    queue = {}

    def query(program, *_):
        lines = [f"{job}|{state}|Priority||0:00|1:00|N/A" for job, state in queue.items()]
        return (0, "\n".join(lines), "") if program == "squeue" else (1, "", "Invalid job id")

    monkeypatch.setattr(jobs, "query", query)
    monkeypatch.setattr(jobs, "is_here", lambda: True)
    return queue


def test_a_run_that_is_waited_for_is_finished_or_queued(tmp_path, queue, monkeypatch):
    runs = [tmp_path / name for name in ("finished", "queued", "half")]
    for run, saved in zip(runs, (10, 0, 9), strict=True):
        submitted(run, saved, job=run.name)
    queue["queued"] = "PENDING"
    assert submit.jobs_to_wait_for(runs[:2]) == ["queued"]
    with pytest.raises(UserError, match=r"--after: .*half is neither finished nor queued"):
        submit.jobs_to_wait_for(runs)
    with pytest.raises(UserError, match=r"is already queued as job queued \(PENDING\)"):
        jobs.refuse_if_queued(runs[1])
    assert [run.name for run in status.find(str(tmp_path))] == ["finished", "half", "queued"]
    # Without an answer it may be queued, and two jobs must not train in one folder.
    monkeypatch.setattr(jobs, "query", lambda *_: (1, "", "Unable to contact the controller"))
    with pytest.raises(UserError, match="Slurm does not answer: Unable to contact"):
        jobs.refuse_if_queued(runs[1])


@pytest.mark.parametrize(
    "damaged", ["", "null", '{"job": "12"', '{"job": "12"}', "\udcff", "[" * 9999]
)
def test_a_job_with_a_damaged_submission_is_shown_and_cancelled(
    damaged, tmp_path, queue, monkeypatch
):
    whole = submitted(tmp_path, 3)
    queue["12"] = "RUNNING"
    file = tmp_path / "slurm" / "submission-1" / "submission.json"
    file.write_text(damaged, errors="surrogateescape")
    (file.parent / "config.yaml").write_text("")
    assert status.find(str(tmp_path)) == [tmp_path]
    newest = history.newest_submission(tmp_path)
    assert (newest.job, newest.run_dir, newest.log) == ("12", whole.run_dir, str(file.parent))
    assert jobs.state_of(newest).is_queued
    cancelled = []
    monkeypatch.setattr(jobs, "cancel", cancelled.append)
    monkeypatch.setattr(loading, "load_written", lambda path: path)
    monkeypatch.setattr(submit, "announce", lambda *of: cancelled.append(of[0]))
    assert submit.cancel(tmp_path).startswith("cancelled job 12; ")
    assert cancelled == ["12", file.with_name("config.yaml")]
    with pytest.raises(
        UserError, match=r"settings are lost; submit the run again with `.* --config"
    ):
        history.settings_of(tmp_path)
    (tmp_path / "slurm" / "history.jsonl").unlink()
    with pytest.raises(UserError, match=r"submission\.json and the history .* are damaged: cancel"):
        history.newest_submission(tmp_path)


@pytest.mark.usefixtures("queue")
def test_job_that_slurm_does_not_know_is_as_the_run_says(tmp_path, monkeypatch):
    submission = submitted(tmp_path, 10)
    for event, name, text in (
        (JobEvent("failed", "11"), "unknown", "Slurm does not know the job, and it did not start"),
        (JobEvent("submitted", "12"), "unknown", "Slurm does not know the job, and it did not st"),
        (JobEvent("cancelled", "12"), "CANCELLED", "by the run's history, cancelled 20"),
    ):
        history.note(tmp_path, event)
        state = jobs.state_of(submission)
        assert (state.name, state.is_queued) == (name, False)
        assert state.text.startswith(text)
    # Where there is no Slurm, it is not asked.
    monkeypatch.setattr(jobs, "is_here", lambda: False)
    monkeypatch.setattr(jobs, "query", None)
    assert jobs.state_of(submission) == state


def test_job_imports_the_copy_that_was_made_when_it_was_submitted(tiny_config, tmp_path):
    file = tmp_path / "my_loss.py"
    file.write_text("FIRST = True\n")
    config = loading.load(str(tiny_config()), imports=[file])
    run = submit.prepare(config, ClusterSection(gpus_per_node=0))
    folder = history.next_submission(run.config.run_dir)
    described = submit._job(run, folder, tmp_path / "code")
    file.write_text("raise RuntimeError('this is not what was submitted')\n")
    (imported,) = loading.load_written(Path(described.config)).imports
    assert Path(imported).is_relative_to(folder.absolute())
    assert Path(imported).read_text() == "FIRST = True\n"


def test_job_that_slurm_refuses_leaves_nothing_behind(tiny_config, tmp_path, monkeypatch):
    """Unless the run has begun: its folder stays, and its run in MLflow is closed."""
    config = loading.load(str(tiny_config()))
    run = submit.prepare(config, ClusterSection(gpus_per_node=0, tasks_per_node=1))
    told = []

    def refuse(*_):
        # No training begins meanwhile in the folder that is about to be removed.
        with pytest.raises(UserError, match="another process is running in"):
            submit.RunFolder(run.config, submit._world(run.cluster))
        raise UserError("Slurm refuses the job: no such partition")

    monkeypatch.setattr(submit, "refuse_if_queued", lambda _: None)
    monkeypatch.setattr(submit, "announce", lambda _, status, __: told.append(status))
    monkeypatch.setattr(submit.batch, "submit", refuse)
    with pytest.raises(UserError, match="no such partition"):
        submit.submit(run, code=tmp_path)
    assert (told, run.config.run_dir.exists()) == (["SCHEDULED", "DELETED"], False)
    checkpoints = run.config.run_dir / "checkpoints"
    checkpoints.mkdir(parents=True)
    with pytest.raises(UserError, match="no such partition"):
        submit.submit(run, code=tmp_path)
    assert (told[2:], checkpoints.exists()) == (["SCHEDULED", "KILLED"], True)
    assert list(history.slurm_folder(run.config.run_dir).glob("submission-*")) == []
