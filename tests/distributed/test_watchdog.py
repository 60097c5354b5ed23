"""A process that dies, hangs or fails alone ends the others soon, and is named."""

import os
import pickle
import re
import signal

import pytest
import tiny

from tetdist.distributed.world import join

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
PEER_FAILED = 3
HUNG = -999  # farm.py's status for a killed process
RAISED = "LookupError: made for the test"  # by farm.py
RECORDS = "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE"

SOON = {"peer_timeout": 3.0}


@pytest.mark.parametrize(
    ("changes", "stop", "rank", "status", "words"),
    [
        (
            *({}, ("step", 3, KILL), 1, -KILL),
            ["error: rank 1 (process ", "has died or is cut off", "start the same command again"],
        ),
        ({}, ("step", 3, KILL), 0, -KILL, ["rank 1: error: rank 0 has died or cannot be reached"]),
        (SOON, ("start", 1, KILL), 0, -KILL, ["rank 1: error: rank 0 did not open 127.0.0.1, "]),
        (SOON, ("join", 1, KILL), 1, -KILL, ["a process is lost while all connect to each other"]),
        (SOON, ("step", 3, STOP), 1, HUNG, ["rank 1 (process ", "has died or is cut off"]),
        ({}, ("raise", 3, 0), 1, 1, [f"error: rank 1 has failed ('{RAISED}')"]),
    ],
)
def test_lost_process_ends_all(changes, stop, rank, status, words, farm, tiny_config, tmp_path):
    statuses, text = farm.each(
        tiny_config(changes), world=2, stop=stop, rank=rank, timeout=60 if stop[2] == KILL else 30
    )
    expected = [PEER_FAILED, PEER_FAILED]
    expected[rank] = status
    assert statuses == expected, text
    assert [word for word in words if word not in text] == [], text
    assert stop[2] != KILL or text.count("error:") == 1, text
    assert not (tmp_path / "runs/tiny/hang").exists()
    assert text.count("Traceback") == text.count(RAISED + "\n") == (stop[0] == "raise"), text


CHANGED = """
import os, signal, sys, threading, time
import torch.distributed as dist
from tetdist.apps.cli import train
from tetdist.training import step, trainer
{}
sys.exit(train.main(["--config", sys.argv[1]]))
"""


@pytest.mark.parametrize("of", ["all", "one"])
def test_the_cause_is_printed_not_what_came_of_it(of, farm, tiny_config, tmp_path):
    """Rank 0 fails, in an action of all or alone, and takes long to end; rank 1 only notices."""
    code = """
import contextlib
from tetdist.distributed import watchdog
from tetdist.errors import UserError
watchdog.BEAT, watchdog.SILENCE_IN_TROUBLE = 0.1, 0.5
def fail(trainer):
    with trainer.world.together() if OF_ALL else contextlib.nullcontext():
        if os.environ["RANK"] == "0":
            raise UserError("the cause")
trainer.Trainer._check_finite = fail
leave = trainer.Trainer._leave
trainer.Trainer._leave = lambda self: (time.sleep(2 - 2 * self.world.rank), leave(self))
""".replace("OF_ALL", str(of == "all"))
    command = tiny.python("-c", CHANGED.format(code), tiny_config({"engine": "torch"}))
    (status_0, first), (status_1, second) = farm.side_by_side(2, command, tmp_path)
    assert (status_0, status_1) == (2, 2 if of == "all" else PEER_FAILED), first + second
    assert first.splitlines()[-1] == "error: the cause"
    assert first.count("error") == 1
    assert "error" not in second


def test_hanging_process_is_named(farm, tiny_config, tmp_path):
    """A process that is alive without progress: its thread reports that."""
    code = """
sums = step.sums_of
def slow(*arguments):
    if os.environ["RANK"] == "1":
        threading.Event().wait(60)
    return sums(*arguments)
step.sums_of = slow
"""
    file = tiny_config({"peer_timeout": 4.0, "engine": "torch"})
    command = tiny.python("-c", CHANGED.format(code), file)
    (status_0, first), (status_1, second) = farm.side_by_side(2, command, tmp_path)
    assert (status_0, status_1) == (PEER_FAILED, PEER_FAILED), first + second
    expected = r"error: no progress for 4 s: rank 1 \(process \d+ on .*\) hangs at step 1, and the "
    assert re.search(expected, first), first
    folder = tmp_path / "runs/tiny/hang"
    assert f"peer_timeout=SECONDS allows for more; {folder} shows where each process is" in first
    assert "error" not in second, second
    waits, hangs = [(folder / f"stacks_rank_{rank}").read_text() for rank in (0, 1)]
    line = CHANGED.format(code).splitlines().index("        threading.Event().wait(60)") + 1
    assert f'File "<string>", line {line} in slow\n' in hangs
    assert " in finish\n" in waits
    assert " in slow\n" not in waits
    entries = [
        pickle.loads((folder / f"gloo_rank_{rank}").read_bytes())["entries"] for rank in (0, 1)
    ]
    # Rank 0 waits in the average of the gradients, which rank 1 has not begun.
    *before, last = entries[0]
    assert (last["profiling_name"], last["retired"]) == ("gloo:all_reduce", False)
    assert "_arrived" in [frame["name"] for frame in last["frames"]]
    names = [[entry["profiling_name"] for entry in some] for some in (before, entries[1])]
    assert names[0] == names[1] != []


@pytest.mark.parametrize(
    ("blocks", "status"), [("threading.Event().wait(60)", 0), ("ctypes.PyDLL(None).sleep(60)", 1)]
)
def test_evidence_is_left_in_seconds(blocks, status, farm, tmp_path):
    """A file system may hang, and a driver that does not let other threads of Python run."""
    code = f"""
import ctypes, pathlib, sys, threading
from tetdist.distributed import evidence
from tetdist.distributed.world import join
evidence.SECONDS, evidence._write = 0.5, lambda *_: {blocks}
evidence.leave(pathlib.Path("hang"), 0)
sys.exit(0)
"""
    ((ended, text),) = farm.side_by_side(1, tiny.python("-c", code), tmp_path)
    assert (ended, "Timeout (0:00:01)!" in text) == (status, status == 1), text


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("size", ["0", None])
def test_a_users_size_of_the_record_takes_precedence(size, name, monkeypatch):
    for other in RECORDS:
        monkeypatch.delenv(other, raising=False)
    if size:
        monkeypatch.setenv(name, size)
    with join("cpu"):
        sizes = [os.environ[other] for other in RECORDS if other in os.environ]
    assert sizes == [size or "2000"]
