"""One start of a job: what a process decides, by its history, a signal and Slurm's answers.

Slurm's commands are answered by an object here; test_runs.py has the real ones.
"""

import contextlib
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import tiny

from tetdist.apps.slurm import history, job, jobs, placement
from tetdist.apps.slurm.history import JobEvent
from tetdist.apps.slurm.job import Job, Start
from tetdist.apps.slurm.placement import Context
from tetdist.errors import PeerFailed, UserError

TERM, USR1, USR2 = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2
QUERY = jobs.query


class Slurm:
    """Answers of Slurm, set by a test, and the jobs that it was asked to requeue."""

    account = shown = refusal = ""

    def __init__(self):
        self.requeued = []

    def query(self, program, *arguments, **_):
        if program == "sacct":
            return 0, self.account, ""
        if arguments[0] == "show":
            return 0, self.shown, ""
        assert arguments[0] == "requeue"
        self.requeued.append(arguments[1])
        return bool(self.refusal), "", self.refusal


@pytest.fixture(autouse=True)
def slurm(monkeypatch):
    slurm = Slurm()
    monkeypatch.setattr(jobs, "query", slurm.query)
    return slurm


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Makes the start of a job in one of its processes: (rank, restart, other hosts)."""
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    run_dir = tmp_path / "run"
    (run_dir / "slurm").mkdir(parents=True)
    (tmp_path / "log").mkdir()

    def make(rank=0, restart=0, others=()):
        places = (run_dir, run_dir / "config.yaml", tiny.PROJECT, tmp_path / "log")
        described = Job(*map(str, places), give_up_after=3, warn_before_end=60)
        return Start(described, Context(rank, "12", restart, ("node1", "node2"), 60, dict(others)))

    return make


def note(start, *events):
    for kind, step, text in events:
        history.note(start.run_dir, JobEvent(kind, "12", step=step, text=text))


def written(start):
    return [(event.kind, event.text) for event in history.history(start.run_dir)]


def save(start, step):
    (start.run_dir / "checkpoints" / f"step-{step:08}").mkdir(parents=True)


STARTED = ("started", 0, "")
TERMED, USED = (("stopped", 3, f"{name} from outside") for name in ("SIGTERM", "SIGUSR2"))
LOST = "a node failed (NODE_FAIL)"


@pytest.mark.parametrize(
    ("events", "account", "why"),
    [
        ([], "NODE_FAIL", ""),
        ([("submitted", 0, "")], "NODE_FAIL", ""),
        ([STARTED, ("failed", 3, "disk full"), ("submitted", 3, "")], "", "submitted again"),
        ([STARTED, ("finished", 9, "")], "", "started again after its end"),
        ([STARTED], "PREEMPTED\nNODE_FAIL\nRUNNING", LOST),
        ([STARTED], "RUNNING", "ended for an unknown reason"),
        ([STARTED, ("stopped", 3, "time limit (SIGUSR2)")], "PREEMPTED", "time limit (SIGUSR2)"),
        ([STARTED, TERMED], "REQUEUED\nPENDING", "requeued from outside (SIGTERM)"),
        ([STARTED, TERMED], "", "SIGTERM from outside"),
        ([STARTED, USED], "PREEMPTED", "preempted (SIGUSR2)"),
        ([STARTED, USED], "REQUEUED", "SIGUSR2 from outside"),
        # What a process saw of the loss of a node is less than what Slurm knows.
        ([STARTED, ("failed", 3, "rank 1 has died")], "NODE_FAIL", LOST),
        ([STARTED, ("failed", 3, "rank 1 has died")], "", "rank 1 has died"),
    ],
)
def test_reason_of_a_start(events, account, why, start, slurm):
    this, slurm.account = start(), account
    note(this, *events)
    events = history.history(this.run_dir)
    assert history.reason_of_start(events, this.context.why_ended) == why


def test_starts_are_counted_and_sent_to_mlflow(start, capsys):
    first = start()
    note(first, ("submitted", 0, ""))
    assert first._begin() == {"slurm_job": "12", "restarts": "0"}
    assert capsys.readouterr().err == ""
    save(first, 5)
    assert first._end(128 + USR2) == 0
    why = "SIGUSR2 from outside; on node1, node2"
    told = {"slurm_job": "12", "restarts": "1", "restart_001": f"step 5: {why}"}
    assert start(restart=1)._begin() == told
    assert "restart 1, job 12, from step 5, on node1, node2: SIGUSR2" in capsys.readouterr().err
    note(first, *[("started", step, "") for step in range(5, 105)])
    _, restarts, *last = first._begin().items()
    assert restarts == ("restarts", "102")
    assert [name for name, _ in last] == [f"restart_{number:03}" for number in range(3, 103)]


# Of the earlier starts, the checkpoint that each began with; the newest is of step 5.
@pytest.mark.parametrize(
    ("steps", "vain"), [([5, 5], 2), ([5, 5, 5], 3), ([0, 5, 5], 2), ([5, 5, 5, 4], 0)]
)
def test_starts_in_vain_are_those_in_a_row_at_this_step(steps, vain, start):
    this = start()
    save(this, 5)
    note(this, ("submitted", 0, ""), *(("started", step, "") for step in steps))
    refusal = pytest.raises(UserError, match="started 3 times without passing step 5")
    with refusal if vain == 3 else contextlib.nullcontext():
        this._begin()
    # A new submission is a new attempt.
    note(this, ("submitted", 5, ""))
    this._begin()


def test_places_of_processes_are_those_of_srun(monkeypatch):
    place = {"JOB_ID": "12", "PROCID": "5", "LOCALID": "1", "NODEID": "1", "NTASKS": "8"}
    place |= {"JOB_NUM_NODES": "2", "JOB_NODELIST": "node[1-2]"}
    variables = {f"SLURM_{name}": value for name, value in place.items()}
    monkeypatch.setattr(os, "environ", dict(os.environ) | variables)
    placement.export_place()
    expected = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    assert os.environ.items() >= expected.items()


COMPLETING = "JobId=12 JobState=COMPLETING Reason="


@pytest.mark.parametrize(
    ("rank", "status", "shown", "answer", "requeued", "event"),
    [
        (0, 0, "", 0, 0, ("finished", "")),
        (0, 3, "", 3, 0, ("failed", "")),
        (0, 128 + USR1, "", 0, 1, ("stopped", "SIGUSR1 from outside")),
        (0, 128 + USR2, "PreemptTime=None", 0, 1, ("stopped", "SIGUSR2 from outside")),
        (0, 128 + USR2, "PreemptTime=2026", 0, 1, ("stopped", "preempted (SIGUSR2)")),
        (0, 128 + USR2, "the end is near", 0, 1, ("stopped", "time limit (SIGUSR2)")),
        (0, 128 + USR2, f"{COMPLETING}TimeLimit", 0, 1, ("stopped", "SIGUSR2 from outside")),
        (0, 128 + USR2, "it refuses", 1, 2, ("stopped", "SIGUSR2 from outside")),
        # Slurm would start it again although somebody has cancelled it.
        (0, 128 + USR2, f"{COMPLETING}None", 140, 0, ("stopped", "SIGUSR2 from outside")),
        # Slurm has decided what comes next.
        *[
            (0, 128 + TERM, shown, 143, 0, ("stopped", f"SIGTERM from outside: {what}"))
            for what in ["cancelled, preempted or requeued"]
            for shown in ("", "the end is near")
        ],
        # Rank 0 decides, and srun must not end it meanwhile.
        *[(1, status, "", 0, 0, None) for status in (0, 128 + USR2, 128 + TERM)],
    ],
)
def test_end_of_a_start(rank, status, shown, answer, requeued, event, start, slurm, monkeypatch):
    this, slurm.shown, slurm.refusal = start(rank), shown, shown if "refuses" in shown else ""
    if shown == "the end is near":
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    assert this._end(status) == answer
    assert slurm.requeued == ["12"] * requeued
    assert written(this) == ([] if event is None else [event])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("error", "status", "event"),
    [
        (UserError("there is no index"), 2, ("failed", "there is no index")),
        (RuntimeError("a bug\nof ours"), 1, ("failed", "RuntimeError: a bug")),
        (SystemExit(2), 2, ("failed", "see the log of another process")),
        (PeerFailed("rank 1 has died"), 3, None),  # `_record_failure` has written it.
    ],
)
def test_failure_is_written_by_rank_0_alone(rank, error, status, event, start, monkeypatch, capsys):
    ignored = []
    monkeypatch.setattr(job.signal, "signal", lambda number, _: ignored.append(number))
    this = start(rank)

    def fail():
        raise error

    monkeypatch.setattr(this, "_train", fail)
    assert this.run() == status
    assert written(this) == ([event] if event and rank == 0 else [])
    # srun ends the processes by it, and rank 0 still has something to write.
    assert ignored == ([TERM] if event and rank == 0 else [])
    prefix = "rank 1: " if rank else ""
    errors = capsys.readouterr().err
    assert (f"{prefix}error: {error}" in errors) == isinstance(error, UserError | PeerFailed)
    assert ("Traceback" in errors) == isinstance(error, RuntimeError)


@pytest.mark.parametrize("log", ["elsewhere", "full"])
def test_full_disk_is_said_before_anything_is_written(log, start, monkeypatch, capsys):
    this, error = start(), UserError("the disk is full")

    def fail():
        (this.run_dir / "slurm" / "history.jsonl").symlink_to("/dev/full")
        this.log.rmdir()
        this._record_failure(error)
        raise error

    monkeypatch.setattr(this, "_train", fail)
    if log == "full":
        monkeypatch.setattr(job.sys, "stderr", Mock(**{"write.side_effect": OSError}))
    assert this.run() == 2
    if log == "elsewhere":
        recorded, said, *others = capsys.readouterr().err.splitlines()
        assert said == "error: the disk is full"
        assert recorded.startswith("not recorded: [Errno 2] ")
        assert others[-1] == "not recorded: [Errno 28] No space left on device"


def test_first_failure_is_kept_and_shown(start, capsys):
    first, second = start(1), start(0)
    first._write_failure(ValueError("the cause"))
    first._write_failure(RuntimeError("what came of it"))
    second._write_failure(ConnectionError("a consequence"))
    second._show_first_failure()
    errors = capsys.readouterr().err
    assert errors.startswith("the first to fail was rank 1 on ")
    assert "the cause" in errors
    assert "what came of it" not in errors
    assert "a consequence" not in errors
    # That of an earlier start is not this one's.
    start(0, restart=1)._show_first_failure()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("in_thread", "answer"), [(False, 0), (True, 0), (True, 1)])
def test_lost_node_is_waited_for(in_thread, answer, start, slurm, monkeypatch):
    """Also in the watch's thread, where no signal can be handled, for which it must not end.

    The node gives no answer or, without Slurm's daemon, refuses the connection.
    """
    slept, answers = [], iter([answer, answer, 2, 2, 1])
    monkeypatch.setattr(job.time, "sleep", slept.append)
    monkeypatch.setattr(placement, "_answer", lambda host: next(answers) if host == "node2" else 2)
    before = signal.getsignal(TERM)
    this = start(others={"node2": 2, "node3": 2})
    if in_thread:
        with ThreadPoolExecutor(1) as watch:
            watch.submit(this._record_failure, PeerFailed("rank 1 has died")).result()
    else:
        this._record_failure(PeerFailed("rank 1 has died"))
    assert len(slept) == 2
    lost = ("stopped", "a node failed: node2 does not answer")
    assert written(this) == [lost, ("failed", "rank 1 has died")]
    assert slurm.requeued == ["12"]
    # Where all answer, only what the watchdog says has to be written before the process is ended.
    start(others={"node2": 2})._record_failure(ValueError("of this process"))
    # Another port than the usual one is always refused.
    start(others={"node2": 1})._record_failure(ValueError("of this process"))
    assert (len(slept), len(written(this))) == (2, 2)
    # Rank 0 has the job requeued for all.
    answers = iter([0, 2])
    start(rank=1, others={"node2": 2})._record_failure(ValueError("of this process"))
    signal.signal(TERM, before)
    assert (len(slept), slurm.requeued) == (3, ["12"])


def test_what_was_cancelled_is_not_started_by_a_late_requeue(start):
    this = start()
    note(this, ("submitted", 0, ""), ("cancelled", 3, ""))
    assert this.run() == 128 + TERM
    assert len(written(this)) == 2
    # Nor does it run other code than was submitted.
    note(this, ("submitted", 3, ""))
    object.__setattr__(this.job, "code", "/elsewhere")
    assert this.run() == 2
    assert written(this)[-1][0] == "failed"


def test_rank_1_writes_where_rank_0_has_died(start):
    start(1)._record_failure(PeerFailed("rank 2 has died"))
    assert written(start()) == []
    start(1, restart=1)._record_failure(PeerFailed("rank 0 has died or cannot be reached"))
    (event,) = history.history(start().run_dir)
    assert (event.kind, event.restart) == ("failed", 1)


@pytest.mark.parametrize(
    ("errors", "is_up", "status"),
    [
        ([""], True, 0),
        (["Unexpected message", "Socket timed out", ""], False, 0),
        (["Socket timed out", ""], True, 0),
        (["Invalid job id specified"], True, 1),
    ],
)
def test_controller_is_asked_until_it_accepts_or_refuses(
    errors, is_up, status, monkeypatch, capsys
):
    answers = iter(errors)

    def answer(command, **_):
        if command == ("scontrol", "ping"):
            return subprocess.CompletedProcess(command, 0, b"UP" if is_up else b"DOWN")
        error = next(answers)
        return subprocess.CompletedProcess(command, bool(error), "", error)

    monkeypatch.setattr(jobs.subprocess, "run", answer)
    monkeypatch.setattr(jobs.time, "sleep", lambda _: None)
    assert QUERY("scontrol", "requeue", "12")[0] == status
    assert list(answers) == []
    reports = capsys.readouterr().err.count("Slurm does not answer scontrol; retrying for up to 60")
    assert reports == (len(errors) > 1)
