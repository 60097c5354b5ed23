"""torchrun with the exit status of its processes, and a cluster that evicts what it runs."""

import signal
import tempfile

import pytest
import tiny

WORKER = """
import os, signal, sys, time
ends = {"mistake": lambda: sys.exit(2), "lost": lambda: os.kill(os.getpid(), signal.SIGKILL)}
if os.environ["RANK"] == "1" and sys.argv[1] in ends:
    ends[sys.argv[1]]()
time.sleep(0 if sys.argv[1] == "well" else 60)
"""


@pytest.fixture
def own_signals(monkeypatch, tmp_path):
    """Signals as before torchrun, which keeps its own, and a folder for what it leaves."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def options(*command):
    return ["--nproc-per-node", 2, "--master-port", tiny.free_port(), *command]


@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize(
    ("end", "status"), [("well", 0), ("mistake", 2), ("lost", 128 + signal.SIGKILL)]
)
def test_status_is_that_of_the_process_that_failed_first(end, status, tmp_path, tool):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    assert tool("torchrun.py", *options(worker, end))[0] == status
