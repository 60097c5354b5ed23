"""A data set, a configuration and a network so small that a whole run takes a second of steps."""

import copy
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from socketserver import BaseServer
from typing import Any, NoReturn, TextIO

import numpy as np
import pytest
import yaml
from PIL import Image

from tetdist.storage import selection

PROJECT = Path(__file__).resolve().parent.parent
TRAIN, EVAL = PROJECT / "tetdist" / "train.py", PROJECT / "tools" / "eval.py"
# Has a run write down the samples that it sees.
RECORD = PROJECT / "docs" / "make" / "sample_record.py"
DEEPSPEED = Path(sys.executable).with_name("deepspeed")

# Variables of the environment by which a process finds the others.
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

CLASSES = ("down", "left", "right", "up")
# No size divides by a batch size or by a number of processes.
TRAIN_SIZES, VAL_SIZES = (11, 12, 12, 12), (5, 5, 6, 7)
STEPS_PER_EPOCH = sum(TRAIN_SIZES) // 8

CONFIG: dict[str, Any] = {
    "model": {"name": "spiking_convnet", "arguments": {"channels": [4, 8], "input_size": 16}},
    "data": {"image_size": 16, "resize": 16, "scale": [0.5, 1.0], "threads": 1},
    "batch": {"global": 8, "micro": 2, "eval": 7},
    "phases": [{"epochs": 2, "timesteps": 2, "optimizer": {"kind": "sgd", "lr": 0.05}}],
    "precision": "fp32",
    "execution": "reference",
    "log_every": 1,
    # Pictures take three quarters of so short a run; the tests that are about them set it.
    "plots": False,
    "tracking": {"mlflow": False},
}

# What may differ between two runs that are the same. Not taken from compare.py: what that left out
# by mistake would be left out here, too.
_OF_THE_CLOCK = (
    "time",
    "samples_per_s",
    "image_timesteps_per_s",
    "data_wait",
    "step_seconds",
    "slowest",
    "slowest_host",
    "eta_s",
    "seconds",
)


def make_images(root: Path, seed: int = 0) -> None:
    """Noise with one bright half; which half is the class."""
    rng = np.random.default_rng(seed)
    for split, sizes in (("train", TRAIN_SIZES), ("val", VAL_SIZES)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(sizes[label]):
                height, width = 20 + i % 3, 22
                pixels = rng.integers(0, 90, (height, width, 3))
                half = (
                    np.s_[height // 2 :],
                    np.s_[:, : width // 2],
                    np.s_[:, width // 2 :],
                    np.s_[: height // 2],
                )[label]
                pixels[half] += 130
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")


def changed(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with dotted keys set (list items by number) or, where the value is ..., removed."""
    values = copy.deepcopy(values)
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        node: Any = values
        for part in parents:
            node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
        if value is ...:
            node.pop(last, None)
        else:
            node[int(last) if last.isdigit() else last] = value
    return values


def write_config(file: Path, root: Path | str, changes: Mapping[str, Any] | None = None) -> Path:
    values = changed(CONFIG, {"data.root": str(root), "runs_dir": str(file.parent / "runs")})
    file.write_text(yaml.safe_dump(changed(values, changes or {})))
    return file


def clean_environment(**extra: str) -> dict[str, str]:
    """This environment, with one thread a process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | extra


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def launched(processes: int, *arguments: object) -> list[str]:
    """The deepspeed launcher's command line, with a port of its own."""
    options = ("--num_gpus", processes, "--master_port", free_port(), "--log_level", "warning")
    # A hostfile of the machine is none of the tests' business.
    options += ("--hostfile", "/nonexistent")
    return [str(DEEPSPEED), *map(str, options), *map(str, arguments)]


@contextmanager
def started(
    command: list[str], cwd: Path, env: Mapping[str, str] | None = None, **options: Any
) -> Iterator["subprocess.Popen[str]"]:
    """Start a process in a session of its own, and leave nothing of it."""
    values: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=dict(env or clean_environment()),
        text=True,
        start_new_session=True,
        **values,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def marked(env: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """A mark, and an environment by which `alive` finds all that inherits it."""
    mark = f"TEST_MARK={secrets.token_hex(8)}"
    name, _, value = mark.partition("=")
    return mark, {**env, name: value}


def alive(mark: str) -> list[int]:
    """The processes with a mark, of whatever session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def skip(reason: str) -> NoReturn:
    """Skip the test, or the module that calls this: this machine lacks something that CI has."""
    assert not os.environ.get("CI"), reason
    pytest.skip(reason, allow_module_level=True)


def wait_until(condition: Callable[[], object], seconds: float) -> None:
    """Wait for a condition; fail if it does not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def execute(
    command: list[str], cwd: Path, *, env: Mapping[str, str] | None = None, timeout: float = 120
) -> tuple[int, str]:
    """Exit status and output (both streams) of a command."""
    with started(command, cwd, env) as process:
        output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


@contextmanager
def served(server: BaseServer) -> Iterator[str]:
    """Have a server of this process answer on the loopback; its address."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def mlflow_server(database: Path, port: int, password: str | None = None) -> Iterator[None]:
    """MLflow's server in this process; with a password it serves the user "me" alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{database}")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(database.with_name("artifacts")))
        from mlflow import server
        from werkzeug.serving import make_server

        # Those of an earlier server, of another database.
        patch.setattr(server.handlers, "_tracking_store", None)
        patch.setattr(server.handlers, "_model_registry_store", None)
        known = password and b64encode(f"me:{password}".encode()).decode()

        def guarded(request: dict[str, Any], start: Any) -> Any:
            if known and request.get("HTTP_AUTHORIZATION") != f"Basic {known}":
                start("401 Unauthorized", [])
                return [b"who is there?"]
            return server.app(request, start)

        with served(make_server("127.0.0.1", port, guarded, threaded=True)):
            yield


def metrics(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in _OF_THE_CLOCK}
        for line in lines
        if kind in (None, line["kind"])
    ]


def samples(run: Path) -> dict[int, list[tuple[int, int]]]:
    """Of each step of a run that imports RECORD: (id, checksum of pixels) of all processes."""
    steps: dict[int, list[tuple[int, int]]] = {}
    for path in run.glob("samples-*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            pairs = zip(line["ids"], line["crc32"], strict=True)
            steps[line["step"]] = sorted({*steps.get(line["step"], []), *pairs})
    return steps


def newest(run: Path) -> Path:
    return selection.last(run / "checkpoints")


def assert_same_run(a: Path, b: Path) -> None:
    """Metrics, weights, running statistics and optimiser state are the same to the bit."""
    import torch
    from safetensors.torch import load_file

    parted = [pair for pair in zip_longest(metrics(a), metrics(b)) if pair[0] != pair[1]]
    assert not parted, f"of {a} and {b}: {parted[0]}"
    # One that was saved again at the same step has a number after it.
    assert newest(a).name.split(".")[0] == newest(b).name.split(".")[0]
    files = [sorted(path.name for path in newest(run).glob("*.safetensors")) for run in (a, b)]
    assert files[0] == files[1]
    for name in files[0]:
        ours, theirs = (load_file(newest(run) / name) for run in (a, b))
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == [], name
    ours, theirs = (torch.load(newest(run) / "optimizer.pt", weights_only=True) for run in (a, b))
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for i, state in ours["state"].items():
        for key, value in state.items():
            other = theirs["state"][i][key]
            assert value is other is None or torch.equal(value, other), (i, key)
    states = [json.loads((newest(run) / "state.json").read_text()) for run in (a, b)]
    assert states[0] == states[1]


# Runs a tool by its name and arguments: status, standard output, standard error.
Tool = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True)
class Outcome:
    status: int
    text: str  # what a person saw: standard error and log


def expect(outcome: Outcome, *parts: str, status: int = 0) -> str:
    """What a person saw of a run: these parts among it, no traceback, and this status."""
    assert outcome.status == status, outcome.text
    assert "Traceback" not in outcome.text, outcome.text
    assert [part for part in parts if part not in outcome.text] == [], outcome.text
    return outcome.text


def refused(outcome: Outcome, *parts: str) -> str:
    """As `expect`, of a run that a user's mistake ends."""
    return expect(outcome, *parts, status=2)


class Farm:
    """Runs programs in real processes, quickly: see farm.py."""

    def __init__(self, lines: TextIO, log: Path) -> None:
        self._lines, self._log = lines, log

    def __call__(
        self,
        file: Path,
        *overrides: str,
        world: int = 1,
        stop: tuple[str, int, int] | None = None,
        rank: int = 0,
        timeout: float = 60,
    ) -> Outcome:
        """Train; the status is that of the only process, or of all where they agree."""
        statuses, text = self.each(
            file, *overrides, world=world, stop=stop, rank=rank, timeout=timeout
        )
        assert len(set(statuses)) == 1, (statuses, text)
        return Outcome(statuses[0], text)

    def each(
        self,
        file: Path,
        *overrides: str,
        world: int,
        stop: tuple[str, int, int] | None,
        rank: int,
        timeout: float = 60,
    ) -> tuple[list[int], str]:
        """Train; the status of each process (-999: killed at the timeout), and what they printed.

        `stop` is a point, how often it has been passed, and the signal that rank then gets.
        """
        self._log.unlink(missing_ok=True)
        job = {
            "arguments": ["--config", str(file), *overrides],
            "world": world,
            "stop": [*stop, rank] if stop else None,
            "log": str(self._log),
            "timeout": timeout,
        }
        return self._ask(job), self._log.read_text()

    def side_by_side(self, processes: int, command: list[str], cwd: Path) -> list[tuple[int, str]]:
        """Exit status and output of each process of one run of a Python command."""
        assert command[0] == sys.executable
        logs = [self._log.with_name(f"{self._log.name}.{rank}") for rank in range(processes)]
        for log in logs:
            log.unlink(missing_ok=True)
        job = {"command": command[1:], "cwd": str(cwd), "world": processes, "stop": None}
        statuses = self._ask(job | {"log": str(self._log), "timeout": 90})
        return [(status, log.read_text()) for status, log in zip(statuses, logs, strict=True)]

    def _ask(self, job: dict[str, Any]) -> list[int]:
        self._lines.write(json.dumps(job | {"env": clean_environment()}) + "\n")
        self._lines.flush()
        return json.loads(self._lines.readline())
