"""What every command does, whichever it is: tetdist_command.py."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny

import tetdist_command
from tetdist.apps.cli.common import report_bad
from tetdist.errors import typed

FULL = Path("/dev/full")


@pytest.fixture(autouse=True)
def ctrl_c():
    """Let Ctrl-C end the tests again, which a command ignores at its end."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize(
    "command", [("-m", "tetdist_command", "--help"), (tiny.TRAIN, "--explain")]
)
def test_output_that_nobody_reads_is_no_fault(command):
    """As in `... | head`, when head has seen enough."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            tiny.python(*command),
            cwd=tiny.PROJECT,
            env=tiny.clean_environment(),
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_dockerfile_copies_and_runs_what_is_there():
    text = (tiny.PROJECT / "Dockerfile").read_text()
    copied = " ".join(re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE)).split()
    _, script, _ = json.loads(text.splitlines()[-1].removeprefix("CMD"))
    missing = [name for name in (*copied, script) if not (tiny.PROJECT / name).exists()]
    assert "pyproject.toml" in copied
    assert missing == []


@pytest.mark.parametrize("length", [1, 100_000])  # the second overflows Python's buffer
def test_output_that_is_full_is_one_sentence(length, monkeypatch, capsys):
    with FULL.open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert tetdist_command._answer_while_read(lambda: print("x" * length) or 0) == 2
        assert full.closed  # Python would flush it at its end
    text = "error: the output cannot be written (No space left on device); free disk space, or "
    assert capsys.readouterr().err.startswith(text)
    with FULL.open("w", buffering=1) as full:
        monkeypatch.undo()
        monkeypatch.setattr(sys, "stderr", full)
        assert tetdist_command._answer_while_read(lambda: tetdist_command._main("eavl")) == 2


@pytest.mark.parametrize(
    ("file", "reason"),
    [("/no/file", "No such file or directory"), ("a" * 300, "File name too long"), ("/", "Is a d")],
)
def test_error_that_names_a_file_is_one_sentence(file, reason, capsys):
    assert tetdist_command._answer_while_read(Path(file).read_bytes) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {file} cannot be used ({reason}")
    assert err.count("\n") == 1


def test_many_bad_files_are_counted_and_not_all_listed(capsys):
    report_bad([(f"{number}.jpg", "no image") for number in range(21)], "file", 30)
    *listed, last = capsys.readouterr().err.splitlines()
    assert (len(listed), last) == (20, "21 of 30 files are bad (the first 20 are above)")


@pytest.mark.parametrize("words", [["help"], ["list", "neurons"], ["help", "list"]])
def test_what_is_asked_for_comes_first(words, capsys):
    assert tetdist_command._answer_while_read(lambda: tetdist_command._main(*words)) == 0
    assert words[-1] in capsys.readouterr().out.partition("\n")[0]


def test_output_that_is_closed_is_nowhere(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)

    def command():
        print("x", file=sys.stderr)
        return int(sys.stdout.isatty()) + len(sys.stdin.read())

    assert tetdist_command._answer_while_read(command) == 0


def test_another_pipe_that_breaks_is_a_fault_and_a_full_disk_a_sentence(capsys):
    command = Mock(side_effect=BrokenPipeError("of a process that reads images"))
    with pytest.raises(BrokenPipeError, match="reads images"):
        tetdist_command._answer_while_read(command)
    command.side_effect = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert tetdist_command._answer_while_read(command) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_help_names_the_command_as_it_was_typed(monkeypatch):
    assert typed("eval", "x") == "python tools/eval.py x"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/tetdist", "eval"])
    assert typed("eval", "x") == "tetdist eval x"


def test_ctrl_c_while_python_exits_is_ignored():
    code = "import atexit, os, tetdist_command; atexit.register(os.kill, os.getpid(), 2)"
    command = tiny.python("-c", f"{code}; tetdist_command.main()", "--help")
    env = tiny.clean_environment(PYTHONPATH=str(tiny.PROJECT))
    done = subprocess.run(command, env=env, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


SLOW_TO_SAVE = """
import os, signal, sys, time
def save(*_):
    time.sleep(0.5)  # longer than subprocess.run grants
    os.write(1, b"saved\\n")  # print could be interrupted within itself
    sys.exit(130)
signal.signal(signal.SIGINT, save)
os.write(1, b"training\\n")
time.sleep(60)
"""


def test_ctrl_c_lets_a_step_of_the_quickstart_save(tmp_path):
    (tmp_path / "tetdist_command.py").write_text(SLOW_TO_SAVE)  # in place of the real commands
    code = "import sys; from tetdist.apps.cli import quickstart; sys.exit(quickstart.main([]))"
    env = tiny.clean_environment(PYTHONPATH=str(tiny.PROJECT), TETDIST_COMMAND="quickstart")
    # Tests may themselves run where Ctrl-C is ignored.
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {code}"
    with tiny.started(tiny.python("-c", code), tmp_path, env) as process:
        assert process.stdout.readline().startswith("$ ")
        assert process.stdout.readline() == "training\n"
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (130, "saved\n")
