"""A process that dies, hangs or fails alone ends the others soon, and is named."""

import os
import re
import signal

import pytest
import tiny

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
PEER_FAILED = 3
HUNG = -999  # farm.py's status for a killed process


def test_killed_process_is_named(farm, tiny_config):
    statuses, text = farm.each(tiny_config(), world=2, stop=("step", 3, KILL), rank=1)
    assert statuses == [PEER_FAILED, -KILL], text
    assert text.count("error:") == 1, text
    assert "error: rank 1 (process " in text
    assert "has died or is cut off" in text
    assert "the same command continues from the last checkpoint" in text
    assert "Traceback" not in text


def test_killed_rank_0(farm, tiny_config):
    statuses, text = farm.each(tiny_config(), world=2, stop=("step", 3, KILL), rank=0)
    assert statuses == [-KILL, PEER_FAILED], text
    assert "rank 1: error: rank 0 has died or cannot be reached" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("point", "rank", "message"),
    [
        pytest.param(
            *("start", 1, "error: of 2 processes rank 1 did not join within 3 s"),
            marks=pytest.mark.long,
        ),
        ("start", 0, "rank 1: error: rank 0 did not open 127.0.0.1, port "),
        ("met", 1, "error: a process is lost while all connect to each other"),
    ],
)
def test_killed_before_all_have_met(point, rank, message, farm, tiny_config):
    statuses, text = farm.each(
        tiny_config({"peer_timeout": 3.0}), world=2, stop=(point, 1, KILL), rank=rank, timeout=30
    )
    assert statuses == [-KILL if i == rank else PEER_FAILED for i in range(2)], text
    assert message in text
    assert text.count("error:") == 1, text
    assert "Traceback" not in text


def test_killed_rank_0_is_noticed_by_the_store_first(farm, tiny_config, tmp_path):
    """The thread has met the broken store before the training meets the broken collective."""
    file = tiny_config({"engine": "torch"})
    code = f"""
import os, signal, sys, time
import torch.distributed as dist
from tetdist.apps.cli import train
from tetdist.training import trainer
def check(trainer):
    if os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        for _ in range(3000):
            trainer.watch._store.set("test", "")
            time.sleep(0.01)
        raise AssertionError("the store is still there")
    except (dist.DistError, RuntimeError):
        pass
trainer.Trainer._check_finite = check
sys.exit(train.main(["--config", {str(file)!r}]))
"""
    (status_0, first), (status_1, second) = farm.side_by_side(2, tiny.python("-c", code), tmp_path)
    assert (status_0, status_1) == (-KILL, PEER_FAILED), first + second
    assert "rank 1: error: rank 0 has died or cannot be reached" in second
    assert "Traceback" not in second


@pytest.mark.parametrize(
    ("rank", "parts"),
    [
        (1, ["error: rank 1 (process ", "has died or is cut off"]),
        pytest.param(
            0, ["rank 1: error: rank 0 has stopped or cannot be reached"], marks=pytest.mark.long
        ),
    ],
)
def test_stopped_process_ends_the_others(rank, parts, farm, tiny_config):
    statuses, text = farm.each(
        tiny_config({"peer_timeout": 3.0}), world=2, stop=("step", 3, STOP), rank=rank, timeout=30
    )
    expected = [PEER_FAILED, PEER_FAILED]
    expected[rank] = HUNG
    assert statuses == expected, text
    assert [part for part in parts if part not in text] == [], text


def test_hanging_process_is_named(farm, tiny_config, tmp_path):
    """A process that is alive without progress: its thread reports that."""
    file = tiny_config({"peer_timeout": 4.0, "engine": "torch"})
    code = f"""
import os, sys, threading
from tetdist.apps.cli import train
from tetdist.training import step
sums = step.sums_of
def slow(*arguments):
    if os.environ["RANK"] == "1":
        threading.Event().wait(60)
    return sums(*arguments)
step.sums_of = slow
sys.exit(train.main(["--config", {str(file)!r}]))
"""
    (status_0, first), (status_1, second) = farm.side_by_side(2, tiny.python("-c", code), tmp_path)
    assert (status_0, status_1) == (PEER_FAILED, PEER_FAILED), first + second
    expected = r"error: no progress for 4 s: rank 1 \(process \d+ on .*\) hangs at step 1, and the "
    assert re.search(expected, first), first
    assert "peer_timeout=SECONDS" in first
    assert "error" not in second, second


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.long)])
def test_error_of_one_process_ends_all(rank, farm, tiny_config):
    statuses, text = farm.each(tiny_config(), world=2, stop=("raise", 3, 0), rank=rank)
    assert statuses[rank] == 1, text
    assert statuses[1 - rank] == PEER_FAILED, text
    assert text.count("Traceback") == 1, text
    assert "LookupError: made for the test" in text
    if rank == 1:
        assert "error: rank 1 has failed ('LookupError: made for the test')" in text


def test_bad_file_on_one_process_ends_all(farm, tiny_copy, tiny_config):
    """A user's mistake that only one process meets."""
    file = tiny_copy / "train/left/03.png"
    status = file.stat()
    file.write_bytes(bytes(status.st_size))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    config = tiny_config({"data.root": str(tiny_copy)})
    statuses, text = farm.each(config, world=2, stop=None, rank=0)
    assert sorted(statuses) == [2, PEER_FAILED], text
    assert "error: " in text
    assert "train/left/03.png" in text
    assert "Traceback" not in text
