"""Whole runs on a real cluster: whatever happens to them, they finish as if nothing had.

All tests of the cluster are in this file, so that one of several test processes starts one.
"""

import contextlib
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from cluster import wait_until
from runs import FIRST_PHASE, LAST_STEP, Run, assert_mlflow_has, assert_undisturbed, mlflow_status

from tetdist.apps.cli import slurm
from tetdist.apps.slurm import history
from tetdist.tracking import mlflow_logger

pytestmark = pytest.mark.timeout(600)  # Slurm starts a requeued job up to two minutes later.


def preempt(cluster, run):
    """A job of a higher partition takes the run's nodes, and leaves them at once."""
    nodes = cluster.job(run.job)["NodeList"]
    cluster.run(
        "sbatch",
        "--partition=urgent",
        f"--nodelist={nodes}",
        "--exclusive",
        "--output=/dev/null",
        "--wrap",
        "true",
    )


def test_submitted_to_finished(launcher, straight, capfd):
    assert straight.logged_step == LAST_STEP
    assert [event.kind for event in straight.history] == ["submitted", "started", "finished"]
    tags = assert_mlflow_has(straight)
    assert (tags["slurm_job"], tags["restarts"]) == (straight.job, "0")
    straight.cluster.wait_until_clean()
    # Nothing is left to do, and no job has to wait in the queue to find that out.
    environment = (straight.path / "environment.json").read_text()
    assert slurm.main(["--config", str(launcher.config), "name=straight"]) == 2
    errors = capfd.readouterr().err
    is_finished = f"straight is finished, at step {LAST_STEP}; evaluate it with `python tools/eval"
    assert is_finished in errors
    assert [event.kind for event in straight.history] == ["submitted", "started", "finished"]
    assert (straight.path / "environment.json").read_text() == environment


@pytest.mark.long
def test_preempted_requeued_cancelled_resumed(launcher, straight, cluster, capsys):
    """After its end it is started once more, as Slurm does after some preemptions: it notices."""
    run = launcher("badly-treated")
    run.wait_for_step(FIRST_PHASE + 5)
    preempt(cluster, run)
    run.wait_for_start(2)
    assert FIRST_PHASE < run.restarts[0].step < LAST_STEP
    run.wait_for_step(run.restarts[0].step + 15)
    cluster.run("scontrol", "requeue", run.job)
    run.wait_for_start(3)
    run.wait_for_step(run.restarts[1].step + 15)

    assert slurm.main(["--config", str(launcher.config), f"name={run.path.name}"]) == 2
    assert f"already queued as job {run.job} (RUNNING)" in capsys.readouterr().err
    # At the moment when it is about to requeue itself.
    cluster.run("scancel", "--signal=USR2", run.job)
    assert slurm.main(["cancel", str(run.path)]) == 0
    run.wait_for("stopped")
    assert cluster.job(run.job)["JobState"] == "CANCELLED"
    assert mlflow_status(run) == "KILLED"
    cluster.wait_until_clean()
    # Nothing was lost: it saved before it ended.
    stopped = run.history[-1].step
    assert stopped == run.logged_step

    first = run.job
    assert slurm.main(["resume", str(run.path)]) == 0
    assert run.job != first
    run.wait_for("finished")
    assert [event.step > 0 for event in run.restarts] == [True, True, True]
    assert "preempted (SIGUSR2)" in run.restarts[0].text
    assert "requeued from outside (SIGTERM)" in run.restarts[1].text
    assert run.restarts[2].text.startswith("submitted again")
    assert run.restarts[2].step == stopped
    assert_undisturbed(run, straight)

    cluster.run("scontrol", "requeue", run.job)
    run.wait_for_start(5)
    run.wait_for("finished")
    assert "nothing to do" in run.log
    assert_undisturbed(run, straight)
    tags = assert_mlflow_has(run)
    first = run.restarts[0]
    # A start that finds nothing to do leaves the record as it is.
    assert (tags["restarts"], tags["restart_001"]) == ("3", f"step {first.step}: {first.text}")
    capsys.readouterr()
    assert slurm.main(["status", str(run.path)]) == 0
    output = capsys.readouterr().out
    assert f"{run.path}: finished\n" in output
    assert f"job         {run.job} completed: by the run's history" in output
    assert f"step {LAST_STEP}/{LAST_STEP}" in output
    assert f"from step {first.step}: preempted (SIGUSR2)" in output


@pytest.mark.long
def test_preempted_without_grace_and_a_node_crashes(launcher, straight, cluster):
    """Both cost at most the steps since the last checkpoint; the third node replaces the second."""
    run = launcher("unlucky", "--partition", "abrupt")
    run.wait_for_step(15)
    preempt(cluster, run)
    run.wait_for_start(2)
    run.wait_for_step(run.restarts[0].step + 15)
    cluster.crash("node2")
    # Its peers miss it before Slurm does, and must not end the job before that.
    wait_until(lambda: "waiting for Slurm to requeue the job" in run.log, "the loss", 60)
    cluster.notice_crashes(after=10)
    run.wait_for_start(3)
    cluster.notice_crashes(after=60)
    run.wait_for("finished")
    assert len(run.restarts) == 2
    assert "preempted (SIGUSR2)" in run.restarts[0].text
    assert run.restarts[1].text == "a node failed: node2 does not answer; on node1, node3"
    assert_undisturbed(run, straight)


@pytest.mark.long
def test_a_node_is_lost_and_back(launcher, straight, cluster):
    """Its network stays up, so its peers see at once that it is gone, and Slurm never sees it."""
    run = launcher("rebooted")
    run.wait_for_step(1)
    node = f"node{cluster.job(run.job)['NodeList'].strip(']')[-1]}"
    process = cluster.tasks_of(node)[0]
    run.wait_for_step(15)
    process.suspend()  # or the run might finish before it loses the node
    cluster.lose(node)
    assert run.logged_step < LAST_STEP
    wait_until(lambda: cluster.job(run.job)["JobState"] != "RUNNING", "the loss", 60)
    # What is left of the first start would end the second one's step, which has the same number.
    wait_until(lambda: not cluster.leftovers(), "the end of the first start", 60)
    cluster.boot(node)  # before Slurm's limit of 60 s
    run.wait_for_start(2)
    run.wait_for("finished")
    assert len(run.restarts) == 1
    assert run.restarts[0].text.startswith(f"a node failed: {node} does not answer; on node")
    assert_undisturbed(run, straight)


@pytest.mark.long
def test_a_rank_that_is_killed_is_named(launcher, cluster, capsys):
    """As for want of memory; the others only see that a connection breaks."""
    run = launcher("killed")
    wait_until(lambda: mlflow_status(run) == "RUNNING", "its tracker, which starts by and by", 120)
    for rank in (2, 0):
        run.wait_for_step(run.logged_step + 5)
        cluster.task(run.job, rank).kill()
        run.wait_for("failed")
        assert cluster.job(run.job)["JobState"] == "FAILED"
        assert re.match(rf"rank {rank} .*has died or ", run.history[-1].text)
        capsys.readouterr()
        assert slurm.main(["status", str(run.path)]) == 0
        output = capsys.readouterr().out
        assert re.search(rf"failed +rank \d on node\d:\n +error: rank {rank} .*has died", output), (
            output
        )
        assert "gloo" not in output
        cluster.wait_until_clean()
        if rank == 2:
            assert mlflow_status(run) == "FAILED"
            assert slurm.main(["resume", str(run.path)]) == 0
            run.wait_for_start(2)


@pytest.mark.long
def test_time_limit(launcher, straight, cluster, tmp_path):
    """One process stops itself as soon as it exists, so that a limit of minutes is reached.

    The warning comes while that process has yet to import all; it must not be lost.
    """
    stop = tmp_path / "sitecustomize.py"  # Python imports it first
    stop.write_text(
        "import os, signal\n"
        "if os.environ.get('SLURM_PROCID') == '3':\n"
        "    os.unlink(__file__)\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    setup = f"cluster.setup=[export PYTHONPATH={tmp_path}]"
    # Slurm warns as much as 30 s earlier, and only processes that exist: not in the first minute.
    run = launcher("limited", "--time", "2", "cluster.warn_before_end=30", setup)
    wait_until(lambda: not stop.exists(), "the last process", 120)
    process = cluster.task(run.job, 3)
    try:
        wait_until(lambda: is_pending(process.pid, signal.SIGUSR2), "a warning", 120)
        # One is enough.
        cluster.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=10")
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
    run.wait_for("finished")
    assert run.restarts
    for restart in run.restarts:
        assert restart.text.startswith("time limit (SIGUSR2)")
        assert 0 < restart.step < LAST_STEP
    assert_undisturbed(run, straight)


def is_pending(process, number):
    """Whether a process has a signal that it has not taken yet."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False
    (mask,) = re.findall(r"ShdPnd:\s*(\w+)", status)
    return bool(int(mask, 16) & 1 << (number - 1))


def held(launcher, name, *arguments):
    """A run that waits in the queue until it is released."""
    return launcher(name, "cluster.sbatch.hold=true", *arguments)


def test_submitted_twice_and_cancelled_in_the_queue(launcher, capfd):
    run = held(launcher, "waiting")
    assert mlflow_status(run) == "SCHEDULED"
    assert slurm.main(["--config", str(launcher.config), "name=waiting"]) == 2
    assert f"already queued as job {run.job} (PENDING)" in capfd.readouterr().err
    assert slurm.main(["resume", str(run.path)]) == 2
    assert slurm.main(["cancel", str(run.path)]) == 0
    assert not run.is_queued
    assert mlflow_status(run) == "KILLED"
    # What Slurm refuses leaves the folder free.
    capfd.readouterr()
    assert slurm.main(["resume", str(run.path), "--partition", "nowhere"]) == 2
    assert "error: Slurm refused the job: " in capfd.readouterr().err


def test_two_submissions_at_once_are_one_run(launcher, cluster, monkeypatch, capfd):
    """The second comes when the first is about to make its run in MLflow, and waits for it."""
    name = "twice-at-once"
    arguments = ["--config", str(launcher.config), f"name={name}", "cluster.sbatch.hold=true"]
    create_run, flock = mlflow_logger._create_run, history.flock
    others, locks = [], []

    def submit_another_first(*args, **kwargs):
        if not others:
            others.append(threads.submit(slurm.main, arguments))
            wait_until(lambda: len(locks) == 2, "that the second wants the lock", 60)
        return create_run(*args, **kwargs)

    monkeypatch.setattr(history, "flock", lambda *args: (locks.append(args), flock(*args)))
    monkeypatch.setattr(mlflow_logger, "_create_run", submit_another_first)
    with ThreadPoolExecutor(1) as threads:
        assert slurm.main(arguments) == 0
        assert others[0].result() == 2
    run = Run(cluster, launcher.runs_dir / name)
    assert f"is already queued as job {run.job} (PENDING)" in capfd.readouterr().err
    assert mlflow_status(run) == "SCHEDULED"  # of the only run of this name
    assert [line.split()[0] for line in cluster.squeue()] == [run.job]
