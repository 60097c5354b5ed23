"""Runs programs in forks of the tests' process, which has imported nearly all of them already.

A start of Python with torch and DeepSpeed takes seconds, a tiny run a fraction of one. So after the
collection, before any test, the tests' process forks the farm, which imports the rest. The farm
forks for each job that comes in on a socket, one JSON object a line:

    arguments  the command line of tetdist/train.py; RANK in it stands for the process's rank
    world      number of processes, each in a session of its own
    stop       null, or [point, number, signal, rank]: the process of that rank sends itself the
               signal at the number-th passage (from 1) of the point
    command    instead of arguments: those of a Python interpreter, -c CODE ... or FILE ...; each
               process then runs in the folder cwd and has a log of its own, LOG.RANK
    env        the environment
    log        file for what the processes print
    timeout    seconds, after which they are killed

Answers, a line a job, are lists of the processes' exit statuses (-n: ended by signal n). Nothing of
a job outlives it, and neither farm nor jobs outlive the tests, also if those are killed.
"""

import gc
import importlib
import itertools
import json
import logging
import os
import runpy
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from tiny import CONFIG, Farm, changed, free_port


def passing(point: str, number: int, action: Callable[[], None]) -> None:
    """Have ``action`` called at the number-th passage of a point of the program."""
    import torch

    from tetdist.evaluation import evaluate
    from tetdist.training import state, step, trainer
    from tetdist.training.engines import deepspeed_engines, torch_engine

    calls = itertools.count(1)

    def wrap(owner: Any, name: str, *, after: bool = False) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            due = next(calls) == number
            if due and not after:
                action()
            result = original(*args, **kwargs)
            if due and after:
                action()
            return result

        setattr(owner, name, wrapped)

    if point == "start":  # before the rendezvous
        action()
    elif point == "join":  # before they have connected
        from tetdist.distributed import rendezvous

        wrap(rendezvous, "join", after=True)
    elif point == "micro":  # within the accumulation of a step
        wrap(torch_engine.TorchEngine, "backward", after=True)
        wrap(deepspeed_engines.DeepSpeedEngine, "backward", after=True)
        wrap(deepspeed_engines.ZeroEngine, "backward", after=True)
    elif point == "step":  # after a step's update, before it is logged
        wrap(trainer.Trainer, "_train_step", after=True)
    elif point == "evaluate":  # after a batch of an evaluation
        wrap(evaluate, "_count", after=True)
    elif point == "save":  # the weights are written, the rest is not
        wrap(torch, "save")
    elif point == "saved":  # the checkpoint is in its place
        wrap(state.checkpoint, "save", after=True)
    elif point == "raise":  # an error of this process alone, instead of the signal

        def action() -> None:
            raise LookupError("made for the test")

        wrap(step, "sums_of", after=True)
    else:
        raise ValueError(point)


def run(job: dict[str, Any], rank: int, port: int) -> int:
    """In the child: the program, as if it had been started by itself."""
    os.setsid()
    file = f"{job['log']}.{rank}" if "command" in job else job["log"]
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ |= job["env"]
    tempfile.tempdir = None  # that of the environment
    if job["world"] > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(job["world"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    if "command" in job:
        return run_command(job["command"], job["cwd"])
    if job["stop"]:
        point, number, which, on_rank = job["stop"]
        if on_rank == rank:
            passing(point, number, lambda: os.kill(os.getpid(), which))
    from tetdist.apps.cli import train
    from tetdist.distributed.launchers import end_with_launchers

    end_with_launchers()
    return train.main([one.replace("RANK", str(rank)) for one in job["arguments"]])


def run_command(command: list[str], cwd: str) -> int:
    """Run what a Python interpreter is given, as if it had just been started."""
    os.chdir(cwd)
    first = "" if command[0] == "-c" else str(Path(command[0]).parent)
    sys.path[:0] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.modules["__main__"] = main = ModuleType("__main__")
    if command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(compile(command[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
    return 0


def child(job: dict[str, Any], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = run(job, rank, port)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pids: list[int], seconds: float, requests: socket.socket) -> list[int]:
    end = time.monotonic() + seconds
    statuses: dict[int, int] = {}
    stopped: set[int] = set()
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
                if done and os.WIFSTOPPED(status):
                    stopped.add(pid)
                elif done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
        # The tests, which wait for the answer, send something only when they end.
        ended, _, _ = select.select([requests], [], [], 0.005)
        if ended or time.monotonic() > end or stopped | statuses.keys() == {*pids}:
            for pid in pids:
                if pid not in statuses:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    statuses[pid] = -999  # it hung
    for pid in pids:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return [statuses[pid] for pid in pids]


@cache
def environment() -> dict[str, Any]:
    """Functions of the environment with what they found; git takes longer than a tiny run."""
    from tetdist.tracking import environment

    found = {name: getattr(environment, name)() for name in ("git_state", "versions")}
    return {name: lambda value=value: value for name, value in found.items()}


# Each child would else import them for itself.
PRELOADED = (
    "deepspeed.ops",
    "matplotlib.backends.backend_agg",
    "mlflow.store.tracking.sqlalchemy_store",
    "nvidia.dali.pipeline",
    "timm.optim",
    # DeepSpeed's ZeRO imports them.
    "functorch.compile",
    "torch._inductor.compile_fx",
    "tetdist.apps.reports.observers",
    "tetdist.training.trainer",
)


def as_started() -> None:
    """Leave nothing of pytest: its signals, streams, handlers of the log."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdin = os.fdopen(0)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    logging.getLogger().handlers.clear()
    for logger in [*logging.getLogger().manager.loggerDict.values()]:
        for handler in getattr(logger, "handlers", ()):
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)


def serve(requests: socket.socket) -> None:
    as_started()
    import torch

    # OpenMP's threads, which the tests may have, are not forked.
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        # Deprecations within these packages, which the tests' own imports report.
        warnings.simplefilter("ignore")
        for module in PRELOADED:
            importlib.import_module(module)
    from tetdist.config.loading import parse
    from tetdist.tracking import environment as functions

    vars(functions).update(environment())
    parse(changed(CONFIG, {"name": "x", "data.root": "x"}), "x")  # models of sections are kept
    gc.freeze()
    lines = requests.makefile("rw")
    for line in lines:
        job = json.loads(line)
        port = free_port()
        pids = [child(job, rank, port) for rank in range(job["world"])]
        lines.write(json.dumps(wait(pids, job["timeout"], requests)) + "\n")
        lines.flush()


@contextmanager
def forked() -> Iterator[Farm]:
    """Fork the farm, which ends with the context."""
    ours, theirs = socket.socketpair()
    environment()
    folder = tempfile.mkdtemp(prefix="tetdist-farm-")
    with warnings.catch_warnings():
        # The threads are those of pytest-xdist, of which the farm needs nothing.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            serve(theirs)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # also if the tests are killed
            os._exit(0)
    theirs.close()
    with ours, ours.makefile("rw") as lines:
        yield Farm(lines, Path(folder, "log"))
    os.waitpid(pid, 0)
