"""Runs in separate processes on the CPU, and comparisons of runs, for exactness.py."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from tetdist.apps.reports.compare import OF_THE_CLOCK
from tetdist.distributed.launchers import as_launcher
from tetdist.storage import selection

START_LIMIT = 300  # seconds for a run to reach the step where it is stopped

# Starting Python with torch and DeepSpeed takes as long as a run; one process does it, and all
# others are its forks.
# A fork lacks threads started before it, and would wait for them forever: allow only one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as in every command
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["deepspeed.ops", "matplotlib.pyplot", "tetdist.training.trainer", "tetdist.apps.cli.train"]
)


@dataclass(frozen=True)
class Stop:
    """A signal to some of the processes when a step is in the metrics."""

    step: int
    signal: signal.Signals
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        ranks = "all" if len(self.ranks) > 1 else f"rank {self.ranks[0]}"
        return f"{self.signal.name} to {ranks} after step {self.step}"


class Runs:
    """Make runs of one configuration, each in a separate folder.

    Args:
        folder: Parent folder of the runs.
        config: Values of the configuration.
        data: Root of the data set.
    """

    def __init__(self, folder: Path, config: dict[str, Any], data: Path) -> None:
        self.folder = folder
        values = config | {"runs_dir": str(folder)}
        values["data"] = config["data"] | {"root": str(data.resolve())}
        folder.mkdir(exist_ok=True)
        self.config = folder / "exactness.yaml"
        self.config.write_text(yaml.safe_dump(values))

    def __call__(
        self,
        name: str,
        *overrides: str,
        world: int = 1,
        stop: Stop | None = None,
        threads: int = 1,
        contiguous: bool = False,
    ) -> Path:
        """Train on ``world`` processes, to the end or until ``stop``.

        With ``contiguous`` the weights are laid out as in ZeRO's flat buffers, and nothing else is
        of ZeRO.
        """
        started = time.monotonic()
        run, log = self.folder / name, self.folder / f"{name}.log"
        environment = {
            **as_launcher(),
            "WORLD_SIZE": str(world),
            "LOCAL_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
        arguments = ["--config", str(self.config), f"name={name}", "device=cpu", *overrides]
        processes = [
            FORKS.Process(
                target=_train,
                args=(
                    environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    *(log, arguments, threads, contiguous),
                ),
            )
            for rank in range(world)
        ]
        try:
            for process in processes:
                process.start()
            if stop:
                wait_for(lambda: last_step(run) >= stop.step, processes)
                for rank in stop.ranks:
                    if (pid := processes[rank].pid) is not None and processes[rank].is_alive():
                        os.kill(pid, stop.signal)
            for process in processes:
                process.join(START_LIMIT)
            statuses = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
        if (stop is None and any(statuses)) or None in statuses:
            raise SystemExit(f"{name} failed ({statuses}): {log.read_text()[-3000:]}")
        seconds, ended = time.monotonic() - started, "stopped" if stop else "finished"
        print(f"{name}: {ended} at step {last_step(run)}, {seconds:.0f} s", file=sys.stderr)
        return run


def _free_port() -> int:
    """Return a free port of this host for a rendezvous."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _train(
    environment: dict[str, str], log: Path, arguments: list[str], threads: int, contiguous: bool
) -> None:
    """Do one process's part of a run, as if it had been started by itself."""
    from tetdist.apps.cli import train
    from tetdist.distributed.launchers import end_with_launchers
    from tetdist.training.engines import base

    os.environ |= environment
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(threads)
    if contiguous:
        base.lay_out = lambda *_: None
    end_with_launchers()
    sys.exit(train.main(arguments))


def wait_for(condition: Callable[[], bool], processes: Sequence[BaseProcess]) -> None:
    end = time.monotonic() + START_LIMIT
    while not condition() and all(process.is_alive() for process in processes):
        if time.monotonic() > end:
            raise SystemExit(f"no such step within {START_LIMIT} s")
        time.sleep(0.005)


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    whole = file.read_text().rpartition("\n")[0].splitlines() if file.is_file() else []
    return [line for line in map(json.loads, whole) if line["kind"] == kind]


def last_step(run: Path) -> int:
    return max((line["step"] for line in lines(run, "train")), default=0)


# --- comparisons -------------------------------------------------------------------------------


def samples(run: Path) -> dict[int, list[tuple[int, int]]]:
    """Return the samples of each step, (id, checksum of the augmented pixels), of all processes."""
    steps: dict[int, list[tuple[int, int]]] = {}
    for path in run.glob("samples-*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            pairs = zip(line["ids"], line["crc32"], strict=True)
            steps[line["step"]] = sorted({*steps.get(line["step"], []), *pairs})
    return steps


def newest(run: Path) -> Path:
    """Return the folder of the last checkpoint."""
    path = selection.last(run / "checkpoints")
    assert path is not None, f"{run} has no checkpoint"
    return path


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(newest(run) / "model.safetensors")


def average(run: Path) -> dict[str, torch.Tensor]:
    """Return the moving average of the weights; nothing if the run has none."""
    file = newest(run) / "ema.safetensors"
    return load_file(file) if file.is_file() else {}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def loss_difference(a: Path, b: Path, steps: range | None = None) -> float:
    """Return the largest value of some steps, or of all."""
    pairs = zip(lines(a, "train"), lines(b, "train"), strict=True)
    return max(
        abs(x["loss"] - y["loss"]) / abs(y["loss"])
        for x, y in pairs
        if steps is None or x["step"] in steps
    )


COMPARED = ("samples and pixels", "loss", "parameters", "running statistics", "evaluation")


def compare(a: Path, b: Path) -> list[str]:
    """`COMPARED` of two runs, as cells; with a moving average there is one cell more for it."""
    tensors, control = weights(a), weights(b)
    buffers = [key for key in tensors if "running" in key]
    parameters = [key for key in tensors if "running" not in key]
    answers = [
        [
            (kind, line["samples"], line["per_timestep_top1"])
            for kind in ("val", "val_ema")
            for line in lines(run, kind)
        ]
        for run in (a, b)
    ]
    cells = [
        "the same" if samples(a) == samples(b) else "DIFFERENT",
        f"{loss_difference(a, b):.1e}",
        f"{max(relative(tensors[key], control[key]) for key in parameters):.1e}",
        f"{max(relative(tensors[key], control[key]) for key in buffers):.1e}",
        "the same" if answers[0] == answers[1] else "DIFFERENT",
    ]
    if averages := average(b):
        cells.append(f"{max(relative(average(a)[key], averages[key]) for key in averages):.1e}")
    return cells


def identical(a: Path, b: Path, *, but: tuple[str, ...] = ()) -> str:
    """Return whether two runs are bitwise identical: metrics, weights, average, statistics,
    optimiser.

    Args:
        but: Names of metrics that may differ.
    """
    ignored = (*OF_THE_CLOCK, *but)
    for kind in ("train", "val", "val_ema"):
        metrics, other_metrics = (
            [{k: v for k, v in line.items() if k not in ignored} for line in lines(run, kind)]
            for run in (a, b)
        )
        if metrics != other_metrics:
            return "NO: metrics"
    for name, of_run in (("weights", weights), ("moving average", average)):
        tensors, others = of_run(a), of_run(b)
        same_keys = tensors.keys() == others.keys()
        if not same_keys or any(not torch.equal(tensors[key], others[key]) for key in others):
            return f"NO: {name}"
    states = [
        torch.load(newest(run) / "optimizer.pt", weights_only=True)["state"] for run in (a, b)
    ]
    for number, state in states[0].items():
        for key, value in state.items():
            if not torch.equal(value, states[1][number][key]):
                return "NO: optimiser"
    return "bitwise identical" if samples(a) == samples(b) else "NO: samples"
