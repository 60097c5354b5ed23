"""The checks end and report their findings, whatever happens to a process."""

import dataclasses
import json
import math
import os
import signal
import threading
import types
from pathlib import Path

import pytest
import tiny

from tetdist.apps.check_gpu import remedies, run
from tetdist.apps.check_gpu.check import Finding, Machine
from tetdist.apps.check_gpu.run import run_checks

# Runs the command with checks of its own, of which the second has rank 1 fail or die, or hangs if
# there is a single process. Arguments: the JSON file, a folder for temporary files, who dies.
COMMAND = """
import os, sys, tempfile, threading, types
from tetdist.apps.check_gpu import run
from tetdist.apps.check_gpu.check import Finding
from tetdist.distributed import watchdog
file, tempfile.tempdir, dying = sys.argv[1:]
run.STANDSTILL, watchdog.SILENCE = 1.0, 3.0

def fine(here):
    return Finding("ok", "7 of 7", None, {"folder": str(here.folder)})

def averages(here):
    if str(here.world.rank) == dying:
        os._exit(7)
    if here.world.rank == 1 and dying == "none":
        raise RuntimeError("the GPU has fallen off the bus")
    here.world.sum([1.0])
    if here.world.world_size == 1:
        threading.Event().wait()
    return fine(here)

sys.modules["tetdist.apps.check_gpu.checks"] = types.SimpleNamespace(
    CHECKS={"versions": fine, "steps": averages, "rates": fine}
)
from tetdist.apps.cli import check_gpu
check_gpu.NAMES = ("versions", "steps", "rates")
sys.exit(check_gpu.main(["--device", "cpu", "--json", file]))
"""


@pytest.fixture
def here(alone, tmp_path):
    return Machine(alone, small=True, folder=tmp_path)


@pytest.fixture
def temporary(tmp_path):
    """A folder for the temporary ones of processes that a test starts."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


def test_a_rank_that_fails_in_a_collective_keeps_nobody_waiting(farm, tmp_path, temporary):
    file = tmp_path / "found.json"
    both = farm.side_by_side(2, tiny.python("-c", COMMAND, file, temporary, "none"), tmp_path)
    assert [status for status, _ in both] == [1, 1], both
    output = both[0][1]
    assert "bad       steps                  rank 1: RuntimeError: the GPU has fallen off" in output
    assert "to fix: steps: " in output.splitlines()[-1]
    assert output.splitlines()[-1].endswith("not reached: rates")
    found = json.loads(file.read_text())
    assert list(found["checks"]) == ["versions", "steps"]
    first, second = found["checks"]["steps"]["by_rank"]
    assert first["text"].startswith("waits for rank 1 at distributed/world.py, line ")
    assert "Traceback" in second["traceback"]
    assert found["not_reached"] == ["rates"]
    assert list(temporary.iterdir()) == []


def test_a_rank_that_dies_is_a_finding(farm, tmp_path, temporary):
    file = tmp_path / "found.json"
    both = farm.side_by_side(2, tiny.python("-c", COMMAND, file, temporary, 0), tmp_path)
    assert [status for status, _ in both] == [7, 3], both
    assert "error: rank 0 has " in both[1][1]
    assert list(json.loads(file.read_text())["checks"]) == ["versions"]
    both = farm.side_by_side(2, tiny.python("-c", COMMAND, file, temporary, 1), tmp_path)
    assert [status for status, _ in both] == [3, 7], both
    output = both[0][1]
    assert ". All processes end; the findings so far are kept" in output
    assert "bad       steps                  rank 1 (process " in output
    found = json.loads(file.read_text())
    assert found["checks"]["steps"]["remedy"] == remedies.DEAD
    assert found["not_reached"] == ["rates"]
    # Those of the processes that died are left.
    assert len(list(temporary.iterdir())) == 2


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_the_findings_and_no_folder(tmp_path, temporary, number):
    """Also while a check waits where Python cannot be interrupted."""
    file = tmp_path / "found.json"

    def is_at_the_second():
        return file.is_file() and "versions" in json.loads(file.read_text())["checks"]

    environment = tiny.clean_environment(PYTHONPATH=str(tiny.PROJECT), TETDIST_COMMAND="check_gpu")
    command = tiny.python("-c", COMMAND, file, temporary, "none")
    with tiny.started(command, tmp_path, environment) as process:
        tiny.wait_until(is_at_the_second, 60)
        assert len(list(temporary.iterdir())) == 1
        os.kill(process.pid, number)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number, output
    assert f"interrupted; {file} has the findings so far" in output
    assert json.loads(file.read_text())["not_reached"] == ["steps", "rates"]
    assert list(temporary.iterdir()) == []


@pytest.fixture
def hanging():
    """A check that comes to no end before the test does."""
    awaited = threading.Event()

    def hang(_):
        awaited.wait()
        return Finding("ok", "at last")

    yield hang
    awaited.set()


def test_a_check_that_hangs_ends_at_its_limit(here, hanging, monkeypatch):
    monkeypatch.setattr(Machine, "limit", 0.3)
    kept = []

    def keep(report):
        kept.append(list(report.not_reached))

    report = run_checks({"fine": fine, "resume": hanging, "last": fine}, here, keep)
    assert report.hangs
    assert report.results[-1].worst.text.startswith("stands still since 0 s at ")
    assert report.conclusion().startswith("to fix: resume: check the GPUs with nvidia-smi")
    assert report.conclusion().endswith("; not reached: last")
    # What was found is kept after each check.
    assert kept == [["resume", "last"], ["last"]]


def test_a_check_that_moves_has_time_until_all_checks_have_to_end(here, monkeypatch):
    """As on a busy machine, where all is slow, and nothing hangs."""
    ended = threading.Event()

    def move(_):
        while not ended.is_set():
            ended.wait(0.07)
            ended.wait(0.07)
        return Finding("ok", "at last")

    monkeypatch.setattr(Machine, "limit", 1.0)
    monkeypatch.setattr(run, "BUDGET", 1.2)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0,))
    report = run_checks({"slow": move, "last": fine}, here)
    ended.set()
    assert "the time for all checks: it is at" in report.results[0].worst.text
    alone = "run the same command with --only slow, which then has more time"
    assert report.conclusion() == f"to fix: slow: {alone}; not reached: last"
    monkeypatch.setattr(os, "getloadavg", lambda: (1e4,))
    busy = remedies.slow("slow")
    assert busy.startswith("this host is busy (load average 10000 on ")
    assert busy.endswith(alone)


def test_a_check_that_ends_while_it_is_looked_at_has_its_finding(here, monkeypatch):
    task = run._Task(fine, here)
    monkeypatch.setattr(task, "is_alive", lambda: task.run() is not None)
    state = task.state()
    assert (state["busy"], state["finding"]["text"]) == (False, "7 of 7")


def test_the_process_that_is_elsewhere_is_to_blame(here, monkeypatch):
    """Of three that are late; the two at one place wait for the third."""
    states = {
        f"links {rank}": {"busy": True, "where": "aba"[rank], "still": 5.0} for rank in range(3)
    }
    store = types.SimpleNamespace(get=lambda key: json.dumps(states[key]))
    monkeypatch.setattr(Machine, "limit", 4.0)
    three = dataclasses.replace(here, world=dataclasses.replace(here.world, world_size=3))
    verdict = run._Round("links", fine, three, store, math.inf)._judge()
    assert [found.status for found in verdict[0]] == ["left out", "bad", "left out"]


def test_a_check_that_would_end_the_program_does_not(here):
    def ending(_):
        raise SystemExit("error: a process of the benchmark ended (1)")

    report = run_checks({"rates": ending, "last": fine}, here)
    assert [result.worst.status for result in report.results] == ["bad", "ok"]
    assert "a process of the benchmark ended" in report.results[0].worst.text


def test_no_thread_is_left(here):
    before = threading.active_count()
    assert not run_checks({"fine": fine}, here).hangs
    assert threading.active_count() == before


def fine(_):
    return Finding("ok", "7 of 7")


def test_a_file_that_cannot_be_written_is_reported_before_anything_is_checked(tmp_path, call):
    for file in (tmp_path, tmp_path / "none" / "x.json", Path("/proc/x.json")):
        status, output = call("check_gpu", "--device", "cpu", "--json", file)
        assert status == 2
        assert output.startswith("error: ")
        assert output.count("\n") == 1
