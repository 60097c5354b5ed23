"""One start of a job, and the next: what a process writes down, decides and returns.

Slurm's part is played by an object here; test_runs.py has the real one.
"""

import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import tiny

from tetdist.apps.slurm import history, job, placement
from tetdist.apps.slurm.history import JobEvent
from tetdist.apps.slurm.job import Job, _Start
from tetdist.apps.slurm.placement import ProcessContext, SlurmContext
from tetdist.config import loading
from tetdist.errors import PeerFailed, UserError

TERM, USR1, USR2 = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2
AGAIN = 77


@dataclass(frozen=True)
class Context(ProcessContext):
    """What a test has Slurm say."""

    ended: str | None = None
    cancelled: bool = False
    silent: list[list[str]] = field(default_factory=list)
    asked_again: list[str] = field(default_factory=list)

    def why_stopped(self, number):
        return f"{signal.Signals(number).name} from outside"

    def why_ended(self):
        return self.ended

    def was_cancelled(self):
        return self.cancelled

    def silent_hosts(self):
        return self.silent.pop(0) if self.silent else []

    def start_again(self):
        self.asked_again.append(self.job)
        return AGAIN


@pytest.fixture
def start(tmp_path):
    """Makes the start of a job in one of its processes: (rank, restart, what Slurm says)."""
    run_dir = tmp_path / "run"
    (run_dir / "slurm").mkdir(parents=True)
    (tmp_path / "log").mkdir()

    def make(rank=0, restart=0, **says):
        place = (rank, "12", restart, ("node1", "node2"))
        described = Job(
            run_dir=str(run_dir),
            config=str(run_dir / "config.yaml"),
            code=str(tiny.PROJECT),
            log=str(tmp_path / "log"),
            give_up_after=3,
            warn_before_end=60,
        )
        return _Start(described, Context(*place, **says))

    return make


def note(start, *events):
    for kind, step, text in events:
        history.note(start.run_dir, JobEvent(kind, "12", step=step, text=text))


def kinds(start):
    return [event.kind for event in history.history(start.run_dir)]


def save(start, step):
    (start.run_dir / "checkpoints" / f"step-{step:08}").mkdir(parents=True)


STARTED = ("started", 0, "")


@pytest.mark.parametrize(
    ("events", "ended", "why"),
    [
        ([], "node failure", ""),
        ([("submitted", 0, "")], "node failure", ""),
        ([STARTED, ("failed", 3, "disk full"), ("submitted", 3, "")], None, "submitted again"),
        ([STARTED, ("finished", 9, "")], None, "started again after its end"),
        ([STARTED], "node failure", "node failure"),
        ([STARTED], None, "ended for an unknown reason"),
        ([STARTED, ("stopped", 3, "time limit (SIGUSR2)")], "preempted", "time limit (SIGUSR2)"),
        ([STARTED, ("stopped", 3, "SIGTERM from outside")], "requeued", "requeued (SIGTERM)"),
        ([STARTED, ("stopped", 3, "SIGTERM from outside")], None, "SIGTERM from outside"),
        ([STARTED, ("stopped", 3, "SIGUSR2 from outside")], "preempted", "preempted (SIGUSR2)"),
        # What a process saw of the loss of a node is less than what Slurm knows.
        ([STARTED, ("failed", 3, "rank 1 has died")], "a node failed", "a node failed"),
        ([STARTED, ("failed", 3, "rank 1 has died")], None, "rank 1 has died"),
        ([STARTED, ("stopped", 3, "SIGUSR2 from outside")], "requeued", "SIGUSR2 from outside"),
    ],
)
def test_reason_of_a_start(events, ended, why, start):
    this = start(ended=ended)
    note(this, *events)
    assert this._why_started(history.history(this.run_dir)) == why


def test_starts_are_counted_and_sent_to_mlflow(start, capsys):
    first = start()
    note(first, ("submitted", 0, ""))
    assert first._begin() == {"slurm_job": "12", "restarts": "0"}
    assert capsys.readouterr().err == ""
    save(first, 5)
    assert first._end(128 + USR2) == AGAIN
    why = "SIGUSR2 from outside; on node1, node2"
    told = {"slurm_job": "12", "restarts": "1", "restart_001": f"step 5: {why}"}
    assert start(restart=1)._begin() == told
    assert "restart 1, job 12, from step 5, on node1, node2: SIGUSR2" in capsys.readouterr().err
    assert kinds(first) == ["submitted", "started", "stopped", "started"]
    note(first, *[("started", step, "") for step in range(5, 105)])
    _, restarts, *last = first._begin().items()
    assert restarts == ("restarts", "102")
    assert [name for name, _ in last] == [f"restart_{number:03}" for number in range(3, 103)]


@pytest.mark.parametrize(
    ("steps", "refused"),
    [
        # Of the earlier starts, the checkpoint that each began with; the newest is of step 5.
        ([5, 5], False),
        ([5, 5, 5], True),
        ([0, 5, 5], False),
        ([5, 5, 5, 4], False),
    ],
)
def test_starts_in_vain_are_those_in_a_row_at_this_step(steps, refused, start):
    this = start()
    save(this, 5)
    note(this, ("submitted", 0, ""), *(("started", step, "") for step in steps))
    if refused:
        with pytest.raises(UserError, match="started 3 times without passing step 5"):
            this._begin()
    else:
        this._begin()
    # A new submission is a new attempt.
    note(this, ("submitted", 5, ""))
    this._begin()


@pytest.mark.parametrize(
    ("rank", "status", "cancelled", "answer", "again", "written"),
    [
        (0, 0, False, 0, 0, ["finished"]),
        (0, 128 + USR1, False, AGAIN, 1, ["stopped"]),
        (0, 128 + USR2, False, AGAIN, 1, ["stopped"]),
        # Slurm has decided what comes next.
        (0, 128 + TERM, False, 128 + TERM, 0, ["stopped"]),
        # Slurm would start it again although somebody has cancelled it.
        (0, 128 + USR2, True, 128 + USR2, 0, ["stopped"]),
        (1, 0, False, 0, 0, []),
        # Rank 0 decides, and srun must not end it meanwhile.
        (1, 128 + USR2, False, 0, 0, []),
        (1, 128 + TERM, False, 0, 0, []),
    ],
)
def test_end_of_a_start(rank, status, cancelled, answer, again, written, start):
    this = start(rank, cancelled=cancelled)
    this.config = loading.parse(tiny.changed(tiny.CONFIG, {"name": "x", "data.root": "d"}), "x")
    assert this._end(status) == answer
    assert len(this.context.asked_again) == again
    assert kinds(this) == written


def test_failure_is_written_by_rank_0_alone(start, monkeypatch):
    ignored = []
    monkeypatch.setattr(job.signal, "signal", lambda number, _: ignored.append(number))
    assert start(1)._end_failed(1, "another process says why") == 1
    assert (kinds(start()), ignored) == ([], [])
    assert start(0)._end_failed(2, "there is no index") == 2
    (event,) = history.history(start().run_dir)
    assert (event.kind, event.text) == ("failed", "there is no index")
    # srun ends the processes by it, and rank 0 still has something to write.
    assert ignored == [TERM]


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


@pytest.mark.parametrize("in_thread", [False, True])
def test_lost_node_is_waited_for(in_thread, start, monkeypatch):
    """Also in the watch's thread, where no signal can be handled, for which it must not end."""
    slept = []
    monkeypatch.setattr(job.time, "sleep", slept.append)
    before = signal.getsignal(TERM)
    this = start(silent=[["node2"], ["node2"], []])
    if in_thread:
        with ThreadPoolExecutor(1) as watch:
            watch.submit(this._on_failure, PeerFailed("rank 1 has died")).result()
    else:
        this._on_failure(PeerFailed("rank 1 has died"))
        signal.signal(TERM, before)
    assert len(slept) == 2
    events = [(event.kind, event.text) for event in history.history(this.run_dir)]
    lost = ("stopped", "a node failed: node2 does not answer")
    assert events == [lost, ("failed", "rank 1 has died")]
    # Where all answer, only what the watchdog says has to be written before the process is ended.
    alone = start()
    alone._on_failure(ValueError("of this process"))
    assert len(slept) == 2
    assert len(history.history(alone.run_dir)) == 2


def test_what_was_cancelled_is_not_started_by_a_late_requeue(start):
    this = start()
    note(this, ("submitted", 0, ""), ("cancelled", 3, ""))
    assert this.run() == 128 + TERM
    assert kinds(this) == ["submitted", "cancelled"]
    # Nor does it run other code than was submitted.
    note(this, ("submitted", 3, ""))
    object.__setattr__(this.job, "code", "/elsewhere")
    assert this.run() == 2
    assert kinds(this)[-1] == "failed"


def test_rank_1_writes_where_rank_0_has_died(start):
    start(1)._on_failure(PeerFailed("rank 2 has died"))
    assert kinds(start()) == []
    start(1, restart=1)._on_failure(PeerFailed("rank 0 has died or cannot be reached"))
    (event,) = history.history(start().run_dir)
    assert (event.kind, event.restart) == ("failed", 1)


@pytest.mark.parametrize(
    ("controller", "status"),
    [
        (["takes it"], 0),
        (["refuses", "takes it"], 0),  # It came back between the two questions.
        (["is away", "is away", "takes it"], 0),
        (["refuses", "is away", "refuses", "takes it"], 0),
        (["refuses", "refuses"], 1),
    ],
)
def test_controller_is_asked_until_it_takes_or_refuses(controller, status, monkeypatch):
    states = iter(controller)
    now = [""]

    def ask(*_, timeout):
        assert timeout == placement.REQUEUE_TIMEOUT
        now[0] = next(states)
        return now[0] == "takes it", now[0]

    monkeypatch.setattr(placement, "_run", ask)
    monkeypatch.setattr(placement, "_show", lambda _: "" if now[0] == "is away" else "JobState=")
    monkeypatch.setattr(placement.time, "sleep", lambda _: None)
    place = (0, "12", 0, ("node1", "node2"))
    assert SlurmContext(*place, warn_before_end=60, answering=()).start_again() == status
    assert list(states) == []
