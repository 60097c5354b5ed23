"""Runs the training program many times, each in processes of their own, and imports it once.

A start of Python with torch and DeepSpeed takes seconds, a tiny run a fraction of one. This script
imports all, then forks for each job that comes in on standard input, one JSON object a line:

    arguments  the command line of tetdist/train.py; RANK in it stands for the process's rank
    world      number of processes
    stop       null, or [point, number, signal, rank]: the process of that rank sends itself the
               signal at the number-th passage (from 1) of the point
    command    instead of arguments: those of a Python interpreter, -c CODE ... or FILE ...; each
               process then runs in the folder cwd and has a log of its own, LOG.RANK
    log        file for what the processes print
    timeout    seconds, after which they are killed

Answers, a line a job, are lists of the processes' exit statuses (-n: ended by signal n).
"""

import importlib
import itertools
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


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

    if point == "start":  # before the processes meet
        action()
    elif point == "met":  # before they have connected
        from tetdist.distributed import meeting

        wrap(meeting, "meet", after=True)
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
    elif point == "log":  # the line of metrics is written
        wrap(trainer.Trainer, "_log", after=True)
    else:
        raise ValueError(point)


def run(job: dict[str, Any], rank: int, port: int) -> int:
    """In the child: the program, as if it had been started by itself."""
    file = f"{job['log']}.{rank}" if "command" in job else job["log"]
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
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
    from tetdist.distributed.starters import end_with_starters

    end_with_starters()
    return train.main([one.replace("RANK", str(rank)) for one in job["arguments"]])


def run_command(command: list[str], cwd: str) -> int:
    """Run what a Python interpreter is given, as if it had just been started."""
    os.setsid()
    os.chdir(cwd)
    sys.argv = command if command[0] != "-c" else ["-c", *command[2:]]
    sys.path[0] = "" if command[0] == "-c" else str(Path(command[0]).parent)
    if command[0] == "-c":
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
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
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pids: list[int], seconds: float) -> list[int]:
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
        if time.monotonic() > end or stopped | statuses.keys() == {*pids}:
            for pid in pids:
                if pid not in statuses:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    statuses[pid] = -999  # it hung
        time.sleep(0.005)
    return [statuses[pid] for pid in pids]


def remember_the_environment() -> None:
    """Have all runs find the same versions and commit; git takes longer than a tiny run."""
    from tetdist.tracking import environment

    for name in ("git_state", "versions"):
        found = getattr(environment, name)()
        setattr(environment, name, lambda found=found: found)


# Each child would else import them for itself.
PRELOADED = (
    "deepspeed.ops",
    "matplotlib.backends.backend_agg",
    "mlflow.store.tracking.sqlalchemy_store",
    "nvidia.dali.pipeline",
    "timm.optim",
    "tetdist.apps.reports.observers",
    "tetdist.training.trainer",
)


def main() -> None:
    for module in PRELOADED:
        importlib.import_module(module)
    from tetdist.distributed.meeting import free_port
    from tetdist.distributed.starters import as_starter, end_with_starters

    end_with_starters()
    os.environ |= as_starter()
    remember_the_environment()
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        port = free_port()
        pids = [child(job, rank, port) for rank in range(job["world"])]
        print(json.dumps(wait(pids, job["timeout"])), flush=True)


if __name__ == "__main__":
    main()
