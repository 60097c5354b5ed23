"""Launched commands end with their launcher or study, however it ends, but not with a shell."""

import json
import os
import signal
import sys

import pytest
import tiny

from tetdist.distributed import launchers

KILL = signal.SIGKILL

# Ends upon SIGTERM as training does: it saves. It reports if all its launchers have ended.
WORKER = """
import os, pathlib, signal, sys, time
from tetdist.distributed import launchers
launchers.BEAT = 0.05
result = pathlib.Path(sys.argv[1])
def save(*_):
    result.write_text("saved")
    os._exit(143)
signal.signal(signal.SIGTERM, save)
parent = os.getppid()
launchers.end_with_launchers()
print("ready", os.getpid(), flush=True)
while os.getppid() == parent:
    time.sleep(0.01)
for _ in range(int(sys.argv[2])):
    time.sleep(launchers.BEAT)
result.write_text("goes on")
"""
LAUNCHER = """
import os, subprocess, sys
os.environ.update(RANK="0")
sys.exit(subprocess.call(sys.argv[1:], start_new_session=True))
"""
STUDY = """
import os, subprocess, sys
from tetdist.distributed.launchers import as_launcher
env = os.environ | as_launcher() | {"TETDIST_COMMAND": "test"}  # which importing tetdist removes
sys.exit(subprocess.call(sys.argv[1:], env=env, start_new_session=True))
"""


# Killed before the worker can look: before it is there, or before it looks.
ALONE = """
import os, subprocess, sys, time
parent = os.getppid()
print("ready", flush=True)
while os.getppid() == parent:
    time.sleep(0.01)
"""


LAUNCH = "deepspeed/launcher/launch.py"


@pytest.mark.parametrize(
    ("above", "variables", "result"),
    [
        ({"torchrun": LAUNCHER}, {}, "saved"),
        # As the deepspeed command starts its own launcher, and that a script of the user's.
        ({"bin/deepspeed": LAUNCHER, LAUNCH: LAUNCHER, "shell": None}, {}, "saved"),
        ({"study": STUDY, "shell": None}, {}, "saved"),
        ({"shell": None}, {}, "goes on"),
        # Gone before the worker looks.
        ({"bin/deepspeed": LAUNCHER, LAUNCH: ALONE + LAUNCHER}, {}, "saved"),
        ({"torchrun": LAUNCHER, "alone": ALONE}, {"TORCHELASTIC_RUN_ID": "none"}, "saved"),
    ],
)
def test_ends_with_those_it_works_for(above, variables, result, tmp_path):
    """The first of those above it is killed; the rest of them live."""
    texts = above | {"worker.py": above.get("alone", "") + WORKER}
    command = []
    for name, text in texts.items():
        if name == "shell":
            command += ["sh", "-c", '"$@"; exit $?', "sh"]
        elif name != "alone":
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
            command += [sys.executable, name]
    command += ["result", "1000" if result == "saved" else "10"]
    variables = {"TETDIST_COMMAND": "test", launchers.VARIABLE: ""} | variables
    env = tiny.clean_environment(PYTHONPATH=str(tiny.PROJECT), **variables)
    with tiny.started(command, tmp_path, env) as process:
        line = process.stdout.readline()
        assert line.startswith("ready"), line + process.stdout.read()
        process.send_signal(KILL)
        # It reads to the end, which comes when the last of them has ended.
        process.communicate(timeout=60)
    assert (tmp_path / "result").read_text() == result


def test_only_torchruns_worker_whose_parent_is_gone_was_launched(monkeypatch):
    """A person's shell that set the variables may end."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(launchers, "_is_init", lambda _: True)
    assert launchers._launching_ancestors() == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launchers._launching_ancestors() == [launchers.GONE]


@pytest.mark.parametrize("program", ["torchrun", "launch/torchrun.py", "/venv/bin/tetdist"])
def test_launcher_may_be_the_first_process_of_a_container(program, monkeypatch):
    """It has not adopted what it started."""
    monkeypatch.setattr(launchers, "_program", lambda _: program)
    assert not launchers._is_init(1)


def test_what_came_from_another_host_is_nobody_here(monkeypatch):
    ((name, text),) = launchers.as_launcher().items()
    place, pid, started = json.loads(text)
    assert launchers.Process(pid, started).is_there
    assert not launchers.Process(pid, started + 1).is_there
    monkeypatch.setenv(name, text)
    assert launchers._named_launcher() == [launchers.Process(os.getpid(), started)]
    for i in range(len(place)):
        elsewhere = [*place[:i], "other", *place[i + 1 :]]
        monkeypatch.setenv(name, json.dumps([elsewhere, pid, started]))
        assert launchers._named_launcher() == []
    monkeypatch.setenv(name, "")
    assert launchers._named_launcher() == []
